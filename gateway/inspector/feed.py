"""Keeps watchers up to date: everything there is at first, then what has changed, twice a second.

One refresh serves all watchers: it finds the sessions that may have changed, renders their rows and
marks those that differ for every watcher. A watcher sends what is marked for it when its reader has
taken what came before, so a slow one gets fewer and newer states and costs no more memory. What a
new watcher gets first is just everything marked. While nobody watches nothing runs and nothing is
kept.

Bounded: `MAX_WATCHERS`, `MAX_ROWS` sessions (the latest seen), `MAX_TURNS` ended turns that a
watcher has not been sent yet, and `TICK_SHARE` of the event loop's time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, takewhile
from math import inf
from typing import Any, Final

import orjson

from gateway.gateway import Gateway
from gateway.inspector.rows import Whereabouts, gateway_row, pod_row, session_row
from gateway.sessions import Session
from gateway.turn_history import packed

logger = logging.getLogger("gateway.inspector")

TICK_S: Final = 0.5
TICK_SHARE: Final = 0.05
"""Of the event loop's time, at most so much goes into refreshes."""
MAX_WATCHERS: Final = 16
MAX_ROWS: Final = 5_000
MAX_TURNS: Final = 4_096
ROWS_A_FRAME: Final = 250
ROWS_A_SLICE: Final = 100
"""Rendered before other work gets its turn."""


class TooManyWatchers(Exception):  # noqa: N818 - a condition, not a fault
    """`MAX_WATCHERS` watch already."""


class Watcher:
    """What one reader has still to be sent."""

    def __init__(self, feed: Feed) -> None:
        self.news = asyncio.Event()
        """Set when there is something to send."""
        self.complete = False
        """Whether it has been sent everything that there was when it came."""
        self._feed = feed
        self._sessions: dict[str, None] = dict.fromkeys(reversed(feed.sessions))
        self._pods: dict[str, None] = dict.fromkeys(feed.pods)
        self._gateway = True
        self._turns: list[tuple[str, bytes]] = []
        self._missed = False

    def mark_session(self, sid: str) -> None:
        self._sessions[sid] = None

    def mark_pod(self, name: str) -> None:
        self._pods[name] = None

    def mark_gateway(self) -> None:
        self._gateway = True

    def turn_ended(self, sid: str, span: bytes) -> None:
        if len(self._turns) < MAX_TURNS:
            self._turns.append((sid, span))
        else:
            self._missed = True

    @property
    def behind(self) -> bool:
        """Whether one frame did not hold all rows there were to send."""
        return bool(self._sessions)

    @property
    def pending(self) -> bool:
        return bool(
            self._sessions
            or self._pods
            or self._turns
            or self._gateway
            or self._missed
            or not self.complete
        )

    def frame(self, at: float) -> dict[str, Any]:
        """The next `ROWS_A_FRAME` rows and whatever else is new, to be sent at once.

        ``sessions`` and ``pods`` replace rows of their id; ``gone`` and ``gone_pods`` take them
        away; ``turns`` are (session, span) of turns that ended; ``missed`` says that some of these
        were left out; ``complete`` comes once, when everything has been sent.
        """
        feed = self._feed
        frame: dict[str, Any] = {"at": round(at, 3)}
        sids = list(islice(self._sessions, ROWS_A_FRAME))
        for sid in sids:
            del self._sessions[sid]
        _put(frame, "sessions", "gone", sids, feed.sessions)
        names, self._pods = list(self._pods), {}
        _put(frame, "pods", "gone_pods", names, feed.pods)
        if self._gateway:
            self._gateway = False
            frame["gateway"] = orjson.Fragment(feed.gateway_row)
        if self._turns:
            frame["turns"] = [(sid, orjson.Fragment(span)) for sid, span in self._turns]
            self._turns = []
        if self._missed:
            self._missed = False
            frame["missed"] = True
        if not self.complete and not self._sessions:
            self.complete = frame["complete"] = True
        return frame


def _put(
    frame: dict[str, Any], there: str, gone: str, keys: list[str], rows: dict[str, bytes]
) -> None:
    found = [rows.get(key) for key in keys]
    if rendered := [orjson.Fragment(row) for row in found if row is not None]:
        frame[there] = rendered
    if missing := [key for key, row in zip(keys, found, strict=True) if row is None]:
        frame[gone] = missing


class Feed:
    """The rows as they stand, and who watches them."""

    def __init__(self, gateway: Gateway, max_rows: int = MAX_ROWS) -> None:
        self.gateway = gateway
        self.max_rows = max_rows
        self.watchers: set[Watcher] = set()
        self.sessions: dict[str, bytes] = {}
        """Rendered rows by session, the latest changed last."""
        self.pods: dict[str, bytes] = {}
        self.gateway_row = b"null"
        self._where = Whereabouts()
        self._open: set[str] = set()
        self._scanned_at = -inf
        self._ticking: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        """Be a watcher for as long as the context lasts. Raises `TooManyWatchers`."""
        if len(self.watchers) >= MAX_WATCHERS:
            raise TooManyWatchers
        watcher = Watcher(self)
        self.watchers.add(watcher)
        self.gateway.history.ended = self._turn_ended
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick(), name="inspector")
        try:
            yield watcher
        finally:
            self.watchers.discard(watcher)
            if not self.watchers:
                self._rest()

    def _rest(self) -> None:
        """Nobody watches any more: keep nothing."""
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        self.gateway.history.ended = None
        self.sessions, self.pods, self.gateway_row = {}, {}, b"null"
        self._where, self._open, self._scanned_at = Whereabouts(), set(), -inf
        self._ready = asyncio.Event()

    async def warm(self) -> None:
        """Until the rows stand for the first time since somebody watches."""
        await self._ready.wait()

    def _turn_ended(self, sid: str, span: bytes) -> None:
        for watcher in self.watchers:
            watcher.turn_ended(sid, span)

    async def _tick(self) -> None:
        while True:
            spent_s = 0.0
            try:
                spent_s = await self.refresh(time.monotonic())
            except Exception:
                self._scanned_at = -inf
                self.gateway.metrics.degraded.labels("inspector").inc()
                logger.exception("the inspector missed a change")
            self._ready.set()
            for watcher in self.watchers:
                if watcher.pending:
                    watcher.news.set()
            await asyncio.sleep(max(TICK_S, spent_s / TICK_SHARE))

    async def refresh(self, now: float) -> float:
        """Bring the rows up to date; returns the seconds of the event loop that it took. Others get
        their turn while it lasts."""
        spent_s = 0.0
        began = time.perf_counter()
        changed = self._changed(now)
        while changed:
            for session in islice(changed, ROWS_A_SLICE):
                self._show(session)
            del changed[:ROWS_A_SLICE]
            if changed:
                spent_s += time.perf_counter() - began
                await asyncio.sleep(0)
                began = time.perf_counter()
        self._forget()
        self._show_pods()
        return spent_s + time.perf_counter() - began

    def _changed(self, now: float) -> list[Session]:
        """Sessions whose row may differ from the one shown, the latest seen last: those seen since
        the last time, in flight now or then, or with another KV, place or hold than then."""
        sessions = self.gateway.sessions
        since = self._scanned_at
        seen = takewhile(lambda s: s.seen_at >= since, reversed(sessions))
        found = {session.sid: session for session in islice(seen, self.max_rows)}
        where = Whereabouts.of(self.gateway)
        in_flight = set(self.gateway.history.open)
        touched = in_flight | self._open
        if self.sessions:
            touched |= where.changed_since(self._where)
        self._where, self._open, self._scanned_at = where, in_flight, now
        for sid in touched - found.keys():
            session = sessions.by_sid(sid)
            if session is not None and (sid in self.sessions or sid in in_flight):
                found[sid] = session
        return sorted(found.values(), key=lambda session: session.seen_at)

    def _show(self, session: Session) -> None:
        sid = session.sid
        row = packed(session_row(self.gateway, session, self._where))
        before = self.sessions.get(sid)
        if row == before:
            return
        if before is not None:
            del self.sessions[sid]  # to the young end
        self.sessions[sid] = row
        for watcher in self.watchers:
            watcher.mark_session(sid)

    def _forget(self) -> None:
        """Take away the rows of sessions that are no more, and of the oldest beyond the bound."""
        known = self.gateway.sessions
        gone = [sid for sid in self.sessions if known.by_sid(sid) is None]
        surplus = len(self.sessions) - len(gone) - self.max_rows
        if surplus > 0:
            idle = (sid for sid in self.sessions if sid not in self._open)
            gone += islice((sid for sid in idle if known.by_sid(sid) is not None), surplus)
        for sid in gone:
            del self.sessions[sid]
            for watcher in self.watchers:
                watcher.mark_session(sid)

    def _show_pods(self) -> None:
        gateway = self.gateway
        kinds = self._where.kinds
        rows = {
            pod.name: orjson.dumps(pod_row(gateway, pod, kinds[pod.name]))
            for pod in gateway.fleet
            if pod.name in kinds
        }
        changed = {name for name, row in rows.items() if self.pods.get(name) != row}
        changed |= self.pods.keys() - rows.keys()
        self.pods = rows
        row = orjson.dumps(gateway_row(gateway))
        for watcher in self.watchers:
            for name in changed:
                watcher.mark_pod(name)
            if row != self.gateway_row:
                watcher.mark_gateway()
        self.gateway_row = row
