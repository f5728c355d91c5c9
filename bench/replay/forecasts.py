"""Forecasts of the gap after a turn, for the replay: by class, perfect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from bench.replay.traces import Session

POINTS = 24


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
    gap_s = max(session[k + 1].gap_s, 0.001)
    return Curve(((gap_s, 1.0), (gap_s + 0.001, 0.0)), 1.0)


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
        for i in range(1, POINTS + 1):
            points[round(gaps[len(gaps) * i // (POINTS + 1)], 3)] = 1 - i / (POINTS + 1)
        points[gaps[-1]] = 0.0
        curves[kind] = Curve(
            tuple((t, p) for t, p in points.items() if t > 0), len(gaps) / (len(gaps) + ends)
        )

    def forecast(session: Session, k: int) -> Curve:
        return curves[session[k].idle_kind]

    return forecast
