"""The processor: loops around the rules, their compiler, and what hands chunks to threads.

``launch.c`` does that in the compiled library, ``scheduler.py`` in builds without a C compiler. ``arrays.c`` and
``tensors.c`` look at the arrays of the front ends.
"""
