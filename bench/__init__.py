"""Benchmarks and training runs: ``python -m bench step`` and ``python -m bench train``."""
