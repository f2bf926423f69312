"""Arrays on a GPU: CuPy holds them and launches kernels, which come as PTX with the package or are compiled once."""
