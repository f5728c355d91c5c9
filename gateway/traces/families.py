"""Which sub-agents are whose, and when sessions start whose trace does not tell it."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from gateway.traces.session import Session

SEATS: Final = 32
"""Sessions at once where the trace does not tell when they began."""


def tree(sessions: Sequence[Session]) -> dict[int | None, list[int]]:
    """By a session's place in ``sessions`` the places of its sub-agents, by None those of the
    roots, each in order. A root is a session without a parent among them, or one whose line of
    parents never reaches such a session, as it leads into a ring."""
    places: dict[str | None, int] = {session.id: n for n, session in enumerate(sessions)}
    below: dict[int | None, list[int]] = defaultdict(list)
    for n, session in enumerate(sessions):
        below[places.get(session.parent)].append(n)
    reached = list(below[None])
    for n in reached:
        reached += below.get(n, ())
    rings = set(range(len(sessions))).difference(reached)
    return {n: below[n] for n in reached if n in below} | {None: sorted({*below[None], *rings})}


def starts(sessions: Sequence[Session]) -> list[float]:
    """When each session starts, in seconds: as it was recorded; or, a sub-agent, `start_s` after
    its parent; or, a root, when one of `SEATS` seats gets free, the first of them at the earliest
    start that was recorded, or at 0."""
    below = tree(sessions)
    known = [session.started_at for session in sessions if session.started_at is not None]
    origin_s = min(known, default=0.0)
    free = [origin_s + 0.05 * seat for seat in range(SEATS)]
    found = [0.0] * len(sessions)
    for root in below[None]:
        told = sessions[root].started_at
        found[root] = ends_s = round(heapq.heappop(free), 3) if told is None else told
        family = [root]
        for n in family:
            if sessions[n].turns:
                ends_s = max(ends_s, found[n] + sessions[n].ends_s)
            for child in below.get(n, ()):
                own = sessions[child].started_at
                found[child] = found[n] + sessions[child].start_s if own is None else own
                family.append(child)
        if told is None:
            heapq.heappush(free, ends_s)
    return found
