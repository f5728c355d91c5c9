"""Sessions of a pod: whose turn is open, who is idle since when, and what was forecast for them.

Time is given by the caller (`now`, seconds of any monotonic clock, the same one throughout).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from engine_patch.forecast import Forecast

if TYPE_CHECKING:
    from engine_patch.queue import Block, Group, ReuseAwareFreeQueue

IdleKind = Literal["tool", "human", "ended"]

MAX_SESSIONS = 20_000
# An open turn outranks every forecast (rates are reuses per second; the shortest gap counted is
# one millisecond).
OPEN_TURN_RATE = 1e6
# A forecast outlived twice says nothing an age would not; at least this long, as blocks that age
# alone speaks for are worth more again than a session long overdue, and at most a day.
MIN_LAPSE_S = 3600.0
MAX_LAPSE_S = 86_400.0


class Retention(NamedTuple):
    """One directive of `kv.retain`: tokens `[start, end)` of the session until `until_s`."""

    start: int
    end: int | None
    priority: int
    until_s: float

    @property
    def reuse_rate(self) -> float:
        """Priority p protects like a session expected back in 100/p seconds; 0 releases."""
        return self.priority / 100


@dataclass(eq=False, slots=True)
class Session:
    """What is known of one session on this pod."""

    key: str
    open_turns: int = 0
    arrived_at: float = float("-inf")
    idle_since: float = float("-inf")
    idle_kind: IdleKind | None = None
    forecast: Forecast | None = None
    lapses_at: float = float("-inf")
    retentions: tuple[Retention, ...] = ()
    hinted: bool = False
    seen_at: float = float("-inf")
    evicted_blocks: int = 0
    chain_blocks: int = 0  # of its last turn: where to look for the end of what is resident
    groups: set[Group] = field(default_factory=set)
    superseded: Group | None = None
    turn_stamp: int = 0
    continued: bool = False
    rate: float | None = None
    refreshed_at: float = float("-inf")
    refresh_at: float = float("-inf")

    def refresh(self, now: float) -> None:
        """Set `rate` for `now`; None means no live hint: the blocks age as in stock vLLM.

        A rate stands until an eighth has been added to the time waited.
        """
        if now < self.refresh_at:
            return
        if self.retentions:
            self.retentions = tuple(r for r in self.retentions if r.until_s > now)
        if self.forecast is not None and self.lapses_at <= now:
            self.forecast = self.idle_kind = None
        self.refreshed_at = now
        self.refresh_at = min((r.until_s for r in self.retentions), default=float("inf"))
        if self.open_turns:
            self.rate = OPEN_TURN_RATE if self.hinted else None
        elif self.forecast is not None:
            elapsed_s = now - self.idle_since
            self.rate = self.forecast.reuse_rate(elapsed_s)
            self.refresh_at = min(now + elapsed_s / 8, self.lapses_at, self.refresh_at)
        else:
            self.rate = None

    def rate_at(self, token: int, now: float) -> float | None:
        """`rate` for the block that starts at `token`, under the retentions that cover it."""
        if not self.retentions or self.open_turns:
            return self.rate
        covering = [
            r
            for r in self.retentions
            if r.until_s > now and r.start <= token and (r.end is None or token < r.end)
        ]
        if not covering:
            return self.rate
        kept = max(r.reuse_rate for r in covering)
        return max(kept, self.rate or 0.0) if kept else 0.0

    @property
    def live(self) -> bool:
        """Whether anything is left that the next turn or an eviction could use."""
        return bool(self.open_turns or self.groups or self.forecast or self.retentions)


class SessionTable:
    """Every session of the pod, at most `max_sessions`, the longest unseen forgotten first.

    It is the only writer of a session's state. The queue is told at once of a turn that arrives,
    whose blocks are to be kept; what a turn's end or a hint changes waits for the next rescore.
    """

    def __init__(self, queue: ReuseAwareFreeQueue, max_sessions: int = MAX_SESSIONS) -> None:
        self.queue = queue
        self.max_sessions = max_sessions
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._hinted_until = float("-inf")

    def hinted(self, now: float) -> bool:
        """Whether any hint may still be live; if none is, the pod is to behave as stock vLLM."""
        return now < self._hinted_until

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def get(self, key: str) -> Session | None:
        """The session, without touching its age."""
        return self._sessions.get(key)

    def turn_arrived(self, key: str, now: float) -> None:
        """A request of the session is waiting: its last forecast has served its purpose."""
        session = self._see(key, now)
        if not session.open_turns:
            self.queue.turn_begins(session)
        session.open_turns += 1
        session.arrived_at = now
        session.forecast = session.idle_kind = None
        session.refresh_at = float("-inf")
        session.refresh(now)
        self.queue.reclassify(session)

    def blocks_freed(self, key: str, blocks: Sequence[Block], now: float) -> None:
        """Call before a request's cached blocks (first to last) go back to the free queue."""
        session = self._see(key, now)
        session.chain_blocks = len(blocks)
        self.queue.adopt(session, blocks)

    def turn_finished(self, key: str, now: float) -> None:
        """A request of the session has ended, in whatever way; its blocks have been freed."""
        session = self._sessions.get(key)
        if session is None:
            return
        session.open_turns = max(session.open_turns - 1, 0)
        session.idle_since = session.seen_at = now
        session.refresh_at = float("-inf")
        if session.hinted and not session.open_turns:
            self.queue.supersede(session)

    def forecast(
        self, key: str, idle_kind: IdleKind, forecast: Forecast, elapsed_s: float, now: float
    ) -> str | None:
        """Take a forecast of the session's present gap, which began `elapsed_s` ago.

        Returns:
            Why it was refused: a turn that began after the gap has already closed it.
        """
        known = self._sessions.get(key)
        if known is not None and known.arrived_at > now - elapsed_s:
            return "the session's next turn has already arrived"
        session = self._see(key, now)
        session.hinted = True
        session.forecast = forecast
        session.idle_kind = idle_kind
        session.idle_since = now - elapsed_s
        session.lapses_at = now + min(max(2 * forecast.last_s, MIN_LAPSE_S), MAX_LAPSE_S)
        session.refresh_at = float("-inf")
        self._hinted_until = max(self._hinted_until, session.lapses_at)
        return None

    def retain(self, key: str, retentions: tuple[Retention, ...], now: float) -> None:
        """Replace the session's retentions."""
        session = self._see(key, now)
        session.hinted = True
        session.retentions = retentions
        session.refresh_at = float("-inf")
        self._hinted_until = max(self._hinted_until, *(r.until_s for r in retentions))

    def sweep(self, now: float) -> None:
        """Forget sessions that have neither blocks, nor a turn, nor a live hint. O(sessions)."""
        idle = [s for s in self._sessions.values() if not s.open_turns and not s.groups]
        for session in idle:
            session.refresh(now)
            if not session.live:
                del self._sessions[session.key]

    def _see(self, key: str, now: float) -> Session:
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(key)
            if len(self._sessions) > self.max_sessions:
                self._forget_oldest(session)
        else:
            self._sessions.move_to_end(key)
        session.seen_at = now
        return session

    def _forget_oldest(self, keep: Session) -> None:
        """Drop the longest unseen session; one with an open turn only if all have one."""
        idle = (s for s in self._sessions.values() if not s.open_turns and s is not keep)
        victim = next(idle, None) or next(iter(self._sessions.values()))
        self.queue.disown(victim)
        del self._sessions[victim.key]
