"""What happens between turns: gaps begin and end, pods come and go, time passes; who is told.

A turn calls in here at its turning points and nowhere waits for it; the callers survive its
faults.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from math import inf
from typing import Final

from gateway import hints
from gateway.admission import Admission, Ask, GapForecast, Ticket
from gateway.conductor import Conductor
from gateway.config import Settings
from gateway.dialects.turn import ToolCall
from gateway.errors import GatewayError, no_pod_ready, shutting_down
from gateway.fleet.fleet import Event, Fleet
from gateway.fleet.pod import Pod
from gateway.foresight import Foresight
from gateway.hold import HeldTurn, NoPodWatch, SentAway
from gateway.identity import Headers
from gateway.idle import IdleKind
from gateway.metrics import Metrics
from gateway.sessions import Session, SessionStore, Turn
from gateway.waits import Fixed, Wait, Waits, begun

logger = logging.getLogger("gateway.closed_loop")

AUDIT_S: Final = 5.0


class ClosedLoop:
    """Admission, forecasts and hints of one gateway, and what moves them."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        sessions: SessionStore,
        metrics: Metrics,
        foresight: Foresight,
    ) -> None:
        options = settings.admission
        self.fleet = fleet
        self.metrics = metrics
        self.admission = Admission(
            _release,
            options.mode,
            settings.routing.policy,
            options.max_held,
            options.age_bound_s,
        )
        self.conductor = Conductor(self.admission)
        self.foresight = foresight
        self.waits = Waits()
        self.sent_away = SentAway()
        self.open: set[Ticket] = set()
        """Tickets of turns that are not over."""
        self.waiting: set[Ticket] = set()
        """Held turns whose clients wait."""
        self._no_pod = NoPodWatch()
        self._audited_at = -inf
        self._hinting = settings.hints.enabled
        token = settings.hints.token
        self.hints = hints.HintSender(
            self._count_hints, token.get_secret_value() if token is not None else None
        )
        fleet.changed = self.pod_changed
        sessions.on_forget = self.session_forgotten

    def _count_hints(self, result: str, number: int) -> None:
        self.metrics.hints[result,].inc(number)

    # -- a turn ----------------------------------------------------------------------------------

    def gap_ended(self, turn: Turn, headers: Headers) -> list[float | None] | None:
        """The session is back: learn how its forecast came out. See `Foresight.came_back`."""
        self.waits.end(turn.session.sid)
        gap_s = turn.gap.seconds if turn.gap is not None else None
        return self.foresight.came_back(turn.session, gap_s, headers)

    def gap_begins(
        self,
        session: Session,
        calls: Sequence[ToolCall],
        idle_kind: IdleKind,
        pod: Pod,
        now: float,
    ) -> GapForecast | None:
        """The answer has said what it asks for: forecast the gap that follows and tell the pod.
        None for a session that will not come back, and for one of which another turn runs."""
        if session.in_flight > 1:
            return None
        forecast = self.foresight.fell_idle(session, calls, idle_kind)
        if idle_kind == "ended":
            self._tell(pod, session.sid, idle_kind, None)
            return None
        fixed = Fixed.of(forecast)
        self.waits.begin(begun(session.sid, pod.name, idle_kind, fixed, now))
        self._tell(pod, session.sid, idle_kind, fixed)
        return fixed

    def gap_is_off(self, session: Session) -> None:
        """The turn failed after all: the client may come again at once."""
        self.waits.end(session.sid)
        session.forecast = None

    def strike(self, ask: Ask, now: float) -> None:
        """Take a turn out of the queue, and its session's place back."""
        for ticket in [ticket for ticket in self.admission.held if ticket.ask is ask]:
            self.admission.end(ticket, now)
        self.admission.forget(ask.arrival.sid, now)

    def _tell(
        self, pod: Pod, sid: str, kind: IdleKind, forecast: Fixed | None, elapsed_s: float = 0.0
    ) -> None:
        if self._hinting:
            self.hints.send(pod, hints.reuse(sid, kind, forecast, elapsed_s))

    # -- sessions, pods, time --------------------------------------------------------------------

    def taken_over(self, sid: str, session: Session | None, began_at: float, now: float) -> None:
        """Another replica of the gateway has begun a turn of the session: its gap is over and its
        place here is free."""
        self.waits.end(sid)
        found = self.admission.place_of(sid)
        if found is not None and not found[1].running:
            self.admission.forget(sid, now)
        if session is None or session.in_flight:
            return
        since = session.idle_since
        gap_s = None if since is None else max(0.0, began_at - since)
        session.idle_since = session.idle_kind = None
        session.elsewhere = True
        self.foresight.came_back(session, gap_s, {})

    def session_forgotten(self, session: Session) -> None:
        """The store has let go of it, in whatever turn's way: must not raise."""
        now = time.monotonic()
        try:
            self.waits.end(session.sid)
            if session.elsewhere:
                return  # others go on with it
            for pod in self.fleet:
                pod.residency.drop(session.sid)
                if pod.name == session.pod and session.idle_kind != "ended":
                    self._tell(pod, session.sid, "ended", None)
            self.conductor.forget(session.sid, now)
            self.foresight.given_up(session, now)
        except Exception:
            self.metrics.degraded.labels("forget").inc()
            logger.exception("forgetting a session failed")

    def pod_changed(self, pod: Pod, event: Event) -> None:
        """Told by the fleet, in whatever turn's way: must not raise."""
        try:
            self._pod_changed(pod, event, time.monotonic())
        except Exception:
            self.metrics.degraded.labels("admission").inc()
            logger.exception("admission missed a change of pod %s", pod.name)

    def _pod_changed(self, pod: Pod, event: Event, now: float) -> None:
        if self.admission.mode == "off":
            return
        match event:
            case "lost" | "draining":
                self.admission.pod_lost(pod.name, now)
            case "restarted":
                self.conductor.restarted(pod, now)
            case "ready" if pod.takes_turns:
                self.admission.take_in([pod], now)
                self.admission.pods_changed(now)
            case "capacity":
                self.admission.pods_changed(now)

    def tick(self, now: float) -> None:
        """To be called about twice a second."""
        try:
            self.admission.tick(now)
        except Exception:
            for ticket in self.waiting:
                _release(ticket)  # as plain relays
            raise
        for ticket in self.waiting:
            if not ticket.held:
                _release(ticket)  # a fault took it out of the queue unnoticed
        for ticket in self._no_pod.look(
            self.waiting, lambda model: bool(self.fleet.able(model)), now
        ):
            _refuse(ticket, no_pod_ready(ticket.ask.model))
        if now - self._audited_at >= AUDIT_S:
            self._audited_at = now
            self.audit(now)
        self.waits.outlived(now, lambda wait: self._tell_again(wait, now))

    def audit(self, now: float) -> None:
        """Undo what a fault has left in admission's books: turns held and places in use that are no
        open turn's."""
        for ticket in [ticket for ticket in self.admission.held if ticket not in self.open]:
            self.metrics.degraded.labels("audit").inc()
            self.admission.end(ticket, now)
        running = Counter(ticket.place for ticket in self.open)
        for book in list(self.admission.books.values()):
            for place in [p for p in book.places.values() if p.running > running[p]]:
                self.metrics.degraded.labels("audit").inc()
                self.admission.forget(place.sid, now)

    def _tell_again(self, wait: Wait, now: float) -> None:
        pod = self.fleet.pods.get(wait.pod)
        if pod is not None:
            self._tell(pod, wait.sid, wait.idle_kind, wait.forecast, now - wait.since)

    def shut_down(self) -> None:
        """Held turns are told to come again; clients that stream are told in their stream."""
        for ticket in self.waiting:
            _refuse(ticket, shutting_down())


def _release(ticket: Ticket) -> None:
    if isinstance(ticket.context, HeldTurn):
        ticket.context.release()


def _refuse(ticket: Ticket, error: GatewayError) -> None:
    """End a held turn's wait with an error; its task closes the ticket."""
    if isinstance(ticket.context, HeldTurn):
        ticket.context.refuse(error)
