"""The order in which held turns get a place.

One rule, `precedence`: the least of

    additional prefill seconds + debt of its class − AGE_WEIGHT × seconds held − head start

goes first, but before all others those that are due, the longest due of them.

Least additional prefill first uses the KV that is still there before others evict it, and finishes
more sessions sooner on the whole (shortest job first); its price is that long contexts whose KV is
gone wait longer. Three things bound that price: age, the debt between classes, and a promise: a
turn held `AGE_BOUND_S` beyond its fair share of waiting (`Admission.promise_s`) is due.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from math import inf
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

Priority = Literal["interactive", "batch"]
ShareClass = tuple[str, Priority]
"""Tenant and priority: who shares fairly with whom."""

AGE_WEIGHT: Final = 0.005
"""Prefill seconds that a second of waiting makes up for."""
AGE_BOUND_S: Final = 60.0
"""A turn may be held this long beyond its fair share; then it is due."""
HEAD_START_S: Final = 2.0
"""Prefill seconds that a turn is let off for which a person sits waiting."""
PRIORITY_WEIGHT: Final[dict[Priority, float]] = {"interactive": 1.0, "batch": 0.25}
MAX_DEBT_S: Final = 600.0
MAX_CLASSES: Final = 4096


def standing_s(additional_s: float, arrived_at: float, person_waits: bool) -> float:
    """What of a turn's precedence does not change while it is held, in seconds."""
    head_start_s = HEAD_START_S if person_waits else 0.0
    return additional_s + AGE_WEIGHT * arrived_at - head_start_s


def precedence(
    additional_s: float,
    debt_s: float,
    arrived_at: float,
    person_waits: bool,
    due_at: float,
    now: float,
) -> tuple[int, float]:
    """Sorts held turns, least first. `HoldQueue` keeps this order.

    Args:
        additional_s: prefill seconds of the tokens that are not resident on the pod in question.
        debt_s: pod-seconds that the turn's class has had beyond its share (`Shares.debts`).
        arrived_at: since when it is held.
        person_waits: whether a person waits for it, not a tool loop.
        due_at: when it has been held `AGE_BOUND_S` beyond its fair share.
        now: seconds of the same clock.
    """
    if now >= due_at:
        return (0, due_at)
    return (1, standing_s(additional_s, arrived_at, person_waits) + debt_s - AGE_WEIGHT * now)


class Held(Protocol):
    """What the queue reads and writes of a held turn."""

    number: int
    due_from: float
    """When its wait began, as far as the promise goes."""
    entries: tuple[Entry, ...]
    """Where it stands in the queue; an entry in a heap that is not here any more is void."""


H = TypeVar("H", bound=Held)
Entry = tuple[float, int, Any]


class HoldQueue(Generic[H]):
    """Held turns, by `precedence` as each pod sees it.

    A turn with live KV somewhere costs less there than elsewhere, so it stands in two heaps of its
    class: that of its home, and that of all other pods. Age weighs linearly, so the order within a
    heap never changes. Adding, removing and taking the next cost O(log turns) and O(classes).
    """

    def __init__(self) -> None:
        self._held: dict[int, H] = {}
        self._home: dict[str, dict[ShareClass, list[Entry]]] = {}
        self._away: dict[ShareClass, list[Entry]] = {}
        self._due: list[Entry] = []
        self._sizes: list[Entry] = []
        self._entries = 0
        self._looks = 0
        """Iterations under way."""

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[H]:
        """Oldest first."""
        return iter(self._held.values())

    def __contains__(self, hold: H) -> bool:
        return hold.number in self._held

    def add(
        self,
        hold: H,
        share: ShareClass,
        home: str | None,
        home_s: float,
        away_s: float | None,
        tokens: int,
    ) -> None:
        """Take a turn in, or anew.

        Args:
            hold: the turn.
            share: its class.
            home: the pod where it stands apart; None if nowhere.
            home_s: its `standing_s` there.
            away_s: on all other pods; None if it may go to its home only.
            tokens: the fewest that it needs.
        """
        self._held[hold.number] = hold
        due = (hold.due_from, hold.number, hold)
        size = (float(tokens), hold.number, hold)
        heapq.heappush(self._due, due)
        heapq.heappush(self._sizes, size)
        entries = [due, size]
        if home is not None:
            entries.append((home_s, hold.number, hold))
            heap = self._home.setdefault(home, {}).setdefault(share, [])
            heapq.heappush(heap, entries[-1])
        if away_s is not None:
            entries.append((away_s, hold.number, hold))
            heapq.heappush(self._away.setdefault(share, []), entries[-1])
        hold.entries = tuple(entries)
        self._entries += len(entries)
        if self._entries > 8 * len(self._held) + 64:
            self._compact()

    def remove(self, hold: H) -> None:
        del self._held[hold.number]
        hold.entries = ()
        if not self._held:
            self._home.clear()
            self._away.clear()
            self._due.clear()
            self._sizes.clear()
            self._entries = 0

    def drop_home(self, home: str) -> None:
        """The pod is gone; turns that stood there apart stand where all stand."""
        self._home.pop(home, None)

    def _compact(self) -> None:
        heaps = [heap for by_class in self._home.values() for heap in by_class.values()]
        self._entries = 0
        for heap in [*heaps, *self._away.values(), self._due, self._sizes]:
            heap[:] = [entry for entry in heap if _valid(entry)]
            heapq.heapify(heap)
            self._entries += len(heap)
        if self._looks:
            return  # one of them may have taken all of a heap's, and will put them back
        for by_class in [*self._home.values(), self._away]:
            for share in [share for share, heap in by_class.items() if not heap]:
                del by_class[share]
        for home in [home for home, by_class in self._home.items() if not by_class]:
            del self._home[home]

    @property
    def least_tokens(self) -> float:
        """The fewest tokens that any of the turns needs."""
        while self._sizes and not _valid(self._sizes[0]):
            heapq.heappop(self._sizes)
            self._entries -= 1
        return self._sizes[0][0] if self._sizes else inf

    def _pick(
        self, heaps: list[tuple[float, list[Entry]]], wanted: Callable[[float, H], bool]
    ) -> Iterator[H]:
        """Turns of heaps, each with what is added to its keys, from the least on."""
        taken: list[tuple[list[Entry], Entry]] = []
        tops = [(heap[0][0] + plus, i) for i, (plus, heap) in enumerate(heaps) if heap]
        heapq.heapify(tops)
        self._looks += 1
        try:
            while tops:
                _, i = tops[0]
                plus, heap = heaps[i]
                entry = heapq.heappop(heap) if heap else None
                if heap:
                    heapq.heapreplace(tops, (heap[0][0] + plus, i))
                else:
                    heapq.heappop(tops)
                if entry is None or not _valid(entry):
                    continue
                taken.append((heap, entry))
                if not wanted(entry[0], entry[2]):
                    return
                yield entry[2]
        finally:
            self._looks -= 1
            for heap, entry in taken:
                if _valid(entry):
                    heapq.heappush(heap, entry)

    def due(self, since: float) -> Iterator[H]:
        """Turns that have waited from then on or longer, the longest first. They may be removed
        meanwhile."""
        if self._due and self._due[0][0] <= since:
            yield from self._pick([(0.0, self._due)], lambda key, _: key <= since)

    def next(self, pod: str, debts: Mapping[ShareClass, float], now: float) -> Iterator[H]:
        """All turns, in the pod's order. They may be removed meanwhile."""
        heaps = [
            (debts.get(share, 0.0), heap)
            for by_class in (self._home.get(pod, {}), self._away)
            for share, heap in by_class.items()
        ]
        seen: set[int] = set()
        for hold in self._pick(heaps, lambda _, hold: True):
            if hold.number not in seen:
                seen.add(hold.number)
                yield hold


def _valid(entry: Entry) -> bool:
    for mine in entry[2].entries:  # noqa: SIM110 (twice as fast as any())
        if mine is entry:
            return True
    return False


class Shares:
    """Weighted fair sharing between classes: start-time fair queueing (Goyal, Vin & Cheng 1996)
    of pod-seconds, where a session that occupies a share x of a pod for t seconds uses x t.

    A class that begins to wait starts level with the least served of those that wait, so that
    nobody saves up. When nobody waits, all is settled. Bounded by `MAX_CLASSES`.
    """

    def __init__(self) -> None:
        self._served_s: dict[ShareClass, float] = {}
        self._waiting: dict[ShareClass, int] = {}

    def _floor_s(self) -> float:
        return min((self._served_s[key] for key in self._waiting), default=0.0)

    def waits(self, key: ShareClass) -> None:
        """A turn of the class begins to wait; undone by `waits_no_more`."""
        if key not in self._waiting:
            self._served_s[key] = max(self._served_s.get(key, 0.0), self._floor_s())
        self._waiting[key] = self._waiting.get(key, 0) + 1

    def waits_no_more(self, key: ShareClass) -> None:
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]
        if not self._waiting:
            self._served_s.clear()

    def charge(self, key: ShareClass, pod_seconds: float, weight: float) -> None:
        """The class has used so much; it counts only while someone waits."""
        if not self._waiting:
            return
        before_s = self._served_s.get(key)
        if before_s is None:
            if len(self._served_s) >= MAX_CLASSES:
                return
            before_s = self._floor_s()
        self._served_s[key] = before_s + pod_seconds / weight

    def debts(self) -> dict[ShareClass, float]:
        """For each class that waits, pod-seconds it has had beyond the least served of them."""
        floor_s = self._floor_s()
        return {key: min(self._served_s[key] - floor_s, MAX_DEBT_S) for key in self._waiting}
