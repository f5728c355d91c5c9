"""What the gateway knows, as JSON: ``/v1/cachewise/sessions``, ``/sessions/{id}``, ``/pods``.

For operators, behind the admin token when one is set. No text of a conversation, no key and no
argument is in it: names of tools, counts, times.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from math import inf
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway.access import Unauthorized
from gateway.admission import Book
from gateway.errors import Dialect, GatewayError, render
from gateway.fleet.pod import Pod
from gateway.gateway import Gateway
from gateway.sessions import Gap, Session

MAX_SESSIONS_LISTED = 1000

Handler = Callable[[Request], Awaitable[ASGIApp]]


def admin_only(gateway: Gateway, handler: Handler) -> Handler:
    """``handler``, for whoever presents the admin token (for everyone where none is set)."""

    async def guarded(request: Request) -> ASGIApp:
        try:
            gateway.access.admin(request.scope["headers"])
        except Unauthorized as error:
            return error_response(GatewayError(401, "invalid_admin_token", str(error)))
        return await handler(request)

    return guarded


def error_response(error: GatewayError, family: Dialect = "openai") -> Response:
    status, headers, body = render(error, family)
    return Response(body, status, {n.decode(): v.decode() for n, v in headers})


def json_response(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


class Api:
    """The handlers, over one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def sessions(self, request: Request) -> Response:
        """Sessions, most recently seen first. Query: ``limit``, ``state``, ``group``."""
        query = request.query_params
        text = query.get("limit", "100")
        if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_SESSIONS_LISTED:
            return error_response(
                GatewayError(
                    400,
                    "invalid_request",
                    f"limit: {text[:20]!r}; allowed: a whole number from 1 to"
                    f" {MAX_SESSIONS_LISTED}",
                )
            )
        state = query.get("state")
        if state not in (None, "running", "idle", "ended"):
            return error_response(
                GatewayError(
                    400, "invalid_request", f"state: {state[:20]!r}; allowed: running, idle, ended"
                )
            )
        now = time.monotonic()
        found = []
        for session in reversed(self.gateway.sessions):
            if state is not None and session.state != state:
                continue
            if "group" in query and session.group != query["group"]:
                continue
            found.append(self._session(session, now))
            if len(found) == int(text):
                break
        return json_response({"object": "list", "total": len(self.gateway.sessions), "data": found})

    async def session(self, request: Request) -> Response:
        """One session, with its latest gaps and the explanation of its latest route."""
        session = self.gateway.sessions.by_sid(request.path_params["sid"])
        if session is None:
            return error_response(
                GatewayError(404, "session_not_found", "No session of this id is known.")
            )
        now = time.monotonic()
        detail = self._session(session, now)
        detail["gaps"] = [self._gap(gap) for gap in session.gaps]
        detail["forecast"] = self._forecast(session, now, curve=True)
        detail["route"] = session.decision.explain() if session.decision is not None else None
        detail["resident_tokens"] = {
            pod.name: tokens
            for pod in self.gateway.fleet
            if (tokens := pod.residency.tokens(session.sid))
        }
        return json_response(detail)

    async def pods(self, request: Request) -> Response:
        """The pods: health, models, capabilities, load, what their caches are believed to hold."""
        data = [self._pod(pod) for pod in self.gateway.fleet]
        return json_response({"object": "list", "data": data})

    async def drain(self, request: Request) -> Response:
        """POST: give the pod no more turns; its sessions move at their next one. DELETE: again."""
        pod = self.gateway.fleet.pods.get(request.path_params["name"])
        if pod is None:
            return error_response(
                GatewayError(404, "pod_not_found", "No pod of this name is configured.")
            )
        self.gateway.fleet.drain(pod, request.method == "POST")
        return json_response(self._pod(pod))

    def _pod(self, pod: Pod) -> dict[str, Any]:
        book = self.gateway.loop.admission.books.get(pod.name)
        return _pod(pod) | {
            "queued_hints": self.gateway.loop.hints.queued(pod.name),
            "admission": _book(book) if book is not None else None,
        }

    def _place(self, sid: str) -> dict[str, Any] | None:
        found = self.gateway.loop.admission.place_of(sid)
        if found is None:
            return None
        pod, place = found
        return {
            "pod": pod.name,
            "lane": place.ask.lane,
            "tokens": place.tokens,
            "since": self._time(place.since),
        }

    def _held(self, sid: str, now: float) -> dict[str, Any] | None:
        admission = self.gateway.loop.admission
        ticket = next((t for t in admission.held if t.ask.arrival.sid == sid), None)
        if ticket is None:
            return None
        return {
            "since": self._time(ticket.arrived_at),
            "seconds": round(now - ticket.arrived_at, 3),
            "reason": admission.why_held(ticket),
            "soonest_at": ticket.decision.pod.name,
            "tokens": ticket.ask.tokens,
            "expected_wait_seconds": round(ticket.expected_wait_s, 3),
            "priority": ticket.ask.priority,
            "due": now >= admission.due_at(ticket),
        }

    def _time(self, monotonic_s: float | None) -> str | None:
        if monotonic_s is None:
            return None
        at = datetime.fromtimestamp(monotonic_s + self.gateway.wall_minus_monotonic_s, UTC)
        return at.isoformat(timespec="milliseconds")

    def _gap(self, gap: Gap) -> dict[str, Any]:
        return {
            "ended_at": self._time(gap.at),
            "seconds": round(gap.seconds, 4),
            "kind": gap.kind,
            "tools": list(gap.tools),
        }

    @staticmethod
    def _forecast(session: Session, now: float, curve: bool = False) -> dict[str, Any] | None:
        """When an idle session is expected back, as of now."""
        forecast, since = session.forecast, session.idle_since
        if forecast is None or since is None or session.in_flight:
            return None
        elapsed_s = max(0.0, now - since)
        shown: dict[str, Any] = {
            "p_return": round(forecast.p_return_given(elapsed_s), 4),
            "expected_remaining_s": round(forecast.expected_remaining(elapsed_s), 3),
            "remaining_s": {
                f"p{round(100 * p)}": round(forecast.quantile(p, elapsed_s), 3)
                for p in (0.1, 0.5, 0.9)
            },
        }
        if curve:
            shown["survival"] = [[round(t, 4), round(p, 5)] for t, p in forecast.curve()]
        return shown

    def _session(self, session: Session, now: float) -> dict[str, Any]:
        usage = session.usage
        idle = session.idle_since is not None and not session.in_flight
        return {
            "id": session.sid,
            "group": session.group,
            "parent": session.parent,
            "forked_from": session.forked_from,
            "tenant": session.tenant,
            "client": session.client,
            "class": session.request_class,
            "identified_by": session.source,
            "model": session.model,
            "pod": session.pod,
            "state": session.state,
            "in_flight": session.in_flight,
            "idle_kind": session.idle_kind if idle else None,
            "idle_seconds": round(now - session.idle_since, 3)
            if idle and session.idle_since is not None
            else None,
            "waiting_for": list(session.waiting_for) if idle else [],
            "in_background": len(session.background),
            "forecast": self._forecast(session, now),
            "turns": session.turns,
            "tool_calls": session.tool_calls,
            "created_at": self._time(session.created_at),
            "seen_at": self._time(session.seen_at),
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "cached_tokens": usage.cached_tokens if usage else None,
            "output_tokens": usage.output_tokens if usage else None,
            "prefix_breaks": session.breaks,
            "prefix_lost_tokens": session.lost_tokens,
            "last_gap": self._gap(session.gaps[-1]) if session.gaps else None,
            "place": self._place(session.sid),
            "held": self._held(session.sid, now) if session.in_flight else None,
        }


def _book(book: Book) -> dict[str, Any]:
    known = book.budget_tokens < inf
    return {
        "sessions": len(book.places),
        "tokens": book.tokens,
        "aside_tokens": book.aside_tokens,
        "budget_tokens": round(book.budget_tokens) if known else None,
        "reserve": round(book.reserve, 4),
        "regret": round(book.regret, 4),
        "hold_horizon_seconds": round(book.horizon_s, 3) if known else None,
    }


def _pod(pod: Pod) -> dict[str, Any]:
    probed = pod.probed
    load = probed.load if probed else None
    return {
        "name": pod.name,
        "url": pod.url,
        "rank": pod.rank,
        "ready": pod.ready,
        "trouble": pod.trouble,
        "withheld": pod.withheld,
        "draining": pod.draining,
        "models": [{"id": name, "max_model_len": n} for name, n in pod.models.items()],
        "version": probed.version if probed else None,
        "capabilities": asdict(probed.capabilities) if probed else {},
        "in_flight_turns": pod.in_flight,
        "queued_prefill_tokens": pod.queued_prefill_tokens,
        "prefill_tokens_per_second": round(pod.rate.tokens_per_s, 1),
        "resident_tokens": pod.residency.resident_tokens,
        "kv_events": pod.residency.ledger.live if pod.residency.ledger is not None else None,
        "resident_sessions": len(pod.residency),
        "kv_capacity_tokens": pod.residency.capacity_tokens,
        "kv_usable_share": round(pod.residency.usable_share, 3),
        "kv_usage_ratio": load.kv_usage_ratio if load else None,
        "running_requests": load.running_requests if load else None,
        "waiting_requests": load.waiting_requests if load else None,
        "warnings": list(probed.warnings) if probed else [],
    }
