"""Steps on several processes of this machine, measured, and a model of them that goes on to thousands of ranks."""
