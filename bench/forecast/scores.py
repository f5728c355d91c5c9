"""The measures: ranking, error and calibration, at a gap's start and at random instants."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PAIRS: Final = 400_000
FLOOR_S: Final = 0.05
"""Errors and rankings count shorter times as this long: a gateway cannot tell them from zero, as
its client's own overhead is of that size."""
INSTANT_CAPS_S: Final = (60.0, 300.0, 3_600.0, 1e9)
"""A wait is met at a random instant in proportion to its length, up to this: without a bound the
few longest waits are nearly all that is met."""
WIDTHS: Final = (0.5, 0.8, 0.95)


def pairs_of(sessions: NDArray[np.int64], seed: int = 0) -> tuple[NDArray[np.intp], ...]:
    """Random pairs of waits of two different sessions."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, len(sessions), PAIRS)
    b = rng.integers(0, len(sessions), PAIRS)
    other = sessions[a] != sessions[b]
    return a[other], b[other]


def ranking(score: Floats, actual_s: Floats, sessions: NDArray[np.int64], by_s: float = 0) -> float:
    """Share of pairs of waits of two sessions whose order the score tells; a tie of scores counts
    half. With ``by_s`` only pairs whose actual times differ by more than this count."""
    a, b = pairs_of(sessions)
    differ = np.abs(actual_s[a] - actual_s[b]) > by_s
    a, b = a[differ], b[differ]
    right = np.sign(score[a] - score[b]) * np.sign(actual_s[a] - actual_s[b])
    return float(((right > 0) + 0.5 * (right == 0)).mean()) if len(right) else float("nan")


def errors(predicted_s: Floats, actual_s: Floats) -> Floats:
    """|log10(predicted / actual)|, both floored."""
    ratio = np.maximum(predicted_s, FLOOR_S) / np.maximum(actual_s, FLOOR_S)
    error: Floats = np.abs(np.log10(ratio))
    return error


def coverage(reached: Floats) -> list[float]:
    """Share of actual times within the central intervals `WIDTHS`, from the forecast probability
    ``reached`` of a time up to the actual one."""
    return [float((np.abs(reached - 0.5) <= width / 2).mean()) for width in WIDTHS]


def instants(actual_s: Floats, cap_s: float, seed: int = 1) -> tuple[NDArray[np.intp], Floats]:
    """Random instants within waits: which wait, and how long it has lasted."""
    rng = np.random.default_rng(seed)
    weight = np.minimum(actual_s, cap_s)
    which = rng.choice(len(actual_s), 10_000, p=weight / weight.sum())
    return which, rng.random(len(which)) * weight[which]
