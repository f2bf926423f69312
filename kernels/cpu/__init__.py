"""The processor: loops around the rules, their compiler, and the schedule that threads run.

``launch.c`` starts them in the compiled library, ``team.py`` in builds without a C compiler. ``arrays.c`` and
``tensors.c`` look at the arrays of the front ends.
"""
