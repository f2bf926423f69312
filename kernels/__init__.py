"""The numerical heart of fastopt: update rules, the loops around them, and the compiler that joins both.

Importing this package costs nothing and needs no Numba: ``rules`` and ``registry`` are plain Python.
Numba is imported by ``reductions``, ``environment``, ``emit``, ``cpu`` and ``cuda`` only (and llvmlite by ``storage``),
which run when the library is built and when a kernel is compiled on first use.
"""
