"""Steps on a GPU, measured against a copy and other libraries; bench/gpu.sh runs it with all that needs a GPU."""
