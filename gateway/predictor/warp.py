"""Calibration: what a forecast probability has turned out to mean.

For each tool kind a histogram counts how far up their forecast distribution actual gaps fell. Its
cumulative curve, applied to a new forecast, makes stated quantiles true ones (quantile
recalibration: Kuleshov, Fenner & Ermon, ICML 2018). It goes on learning, so a drift mends itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

KNOTS: Final = (
    0.0, 0.005, 0.01, 0.025, 0.05, 0.075, *(n / 20 for n in range(2, 19)), 0.925, 0.95, 0.975, 0.99,
    0.995, 1.0,
)  # fmt: skip
BINS: Final = len(KNOTS) - 1
_MEMORY: Final = 3_000.0
_PRIOR: Final = 30.0
"""Gaps' worth of belief that forecasts are right as they are."""
_REFRESH: Final = 64

Curve = tuple[float, ...]
"""Calibrated probability at each of `KNOTS`, rising from 0 to 1."""


class Warp:
    """The histogram of one tool kind, and its curve."""

    __slots__ = ("_new", "counts", "curve")

    def __init__(self, counts: list[float] | None = None) -> None:
        self.counts = counts if counts is not None else [0.0] * BINS
        self._new = 0
        self.curve: Curve = ()
        self.refresh()

    @staticmethod
    def bin_of(reached: float) -> int:
        return min(bisect_right(KNOTS, reached) - 1, BINS - 1)

    def add(self, reached: float) -> None:
        """A gap ended at this probability of its forecast, as stated before calibration."""
        self.counts[self.bin_of(reached)] += 1.0
        self._new += 1
        if self._new >= _REFRESH:
            self._new = 0
            self.refresh()

    def refresh(self) -> None:
        total = sum(self.counts)
        if total > _MEMORY:
            self.counts = [count * _MEMORY / total for count in self.counts]
            total = _MEMORY
        below = 0.0
        curve = [0.0]
        for i, count in enumerate(self.counts):
            below += count + _PRIOR * (KNOTS[i + 1] - KNOTS[i])
            curve.append(below / (total + _PRIOR))
        curve[-1] = 1.0
        self.curve = tuple(curve)


def calibrated(curve: Curve, stated: float) -> float:
    """The probability that a stated one has turned out to be."""
    i = min(bisect_right(KNOTS, stated), BINS)
    low, high = KNOTS[i - 1], KNOTS[i]
    return curve[i - 1] + (curve[i] - curve[i - 1]) * (stated - low) / (high - low)


def stated(curve: Curve, wanted: float) -> float:
    """The stated probability that has turned out to be ``wanted``: `calibrated`'s inverse."""
    i = max(1, min(bisect_left(curve, wanted), BINS))
    low, high = curve[i - 1], curve[i]
    within = (wanted - low) / (high - low) if high > low else 1.0
    return KNOTS[i - 1] + (KNOTS[i] - KNOTS[i - 1]) * within
