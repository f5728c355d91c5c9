"""Sessions and pods as the inspector's rows: JSON objects without what is absent or zero.

Names, counts and times, no text of a conversation. Times are seconds of the epoch, none is an age,
so that a row changes only when what it tells does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final

from gateway.admission import Ticket
from gateway.fleet.pod import Pod
from gateway.gateway import Gateway
from gateway.sessions import Session
from gateway.turn_history import NAME_CHARS, TOOLS_KEPT, begun_span

IDLE_KINDS: Final = ("tool", "human", "background", "ended")
MODEL_CHARS: Final = 128


@dataclass(slots=True)
class Whereabouts:
    """Where sessions have KV and places, by session, and what of each pod's KV is whose.

    One pass over what pods hold: O(resident chains + places + held turns).
    """

    resident: dict[str, dict[str, int]] = field(default_factory=dict)
    """Resident tokens by pod."""
    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Pod and tokens of each place."""
    held: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Reason and soonest pod of each session of which a turn is held."""
    tickets: dict[str, Ticket] = field(default_factory=dict)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    """By pod: resident tokens by the state of their session."""

    @classmethod
    def of(cls, gateway: Gateway) -> Whereabouts:
        found = cls()
        admission = gateway.loop.admission
        for ticket in gateway.loop.waiting:
            sid = ticket.ask.arrival.sid
            found.held[sid] = admission.why_held(ticket), ticket.decision.pod.name
            found.tickets[sid] = ticket
        for pod in gateway.fleet:
            kinds = found.kinds[pod.name] = Counter()
            for sid, tokens in pod.residency.chains():
                found.resident.setdefault(sid, {})[pod.name] = tokens
                session = gateway.sessions.by_sid(sid)
                if session is not None:
                    kinds["held" if sid in found.held else state_of(session)] += tokens
        for book in admission.books.values():
            for sid, place in book.places.items():
                found.places[sid] = book.pod.name, place.tokens
        return found

    def changed_since(self, before: Whereabouts) -> set[str]:
        """Sessions of which any of it differs."""
        changed: set[str] = set()
        for now, then in (
            (self.resident, before.resident),
            (self.places, before.places),
            (self.held, before.held),
        ):
            changed.update(sid for sid, value in now.items() if then.get(sid) != value)
            changed.update(then.keys() - now.keys())
        return changed


def state_of(session: Session) -> str:
    """``running``, or why it is idle; ``idle`` where that is not known (its turn failed)."""
    return "running" if session.in_flight else session.idle_kind or "idle"


def session_row(gateway: Gateway, session: Session, where: Whereabouts) -> dict[str, Any]:
    """One session as it stands."""
    wall_s = gateway.wall_minus_monotonic_s
    sid = session.sid
    state = state_of(session)
    row: dict[str, Any] = {
        "id": sid,
        "client": session.client,
        "model": session.model[:MODEL_CHARS],
        "tenant": session.tenant,
        "class": session.request_class,
        "state": state,
        "turns": session.turns,
        "at": round(session.created_at + wall_s, 3),
        "seen": round(session.seen_at + wall_s, 3),
    }
    maybe = {
        "parent": session.parent,
        "fork": session.forked_from,
        "pod": session.pod,
        "calls": session.tool_calls,
        "bg": len(session.background),
        "breaks": session.breaks,
        "broken": session.lost_tokens,
        "kv": where.resident.get(sid),
        "place": where.places.get(sid),
    }
    row |= {name: value for name, value in maybe.items() if value}
    if session.usage is not None:
        usage = session.usage
        row["used"] = [usage.prompt_tokens, usage.cached_tokens, usage.output_tokens]
    flows = gateway.history.open.get(sid)
    if flows:
        row["now"] = [begun_span(flow, number, wall_s) for number, flow in flows.items()]
    if session.in_flight:
        if sid in where.held:
            row["state"] = "held"
            row["held"] = _held(gateway, where.tickets[sid], where.held[sid], wall_s)
        return row
    if session.waiting_for:
        row["tools"] = [name[:NAME_CHARS] for name in session.waiting_for[:TOOLS_KEPT]]
    if session.idle_since is not None:
        row["since"] = round(session.idle_since + wall_s, 3)
        wait = gateway.loop.waits.of(sid)
        if wait is not None:
            row["q"] = wait.forecast.stated()
            row["p"] = round(wait.forecast.p_return, 3)
    return row


def _held(gateway: Gateway, ticket: Ticket, why: tuple[str, str], wall_s: float) -> dict[str, Any]:
    held: dict[str, Any] = {
        "since": round(ticket.arrived_at + wall_s, 3),
        "reason": why[0],
        "pod": why[1],
        "tokens": ticket.ask.tokens,
    }
    due_at = gateway.loop.admission.due_at(ticket)
    if due_at < inf:
        held["due"] = round(due_at + wall_s)
    return held


def pod_row(gateway: Gateway, pod: Pod, kinds: Counter[str]) -> dict[str, Any]:
    """One pod as it stands. ``resident`` are believed tokens by the state of their session."""
    probed = pod.probed
    load = probed.load if probed is not None else None
    row: dict[str, Any] = {
        "name": pod.name,
        "status": status_of(pod),
        "models": list(pod.models)[:4],
        "in_flight": pod.in_flight,
        "queued_tokens": pod.queued_prefill_tokens,
        "rate": round(pod.rate.tokens_per_s),
        "resident": dict(kinds),
        "resident_tokens": pod.residency.resident_tokens,
        "sessions": len(pod.residency),
        "capacity": pod.residency.capacity_tokens,
        "usable": round(pod.residency.usable_share, 3),
        "queued_hints": gateway.loop.hints.queued(pod.name),
    }
    if probed is not None:
        row |= {
            "version": probed.version,
            "hints": probed.capabilities.kv_hints,
            "session_id": probed.capabilities.session_id,
            "embedded": probed.capabilities.embedded,
            "warnings": list(probed.warnings),
        }
    if load is not None:
        row |= {
            "usage": None if load.kv_usage_ratio is None else round(load.kv_usage_ratio, 3),
            "running": load.running_requests,
            "waiting": load.waiting_requests,
        }
    book = gateway.loop.admission.books.get(pod.name)
    if book is not None:
        row |= {
            "places": len(book.places),
            "place_tokens": book.tokens,
            "aside_tokens": book.aside_tokens,
            "reserve": round(book.reserve, 3),
            "regret": round(book.regret, 4),
        }
        if book.budget_tokens < inf:
            row["budget"] = round(book.budget_tokens)
            row["horizon_s"] = round(book.horizon_s, 1)
    return row


def status_of(pod: Pod) -> str:
    """``ready``, ``draining``, ``withheld`` (discovery says it is unfit), ``lost`` or ``new`` (not
    ready yet)."""
    if not pod.ready:
        return "new" if pod.probed is None else "lost"
    if pod.draining:
        return "draining"
    return "withheld" if pod.withheld else "ready"


def gateway_row(gateway: Gateway) -> dict[str, Any]:
    """What is true of the gateway as a whole."""
    settings = gateway.settings
    return {
        "mode": settings.admission.mode,
        "policy": settings.routing.policy,
        "sessions": len(gateway.sessions),
        "held": len(gateway.loop.waiting),
        "draining": gateway.draining,
    }
