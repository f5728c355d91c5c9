"""The grid of times on which every distribution of the forecast lives: bins in log10 seconds.

Narrow where gaps are many and matter (50 ms to 80 s), wide below what a gateway can tell from zero
and in the tail of people.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from math import log10
from typing import Final

FLOOR_S: Final = 1e-3
"""Shorter gaps count as this long."""
FINE_S: Final = 0.05
"""From here to about 80 s the bins are 0.2 decades wide."""

_FINE_LOG: Final = log10(FINE_S)
EDGES: Final[tuple[float, ...]] = tuple(
    accumulate([-3.0, *[(_FINE_LOG + 3.0) / 5] * 5, *[0.2] * 16, *[0.35] * 9])
)
"""Borders of the bins, log10 seconds, rising; one more than there are bins."""
BINS: Final = len(EDGES) - 1
EDGES_S: Final[tuple[float, ...]] = tuple(10**edge for edge in EDGES)
LAST_S: Final = EDGES_S[-1]
_INNER: Final = EDGES[1:-1]


def log_s(seconds: float) -> float:
    """log10 of a time, floored at `FLOOR_S`."""
    return log10(seconds) if seconds > FLOOR_S else -3.0


def bin_of(log_seconds: float) -> int:
    """The bin a time falls into."""
    return bisect_right(_INNER, log_seconds)
