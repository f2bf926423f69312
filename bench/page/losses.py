"""Where another contender is faster than fastopt."""

from __future__ import annotations

from dataclasses import dataclass

from ..results import Record, Result
from .explanations import EXPLANATIONS
from .words import YARDSTICKS, Ratio, is_ours, ratio


@dataclass(frozen=True)
class Loss:
    """A contender that is faster than one of ours.

    Attributes:
        ratio: Our time over the other's: above 1.
        explanation: Why, where it is known.
    """

    result: Result
    ours: str
    other: str
    ratio: Ratio
    explanation: str | None

    @property
    def rounds(self) -> int:
        """How many samples there are; a single one says nothing of noise."""
        return min(len(self.result.timings[name].samples) for name in (self.ours, self.other))


@dataclass(frozen=True)
class Comparison:
    """What came of all results that have one of ours and another.

    Attributes:
        cases: How many results that is.
        losses: Where the best of ours is slower beyond noise: the lower quartile of the ratio is above 1.
        close: Where only its median is above 1.
        variants: Where one of ours is slower beyond noise although another one of ours, in the same case, is not.
    """

    cases: int
    losses: list[Loss]
    close: list[Loss]
    variants: list[Loss]

    @property
    def lost(self) -> int:
        """In how many cases the best of ours is slower."""
        return len({loss.result.name for loss in self.losses})


def compare(record: Record) -> Comparison:
    """Look at every result, and sort by how much is lost."""
    cases = 0
    losses, close, variants = [], [], []
    for result in record.results:
        rivals = [name for name in result.timings if name not in YARDSTICKS]
        ours = sorted(filter(is_ours, rivals), key=lambda name: result.timings[name].median)
        others = [name for name in rivals if not is_ours(name)]
        if not ours or not others:
            continue
        cases += 1
        best = slower(result, ours[0], others)
        losses += [loss for loss in best if loss.ratio.low > 1]
        close += [loss for loss in best if loss.ratio.low <= 1]
        beyond = {loss.other for loss in best if loss.ratio.low > 1}
        for name in ours[1:]:
            found = slower(result, name, others)
            variants += [loss for loss in found if loss.ratio.low > 1 and loss.other not in beyond]
    return Comparison(cases, _sorted(losses), _sorted(close), _sorted(variants))


def slower(result: Result, ours: str, others: list[str]) -> list[Loss]:
    """The others that have a smaller median of the ratio."""
    found = []
    for other in others:
        times = ratio(result, ours, other)
        if times and times.median > 1:
            found.append(Loss(result, ours, other, times, explanation(result, other)))
    return found


def explanation(result: Result, other: str) -> str | None:
    """The most special explanation: of the case and contender, the family and contender, the case, the family."""
    keys = (f"{result.name}: {other}", f"{result.family}: {other}", result.name, result.family)
    return next((EXPLANATIONS[key] for key in keys if key in EXPLANATIONS), None)


def _sorted(losses: list[Loss]) -> list[Loss]:
    return sorted(losses, key=lambda loss: loss.ratio.median, reverse=True)
