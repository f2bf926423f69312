"""The instruction sets that tests run through."""

from fastopt.engine import backend as _backend


def native_isas():
    """The instruction sets of the compiled library that this machine runs, the oldest first."""
    best = _backend.load().isa
    return [isa for isa in _backend.ISAS if isa <= best] if best in _backend.ISAS else [best]
