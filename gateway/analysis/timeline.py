"""All sessions' turns on one clock.

Traces with wall-clock times keep them. The others, and those that are to be replayed at a given
concurrency, are laid beside one another: `slots` seats, each taken by one session after another in
an order shuffled by a fixed seed, waits over `MAX_WAIT_S` cut to it.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gateway.traces.families import SEATS, starts, tree
from gateway.traces.session import Session

MAX_WAIT_S: Final = 300.0
LIVE_S: Final = 300.0
"""A session counts as live this long after a response, unless it comes back sooner."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A turn by its session's and its own number; seconds on the common clock."""

    at_s: float
    session: int
    turn: int
    ends_s: float


@dataclass
class Timeline:
    """Turns in the order they were sent."""

    sent: list[Sent] = field(default_factory=list)
    wall_clock: bool = True
    slots: int | None = None
    full_s: float = math.inf
    """Until when sessions wait for every seat that gets free."""


def timeline(sessions: Sequence[Session], slots: int | None = None) -> Timeline:
    """The sessions' turns on one clock: the wall's if all but sub-agents have it and `slots` is
    None, else in `slots` (or `SEATS`) seats."""
    clocked = all(sessions[root].started_at is not None for root in tree(sessions)[None])
    if clocked and slots is None:
        return Timeline(_by_wall(sessions))
    slots = slots or SEATS
    sent, full_s = _by_slots(sessions, slots)
    return Timeline(sent, wall_clock=False, slots=slots, full_s=full_s)


def _api_s(session: Session, k: int) -> float:
    turn = session.turns[k]
    if turn.api_s is not None:
        return turn.api_s
    if k + 1 < len(session.turns):
        after = session.turns[k + 1]
        return max(0.0, after.at_s - turn.at_s - after.gap_s)
    return 0.0


def _by_wall(sessions: Sequence[Session]) -> list[Sent]:
    sent = []
    for number, (session, start_s) in enumerate(zip(sessions, starts(sessions), strict=True)):
        for k, turn in enumerate(session.turns):
            at_s = start_s + turn.at_s
            sent.append(Sent(at_s, number, k, at_s + _api_s(session, k)))
    first_s = min((each.at_s for each in sent), default=0.0)
    moved = [Sent(s.at_s - first_s, s.session, s.turn, s.ends_s - first_s) for s in sent]
    return sorted(moved, key=lambda each: (each.at_s, each.session))


def _by_slots(sessions: Sequence[Session], slots: int) -> tuple[list[Sent], float]:
    children = tree(sessions)
    roots = list(children[None])
    random.Random(1).shuffle(roots)
    free = [0.05 * slot for slot in range(slots)]
    sent: list[Sent] = []
    for root in roots:
        start_s = heapq.heappop(free)
        placed = _placed(sessions, children, root, start_s)
        sent += placed
        heapq.heappush(free, max((each.ends_s for each in placed), default=start_s))
    full_s = min(free) if len(roots) > slots else math.inf
    return sorted(sent, key=lambda each: (each.at_s, each.session)), full_s


def _placed(
    sessions: Sequence[Session], children: dict[int | None, list[int]], root: int, start_s: float
) -> list[Sent]:
    sent: list[Sent] = []
    todo = [(root, start_s)]
    while todo:
        number, now_s = todo.pop()
        session = sessions[number]
        ends = []
        for k, turn in enumerate(session.turns):
            now_s += min(turn.gap_s, MAX_WAIT_S) if k else 0.0
            ends_s = now_s + _api_s(session, k)
            sent.append(Sent(now_s, number, k, ends_s))
            ends.append(ends_s)
            now_s = ends_s
        times = [turn.at_s for turn in session.turns]
        for child in children.get(number, ()):
            k = bisect_right(times, sessions[child].start_s) - 1
            todo.append((child, ends[max(k, 0)]))
    return sent
