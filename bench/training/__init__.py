"""Training runs: what they learn from, the models, and their figures."""
