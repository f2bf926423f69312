"""Why fastopt is slower somewhere, shown beside the row."""

from __future__ import annotations

EXPLANATIONS: dict[str, str] = {
    "sizes: numba": "Below 100,000 elements the time is that of the call. Numba's dispatcher takes about 6 µs for its "
    "arguments; fastopt takes 9, in which it looks whether options, gradients and state are what they were. A call per "
    "array is what costs Numba where there are many.",
    "arrays: numba": "With few arrays the time is that of a call, and fastopt's looks after more than Numba's.",
    "adam: numba": "Both are bound by memory; they differ by the noise of the machine.",
    "startup": "The first step includes what the contender makes then: fastopt its tables, others their kernels.",
}
"""Text by ``"<case>: <contender>"``, ``"<family>: <contender>"``, ``"<case>"`` or ``"<family>"``.

The first of these that is found is shown.
"""
