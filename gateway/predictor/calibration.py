"""Predicted against actual: how often gaps fall below the quantiles that were forecast."""

from __future__ import annotations

from typing import Final

from gateway.predictor.forecast import Forecast
from gateway.predictor.kinds import KINDS

QUANTILES: Final = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
"""Ends of the 50, 80 and 95 % intervals, and the median."""

LABELS: Final = frozenset((*KINDS, "ended"))


def below(forecast: Forecast, gap_s: float) -> list[float]:
    """The forecast's quantiles that the gap stayed below. Over many gaps of a calibrated forecast,
    a share ``q`` of them lies below the quantile ``q``."""
    reached = 1.0 - forecast.survival(gap_s)
    return [q for q in QUANTILES if reached <= q]


def label_of(forecast: Forecast) -> str:
    """The tool kind under which a forecast is judged, one of `LABELS`."""
    basis = forecast.basis
    if basis is not None and basis.calls:
        return max(basis.calls, key=lambda call: call.level).words.kind
    return forecast.idle_kind if forecast.idle_kind in LABELS else "other"
