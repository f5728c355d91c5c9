"""Forecasts of the gap after a turn, for the replay: by class, perfect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from bench.replay.traces import Session

LEVELS = (*(i / 24 for i in range(1, 24)), 0.97, 0.98, 0.99, 0.995)
LEAST_S = 0.001


@dataclass(frozen=True, slots=True)
class Curve:
    """A survival curve as the gateway's policies read it."""

    points: tuple[tuple[float, float], ...]
    p_return: float

    def curve(self) -> Sequence[tuple[float, float]]:
        return self.points


class Forecaster(Protocol):
    """Forecasts the gap after turn ``k`` of a session, at the moment its answer ends."""

    def __call__(self, session: Session, k: int) -> Curve | None: ...


def oracle(session: Session, k: int) -> Curve | None:
    """The gap as it will be; None after the last turn: it has ended."""
    if k + 1 == len(session):
        return None
    gap_s = max(session[k + 1].gap_s, LEAST_S)
    return Curve(((gap_s, 1.0), (gap_s + LEAST_S, 0.0)), 1.0)


def by_class(sessions: Sequence[Session]) -> Forecaster:
    """What gaps after a tool call, and after an answer, are like on the whole."""
    curves: dict[str, Curve] = {}
    for kind in ("tool", "human"):
        gaps = sorted(
            following.gap_s
            for session in sessions
            for turn, following in pairwise(session)
            if turn.idle_kind == kind
        )
        ends = sum(session[-1].idle_kind == kind for session in sessions)
        if not gaps:
            curves[kind] = Curve((), 0.0)
            continue
        points: dict[float, float] = {}
        for level in LEVELS:
            points[max(round(gaps[int(len(gaps) * level)], 3), LEAST_S)] = 1 - level
        points[max(gaps[-1], LEAST_S)] = 0.0
        curves[kind] = Curve(tuple(points.items()), len(gaps) / (len(gaps) + ends))

    def forecast(session: Session, k: int) -> Curve:
        return curves[session[k].idle_kind]

    return forecast
