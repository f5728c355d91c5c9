"""A histogram that takes many equal values at once, as a step of several tokens has them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    """Values counted by their bucket. `bounds` are the upper ones, rising; the last is infinite."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = (*bounds, float("inf"))
        self.counts = [0] * len(self.bounds)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[float, int]]:
        """Each upper bound, and how many values are not above it."""
        return list(zip(self.bounds, accumulate(self.counts), strict=True))
