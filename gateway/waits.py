"""The gaps under way that were forecast, and when a pod is to be told of one again."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Final

from gateway.admission import GapForecast
from gateway.idle import IdleKind

AGAIN_AT: Final = (0.5, 0.9, 0.99)
"""A pod is told again when a wait outlives these quantiles of its forecast."""

QUANTILES: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of a forecast, as it is stated."""

_END: Final = (inf, 0.0)


@dataclass(slots=True, frozen=True)
class Fixed:
    """A forecast whose curve has been drawn, once."""

    p_return: float
    points: tuple[tuple[float, float], ...]
    _stated: list[float | None] = field(default_factory=list, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, forecast: GapForecast) -> Fixed:
        return cls(forecast.p_return, tuple(forecast.curve()))

    def curve(self) -> Sequence[tuple[float, float]]:
        return self.points

    def stated(self) -> list[float | None]:
        """Its `QUANTILES`, worked out once. Not to be changed."""
        if not self._stated:
            self._stated.extend(self.quantiles(QUANTILES))
        return self._stated

    def quantiles(self, probabilities: Sequence[float]) -> list[float | None]:
        """Seconds by which the gap has ended with each of the ``probabilities``, which rise, if the
        session returns; None beyond the curve's end. O(points) for all."""
        found: list[float | None] = []
        points = iter((*self.points, _END))
        before_s, p_before = at_s, p = 0.0, 1.0
        for probability in probabilities:
            left = 1.0 - probability
            while p > left:
                before_s, p_before = at_s, p
                at_s, p = next(points)
            if at_s == inf:
                found.append(None)
            elif p_before > p:
                along = (p_before - left) / (p_before - p)
                found.append(round(before_s + (at_s - before_s) * along, 3))
            else:
                found.append(round(at_s, 3))
        return found


@dataclass(slots=True, eq=False)
class Wait:
    """A gap under way. Times in seconds of the gateway's clock."""

    sid: str
    pod: str
    idle_kind: IdleKind
    forecast: Fixed
    since: float
    again_at: list[float]
    """When the pod is to be told again, latest first."""


class Waits:
    """The gaps under way that were forecast: at most one a session. O(log n) an operation."""

    def __init__(self) -> None:
        self._by_sid: dict[str, Wait] = {}
        self._due: list[tuple[float, int, Wait]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._by_sid)

    def of(self, sid: str) -> Wait | None:
        """The session's gap under way, if it was forecast."""
        return self._by_sid.get(sid)

    def begin(self, wait: Wait) -> None:
        self._by_sid[wait.sid] = wait
        self._schedule(wait)

    def end(self, sid: str) -> Wait | None:
        """The session's next turn has come, or never will."""
        wait = self._by_sid.pop(sid, None)
        if len(self._due) > 64 + 2 * len(self._by_sid):
            self._due = [entry for entry in self._due if self._by_sid.get(entry[2].sid) is entry[2]]
            heapq.heapify(self._due)
        return wait

    def outlived(self, now: float, tell: Callable[[Wait], None]) -> None:
        """Call ``tell`` with each wait that has outlived a quantile since it was last told of."""
        while self._due and self._due[0][0] <= now:
            _, _, wait = heapq.heappop(self._due)
            if self._by_sid.get(wait.sid) is wait:
                self._schedule(wait)
                tell(wait)

    def _schedule(self, wait: Wait) -> None:
        if wait.again_at:
            heapq.heappush(self._due, (wait.again_at.pop(), next(self._numbers), wait))


def begun(sid: str, pod: str, idle_kind: IdleKind, forecast: Fixed, now: float) -> Wait:
    curve = forecast.curve()
    again_at: list[float] = []
    for quantile in reversed(AGAIN_AT):
        outlived_s = next((t_s for t_s, p in curve if p <= 1 - quantile), None)
        if outlived_s is not None and (not again_at or now + outlived_s < again_at[-1]):
            again_at.append(now + outlived_s)
    return Wait(sid, pod, idle_kind, forecast, now, again_at)
