"""Update rules, one family per file, each readable beside its paper.

Letters: p parameter, g gradient (already unscaled, clipped and, under ``maximize``, negated), t step number from 1,
h the scalars of the rule. A rule is a plain function of scalars: the compiler makes it a CPU loop, a CUDA kernel, and
tests call it as it stands.

A factor that may be zero stands behind a condition where it would meet an infinity, ``x if h.c else y``: a parameter of
-inf without decay is to stay one. LLVM takes the condition, which is the same for all elements, out of the loop.
"""
