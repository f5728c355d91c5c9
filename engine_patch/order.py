"""Which waiting request goes next: the one that needs fewest additional KV blocks, within bounds.

Fewest blocks first keeps what is resident in use before others evict it (CacheWise, arXiv
2606.16824). Left alone it starves long contexts whose cache is gone, so age bounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

MAX_WAIT_S = 30.0
# Other requests may make a waiting request's prefix resident again; look that often.
_RECOUNT_S = 5.0


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


class WaitingOrder:
    """Orders requests by missing blocks; none waits more than `max_wait_s` behind younger ones.

    A request waits behind younger ones while the last request admitted came after it; waiting
    for older ones is no overtaking, however long. Beyond the bound it goes first, the oldest of
    such ahead.

    A request's missing blocks are counted when it arrives, when blocks of its session have been
    evicted since, and otherwise every five seconds, not at every step.
    """

    def __init__(self, max_wait_s: float = MAX_WAIT_S) -> None:
        self.max_wait_s = max_wait_s
        self.overtakes = 0
        self.longest_wait_s = 0.0
        self._entries: dict[str, _Entry] = {}
        self._admitted_at = 0.0
        self._admitted_youngest = float("-inf")  # arrival of the youngest admitted then

    def __len__(self) -> int:
        return len(self._entries)

    def arrived(self, request_id: str, now: float) -> None:
        """A request has begun to wait; one that waits again keeps its first arrival."""
        self._entries.setdefault(request_id, _Entry(now))

    def left(self, request_id: str) -> None:
        """A request was aborted while it waited."""
        self._entries.pop(request_id, None)

    def admitted(self, request_ids: Iterable[str], now: float) -> None:
        """Requests have begun to run: count those that passed an older one."""
        entries = [e for i in request_ids if (e := self._entries.pop(i, None)) is not None]
        if not entries:
            return
        oldest = float("inf")
        for entry in self._entries.values():
            entry.behind_s = self._behind_s(entry, now)
            oldest = min(oldest, entry.arrived_at)
        for entry in entries:
            self.overtakes += entry.arrived_at > oldest
            self.longest_wait_s = max(self.longest_wait_s, self._behind_s(entry, now))
        self._admitted_at = now
        self._admitted_youngest = max(entry.arrived_at for entry in entries)

    def _behind_s(self, entry: _Entry, now: float) -> float:
        if entry.arrived_at >= self._admitted_youngest:
            return entry.behind_s
        return entry.behind_s + now - self._admitted_at

    def arrange(
        self,
        requests: Sequence[R],
        now: float,
        missing_blocks: Callable[[R], int],
        evictions: Callable[[R], int],
        resumed: Callable[[R], bool],
    ) -> list[R]:
        """The order to serve `requests` in.

        Args:
            requests: all that wait, in the present order.
            now: seconds.
            missing_blocks: KV blocks the request needs beyond those resident; costly.
            evictions: counter that rises when blocks of the request's session are evicted.
            resumed: whether the request ran before; such stay in front, as in vLLM.
        """

        def key(request: R) -> tuple[int, float, float]:
            entry = self._entries.get(request.request_id)
            if resumed(request) or entry is None:
                return (0, 0.0, 0.0)
            if self._behind_s(entry, now) >= self.max_wait_s:
                return (1, entry.arrived_at, 0.0)
            evicted = evictions(request)
            if evicted != entry.evictions or now - entry.counted_at >= _RECOUNT_S:
                entry.missing_blocks = missing_blocks(request)
                entry.evictions = evicted
                entry.counted_at = now
            return (2, entry.missing_blocks, entry.arrived_at)

        return sorted(requests, key=key)
