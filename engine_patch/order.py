"""Which waiting request goes next: the one that needs fewest additional KV blocks, within bounds.

Fewest blocks first keeps what is resident in use before others evict it (CacheWise, arXiv
2606.16824). Left alone it starves long contexts whose cache is gone, so age bounds it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

MAX_WAIT_S = 30.0
# How often those that wait are looked at again: who is beyond the bound, whose blocks have gone.
REVIEW_S = 1.0
# Other requests may make a waiting request's prefix resident again; look that often.
_RECOUNT_S = 5.0
# An admission opens an interval; so many are added up at once at the latest.
_MAX_INTERVALS = 256
_Key = tuple[int, float, float]
_FRONT: _Key = (0, 0.0, 0.0)


class Waiting(Protocol):
    """What the order reads of a request."""

    request_id: str


R = TypeVar("R", bound=Waiting)


@dataclass(slots=True)
class _Entry:
    arrived_at: float
    behind_s: float = 0.0  # waited so far while the last to be admitted was younger
    missing_blocks: int = 0
    counted_at: float = float("-inf")
    evictions: int = -1
    key: _Key | None = None


class WaitingOrder:
    """Orders requests by missing blocks; none waits more than `max_wait_s` behind younger ones.

    A request waits behind younger ones while the last request admitted came after it; waiting
    for older ones is no overtaking, however long. Beyond the bound it goes first, the oldest of
    such ahead.

    A request's missing blocks are counted when it arrives, when blocks of its session have been
    evicted since, and otherwise every five seconds, not at every step. Who was admitted before (a
    preempted request) is in front, as in vLLM.
    """

    def __init__(self, max_wait_s: float = MAX_WAIT_S) -> None:
        self.max_wait_s = max_wait_s
        self.overtakes = 0
        self.longest_wait_s = 0.0
        self.review_at = float("-inf")
        self._entries: dict[str, _Entry] = {}
        self._admitted_at = 0.0
        self._admitted_youngest = float("-inf")  # arrival of the youngest admitted then
        self._intervals: list[tuple[float, float]] = []  # that arrival, seconds it was the last

    def __len__(self) -> int:
        return len(self._entries)

    def arrived(self, request_id: str, now: float) -> None:
        """A request has begun to wait; one that waits again keeps its first arrival."""
        self._entries.setdefault(request_id, _Entry(now))

    def left(self, request_id: str) -> None:
        """A request was aborted while it waited, or was admitted in stock's order."""
        self._entries.pop(request_id, None)

    def admitted(self, request_ids: Iterable[str], now: float) -> None:
        """Requests have begun to run: count those that passed an older one."""
        entries = [e for i in request_ids if (e := self._entries.pop(i, None)) is not None]
        if not entries:
            return
        self._close_interval(now)
        oldest = next((e.arrived_at for e in self._entries.values()), float("inf"))
        for entry in entries:
            self.overtakes += entry.arrived_at > oldest
            behind_s = sum(s for arrival, s in self._intervals if arrival > entry.arrived_at)
            self.longest_wait_s = max(self.longest_wait_s, entry.behind_s + behind_s)
        self._admitted_youngest = max(entry.arrived_at for entry in entries)
        if len(self._intervals) >= _MAX_INTERVALS:
            self._settle(now)

    def _close_interval(self, now: float) -> None:
        self._intervals.append((self._admitted_youngest, now - self._admitted_at))
        self._admitted_at = now

    def _settle(self, now: float) -> None:
        """Add what has passed since the last time to every clock it ran for."""
        self._close_interval(now)
        self._intervals.sort(reverse=True)
        arrivals = [-arrival for arrival, _ in self._intervals]
        seconds = [0.0, *accumulate(s for _, s in self._intervals)]
        for entry in self._entries.values():
            entry.behind_s += seconds[bisect_left(arrivals, -entry.arrived_at)]
        self._intervals.clear()

    def arrange(
        self,
        waiting: MutableSequence[R],
        now: float,
        missing_blocks: Callable[[R], int],
        evictions: Callable[[R], int],
    ) -> None:
        """Put `waiting` in the order to serve it: all of it every `REVIEW_S`, in between only
        those that have arrived since, who stand at its end.

        Args:
            waiting: all that wait, in the present order.
            now: seconds.
            missing_blocks: KV blocks the request needs beyond those resident; costly.
            evictions: counter that rises when blocks of the request's session are evicted.
        """

        def look(request: R, entry: _Entry) -> _Key:
            if entry.behind_s + REVIEW_S > self.max_wait_s:  # beyond it before the next look
                entry.key = (1, entry.arrived_at, 0.0)
                return entry.key
            evicted = evictions(request)
            if evicted != entry.evictions or now - entry.counted_at >= _RECOUNT_S:
                entry.missing_blocks = missing_blocks(request)
                entry.evictions = evicted
                entry.counted_at = now
            entry.key = (2, entry.missing_blocks, entry.arrived_at)
            return entry.key

        entries = self._entries
        if now < self.review_at:
            arrivals = []
            while waiting and (entry := self._unplaced(waiting[-1])) is not None:
                arrivals.append((look(waiting[-1], entry), waiting.pop()))
            for key, request in reversed(arrivals):
                waiting.insert(bisect_right(waiting, key, key=self._key), request)
            return
        self.review_at = now + REVIEW_S
        self._settle(now)
        for request in waiting:
            if (entry := entries.get(request.request_id)) is not None:
                look(request, entry)
        arranged = sorted(waiting, key=self._key)
        waiting.clear()
        waiting.extend(arranged)

    def due(self, waiting: Sequence[Waiting], now: float) -> bool:
        """Whether there is anything to arrange."""
        return now >= self.review_at or self._unplaced(waiting[-1]) is not None

    def _unplaced(self, request: Waiting) -> _Entry | None:
        entry = self._entries.get(request.request_id)
        return entry if entry is not None and entry.key is None else None

    def _key(self, request: Waiting) -> _Key:
        entry = self._entries.get(request.request_id)
        return _FRONT if entry is None or entry.key is None else entry.key
