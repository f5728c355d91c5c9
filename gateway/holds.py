"""The order in which held turns get a place.

One rule, `precedence`: what is due goes first, the longest due ahead; else the least of

    additional prefill seconds + debt of its class − AGE_WEIGHT × seconds held − head start

Least additional prefill first uses the KV that is still there before others evict it, and finishes
more sessions sooner on the whole (shortest job first); its price is that long contexts whose KV is
gone wait longer. Three terms bound that price: age, the debt between classes, and the promise that
a turn held `AGE_BOUND_S` beyond its fair share is passed by no one any more.
"""

from __future__ import annotations

from typing import Final, Literal

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


def precedence(
    additional_s: float, debt_s: float, held_s: float, person_waits: bool, overdue_s: float
) -> tuple[int, float]:
    """Sorts held turns, least first.

    Args:
        additional_s: prefill seconds of the tokens that are not resident on the pod in question.
        debt_s: pod-seconds that the turn's class has had beyond its share (`Shares.debts`).
        held_s: how long the turn has been held.
        person_waits: whether a person waits for it, not a tool loop.
        overdue_s: seconds since the turn became due; negative before.
    """
    if overdue_s >= 0:
        return (0, -overdue_s)
    head_start_s = HEAD_START_S if person_waits else 0.0
    return (1, additional_s + debt_s - AGE_WEIGHT * held_s - head_start_s)


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
