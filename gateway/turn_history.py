"""The latest turns of each session: what happened when, and why; for the inspector.

A turn that is over is kept as two pieces of JSON, made once and then only copied: its *span*, which
is what a timeline draws, and its *reasons*: routing, hold, what was lost. Names, counts and times
only. Bounded: of the latest `TOTAL_KEPT` turns, the latest `TURNS_KEPT` of each session; a session
that is forgotten leaves its turns to that bound. All methods are O(1) but those that read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, Final

import orjson

from gateway.admission import Admission, Ticket
from gateway.dialects.turn import TurnOutcome
from gateway.routing import Decision
from gateway.waits import Fixed

if TYPE_CHECKING:
    from gateway.turns import TurnFlow

TURNS_KEPT: Final = 48
"""Of one session."""
TOTAL_KEPT: Final = 20_000
CANDIDATES_KEPT: Final = 8
"""Pods that were weighed, the cheapest and the chosen one, of one turn."""
TOOLS_KEPT: Final = 8
NAME_CHARS: Final = 64


@dataclass(slots=True, eq=False)
class Kept:
    """A turn that is over. ``span`` and ``reasons`` are JSON objects."""

    sid: str
    span: bytes
    reasons: bytes
    dropped: bool = False


class TurnHistory:
    """Turns of all sessions: those in flight, and the latest that are over."""

    def __init__(
        self,
        wall_minus_monotonic_s: float,
        turns_kept: int = TURNS_KEPT,
        total_kept: int = TOTAL_KEPT,
    ) -> None:
        self.open: dict[str, dict[int, TurnFlow]] = {}
        """Turns in flight, by session and number."""
        self.ended: Callable[[str, bytes], None] | None = None
        """Called with the session and the span of each turn that is over, if anybody watches."""
        self._wall_s = wall_minus_monotonic_s
        self._turns_kept = turns_kept
        self._total_kept = total_kept
        self._kept: dict[str, deque[Kept]] = {}
        self._order: deque[Kept] = deque()

    def __len__(self) -> int:
        """Turns kept."""
        return sum(map(len, self._kept.values()))

    def begin(self, flow: TurnFlow) -> None:
        """A turn of a known session is on its way; `end` must follow."""
        if flow.turn is not None:
            self.open.setdefault(flow.turn.session.sid, {})[flow.turn.number] = flow

    def end(self, flow: TurnFlow, now: float, outcome: TurnOutcome | None) -> None:
        """The turn is over, in whatever way. Idempotent."""
        turn = flow.turn
        if turn is None:
            return
        sid = turn.session.sid
        flows = self.open.get(sid)
        if flows is None or flows.pop(turn.number, None) is None:
            return
        if not flows:
            del self.open[sid]
        kept = Kept(
            sid,
            packed(_span(flow, now, outcome, self._wall_s)),
            packed(reasons(flow)),
        )
        self._keep(kept)
        if self.ended is not None:
            self.ended(sid, kept.span)

    def _keep(self, kept: Kept) -> None:
        turns = self._kept.get(kept.sid)
        if turns is None:
            turns = self._kept[kept.sid] = deque()
        turns.append(kept)
        self._order.append(kept)
        if len(turns) > self._turns_kept:
            _drop(turns.popleft())
        while len(self._order) > self._total_kept:
            oldest = self._order.popleft()
            if not oldest.dropped:
                turns = self._kept[oldest.sid]
                turns.popleft()  # within a session the oldest is the first
                if not turns:
                    del self._kept[oldest.sid]

    def spans(self, sid: str) -> list[orjson.Fragment]:
        """The session's turns that are over, oldest first."""
        return [orjson.Fragment(kept.span) for kept in self._kept.get(sid, ())]

    def explained(self, sid: str) -> list[dict[str, Any]]:
        """All turns of the session with their reasons, newest first; those in flight as they stand,
        without an end."""
        running = [
            {
                "span": begun_span(flow, number, self._wall_s),
                "reasons": reasons(flow),
            }
            for number, flow in self.open.get(sid, {}).items()
        ]
        over = [
            {"span": orjson.Fragment(kept.span), "reasons": orjson.Fragment(kept.reasons)}
            for kept in self._kept.get(sid, ())
        ]
        return [*reversed(running), *reversed(over)]


def packed(value: dict[str, Any]) -> bytes:
    """JSON to keep: a copy, as what orjson returns holds on to a buffer of 4 kB."""
    return bytes(memoryview(orjson.dumps(value)))


def _drop(kept: Kept) -> None:
    kept.dropped = True
    kept.span = kept.reasons = b""


def begun_span(flow: TurnFlow, number: int, wall_s: float) -> dict[str, Any]:
    """A turn in flight. ``at`` and ``since`` are seconds of the epoch."""
    phase, since = phase_of(flow)
    span: dict[str, Any] = {
        "n": number,
        "at": round(flow.started_at + wall_s, 3),
        "phase": phase,
        "since": round(since + wall_s, 3),
    }
    if flow.held_s:
        span["held"] = round(flow.held_s, 3)
    if flow.ticket is not None:
        span["pod"] = flow.ticket.decision.pod.name
    _add_beginning(span, flow)
    return span


def phase_of(flow: TurnFlow) -> tuple[str, float]:
    """Where a turn in flight is, and since when: ``arriving``, ``held``, ``prefill``, ``decode``
    (its answer has begun)."""
    if flow.first_byte_at is not None:
        return "decode", flow.first_byte_at
    if flow.pod_run is not None:
        return "prefill", flow.pod_run.started_at
    if flow.ticket is not None and flow.ticket in flow.gateway.loop.waiting:
        return "held", max(flow.started_at, flow.ticket.arrived_at)
    return "arriving", flow.started_at


def _span(flow: TurnFlow, now: float, outcome: TurnOutcome | None, wall_s: float) -> dict[str, Any]:
    """What a timeline draws of a turn. Seconds; ``at`` is of the epoch, ``held``, ``first`` (the
    first byte) and ``s`` (the end) count from there. ``kv`` is prompt, cached and output tokens;
    ``q`` is the forecast (`Fixed.stated`) of the gap that follows, ``p`` is P(return)."""
    turn = flow.turn
    assert turn is not None
    session = turn.session
    span: dict[str, Any] = {
        "n": turn.number,
        "at": round(flow.started_at + wall_s, 3),
        "s": round(now - flow.started_at, 3),
        "end": flow.outcome,
    }
    if flow.held_s:
        span["held"] = round(flow.held_s, 3)
    if flow.first_byte_at is not None:
        span["first"] = round(flow.first_byte_at - flow.started_at, 3)
    if flow.decision is not None:
        span["pod"] = flow.decision.pod.name
    _add_beginning(span, flow)
    if flow.losses:
        span["lost"] = flow.losses
    if outcome is not None:
        if outcome.usage is not None:
            usage = outcome.usage
            span["kv"] = [usage.prompt_tokens, usage.cached_tokens, usage.output_tokens]
        if outcome.tool_calls:
            span["tools"] = [call.name[:NAME_CHARS] for call in outcome.tool_calls[:TOOLS_KEPT]]
    if session.idle_kind is not None and not session.in_flight:
        span["next"] = session.idle_kind
    if isinstance(flow.forecast, Fixed):
        span["q"] = flow.forecast.stated()
        span["p"] = round(flow.forecast.p_return, 3)
    return span


def _add_beginning(span: dict[str, Any], flow: TurnFlow) -> None:
    """What was known when the turn came."""
    turn = flow.turn
    assert turn is not None
    if turn.gap is not None:
        span["gap"] = turn.gap.kind
    if turn.change.cause is not None:
        span["break"] = [turn.change.cause, turn.lost_tokens]


def reasons(flow: TurnFlow) -> dict[str, Any]:
    """Why a turn went where it went, when it went, and with what of its KV."""
    turn = flow.turn
    assert turn is not None
    found: dict[str, Any] = {
        "class": turn.request_class,
        "identified_by": turn.identified_by,
        "prompt_tokens": turn.prompt_tokens,
        "same_tokens": turn.same_tokens,
        "attempts": flow.attempts,
        "status": flow.status,
        "outcome": flow.outcome,
    }
    if turn.gap is not None:
        found["gap_s"] = round(turn.gap.seconds, 3)
    decision = flow.decision
    if decision is None and flow.ticket is not None and flow.hold is None:
        decision = flow.ticket.decision
    if decision is not None:
        found["route"] = explained(decision)
    if flow.hold is not None:
        found["hold"] = flow.hold | {"seconds": round(flow.held_s, 3)}
    return found


def explained(decision: Decision) -> dict[str, Any]:
    """`Decision.explain`, with no more than `CANDIDATES_KEPT` pods; ``weighed`` says how many there
    were."""
    weighed = decision.candidates
    if len(weighed) > CANDIDATES_KEPT:
        cheapest = sorted(weighed, key=lambda c: (c.pod is not decision.pod, c.total_s))
        decision = replace(decision, candidates=tuple(cheapest[:CANDIDATES_KEPT]))
    return decision.explain() | {"weighed": len(weighed)}


def held_for(ticket: Ticket, admission: Admission) -> dict[str, Any]:
    """Why a turn is held, as it stands when the hold begins, and the pods that were weighed."""
    ask = ticket.ask
    name = ticket.decision.pod.name
    found: dict[str, Any] = {
        "reason": admission.why_held(ticket),
        "soonest_at": name,
        "priority": ask.priority,
        "lane": ask.lane,
        "expected_wait_s": round(ticket.expected_wait_s, 3),
        "others_held": max(0, admission.held_count - 1),
        "offered": explained(ticket.decision),
    }
    book = admission.books.get(name)
    if book is not None and book.budget_tokens < inf:
        found |= {
            "needed_tokens": book.additional_tokens(ask),
            "free_tokens": max(0, round(book.budget_tokens - book.tokens)),
            "budget_tokens": round(book.budget_tokens),
            "sessions_admitted": len(book.places),
        }
    return found
