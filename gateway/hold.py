"""Turns that wait for a place, and how their clients wait without noticing more than the wait.

A client that streams gets the response's headers after a short quiet time, then an SSE comment
every ``heartbeat_s``: all clients pass comments over (`clients.md` §0.10), and no timeout of theirs
or of a load balancer between runs out. Only Codex counts events, not bytes, and ends a stream that
had none for 300 s: it gets an event of a type that it passes over, as OpenAI's own API sends it.
One that does not stream waits in silence, at most half of its own timeout, and is then asked to
come again; what it has waited counts for it then.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from gateway.admission import Ticket
from gateway.config import AdmissionSettings
from gateway.errors import GatewayError
from gateway.identity import Headers, client_kind

Send = Callable[[Any], Awaitable[None]]
HoldEnd = Literal[
    "released", "too_long", "queue_full", "client_gone", "no_pod", "shutdown", "failed", "observed"
]

HEARTBEAT: Final = b": held\n\n"
HEARTBEAT_EVENT: Final = b'event: keepalive\ndata: {"type":"keepalive"}\n\n'
"""For Codex alone: the SDKs' helpers want ``response.created`` to be the first event."""
STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_TIMEOUT_HEADERS: Final = (b"x-stainless-timeout", b"x-stainless-read-timeout")
"""Where the SDKs of OpenAI and Anthropic say how many seconds they wait for an answer's next
byte."""
NO_POD_GRACE_S: Final = 15.0
"""So long a held turn waits for a pod to come back when none serves its model."""
COMES_AGAIN_S: Final = 120.0
"""A turn that was sent away and comes again within this time keeps its age."""
MAX_SENT_AWAY: Final = 10_000


@dataclass(slots=True, frozen=True)
class Patience:
    """How long a client may be kept waiting, and how it is kept."""

    limit_s: float
    quiet_s: float
    """Before the first heartbeat; infinite for a client that does not stream."""
    heartbeat_s: float
    heartbeat: bytes = HEARTBEAT


def patience(settings: AdmissionSettings, headers: Headers, stream: bool) -> Patience:
    """The bounds for one turn, within the client's own timeout where it tells it."""
    timeout_s = _client_timeout_s(headers)
    if stream:
        beat_s = min(settings.heartbeat_s, timeout_s / 3)
        beat = HEARTBEAT_EVENT if client_kind(headers) == "codex" else HEARTBEAT
        return Patience(settings.max_hold_s, beat_s / 2, beat_s, beat)
    return Patience(min(settings.max_hold_unstreamed_s, timeout_s / 2), math.inf, math.inf)


def _client_timeout_s(headers: Headers) -> float:
    timeout_s = math.inf
    for name in _TIMEOUT_HEADERS:
        try:
            given_s = float(headers.get(name, b"inf"))
        except ValueError:
            continue
        if given_s > 0:
            timeout_s = min(timeout_s, given_s)
    return timeout_s


class HeldTurn:
    """The waiting side of one held turn; its ticket carries it as its context."""

    def __init__(self, send: Send) -> None:
        self.began = False
        """Whether the response's headers are out."""
        self._send = send
        self._freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def release(self) -> None:
        if not self._freed.done():
            self._freed.set_result(None)

    def refuse(self, error: GatewayError) -> None:
        """End the wait with an error."""
        if not self._freed.done():
            self._freed.set_exception(error)

    async def wait(self, patience: Patience) -> None:
        """Until the turn is released. Raises `GatewayError`: it was refused, or waited too long."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + patience.limit_s
        beats_at = loop.time() + patience.quiet_s
        while not self._freed.done():
            now = loop.time()
            if now >= ends_at:
                raise too_long(patience.limit_s)
            if now >= beats_at:
                await self._beat(patience.heartbeat)
                beats_at = now + patience.heartbeat_s
            await asyncio.wait({self._freed}, timeout=min(ends_at, beats_at) - loop.time())
        self._freed.result()

    async def _beat(self, heartbeat: bytes) -> None:
        if not self.began:
            self.began = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS}
            )
        await self._send({"type": "http.response.body", "body": heartbeat, "more_body": True})


class SentAway:
    """Turns that left the queue unserved, by session: what they have waited counts when they come
    again."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, tuple[float, bool, float]] = OrderedDict()

    def add(self, sid: str, arrived_at: float, spared: bool, now: float) -> None:
        self._left[sid] = (arrived_at, spared, now)
        self._left.move_to_end(sid)
        while len(self._left) > MAX_SENT_AWAY:
            self._left.popitem(last=False)

    def waited(self, sid: str, now: float) -> tuple[float, bool]:
        """When the session's turn first arrived if it left lately, else now, and whether it is
        spared."""
        arrived_at, spared, left_at = self._left.pop(sid, (now, False, now))
        return (arrived_at, spared) if now - left_at <= COMES_AGAIN_S else (now, False)


class NoPodWatch:
    """Since when no pod takes turns of a model for which some are held."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def look(self, held: Iterable[Ticket], able: Callable[[str], bool], now: float) -> list[Ticket]:
        """The turns that have waited for a pod to come back for `NO_POD_GRACE_S`."""
        by_model: dict[str, list[Ticket]] = {}
        for ticket in held:
            by_model.setdefault(ticket.ask.model, []).append(ticket)
        self._since = {model: self._since.get(model, now) for model in by_model if not able(model)}
        return [
            ticket
            for model, since in self._since.items()
            if now - since >= NO_POD_GRACE_S
            for ticket in by_model[model]
        ]


def too_long(limit_s: float) -> GatewayError:
    return GatewayError(
        503,
        "held_too_long",
        f"The pods are full: the turn was held for {limit_s:.0f} s. It keeps its place in the order"
        f" if it comes again within {COMES_AGAIN_S:.0f} s.",
        retry_after_s=1,
    )


def queue_full(spread: float) -> GatewayError:
    """``spread`` in [0, 1) keeps those that are sent away from coming back all at once."""
    return GatewayError(
        429,
        "queue_full",
        "The pods are full and so is the queue of turns that wait for them; try again shortly.",
        retry_after_s=5 + 25 * spread,
    )
