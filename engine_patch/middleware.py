"""Hints over HTTP on a vLLM pod, and the patch's metrics on its /metrics.

Launch vLLM with `--middleware engine_patch.middleware.KvHintsMiddleware`. The routes of
`endpoints` are added behind vLLM's own authentication; `CACHEWISE_HINTS_TOKEN`, if set, must also
be sent as `X-Kv-Hints-Token`, since a hint moves others' cache.

A generation request may carry the same envelope in its body's `kv_hints`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import msgspec
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_patch import metrics, vllm_seam
from engine_patch.endpoints import PATH, TOKEN_HEADER, HintEndpoints, error_answer, malformed
from engine_patch.hints import HintError, parse_field

GENERATION_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)
# A scrape gets vLLM's metrics without ours rather than wait longer for an engine in a long step.
METRICS_TIMEOUT_S = 2.0

_FIELD = b'"kv_hints"'

_request_hints: ContextVar[Any] = ContextVar("kv_hints", default=None)

logger = logging.getLogger("vllm.engine_patch")


class _Body(msgspec.Struct):
    kv_hints: msgspec.Raw = msgspec.Raw(b"null")


class Engine:
    """The engine cores behind one API server."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._patched = not vllm_seam.switched_off()

    async def call(self, operation: str, argument: str = "") -> list[dict[str, Any]]:
        """Ask every engine core, one for each data-parallel rank.

        Cores without the patch are one entry that says so; they are asked only once, since vLLM
        logs a traceback for a call that a core does not know.
        """
        if not self._patched:
            return [{"active": False}]
        core = self._client.engine_core
        try:
            answers = await core.call_utility_all_async("cachewise", operation, argument)
        except Exception as error:
            if "has no attribute 'cachewise'" not in str(error):
                raise
            self._patched = False
            return [{"active": False}]
        return [json.loads(answer) for answer in answers]

    def take_hints(self) -> None:
        """Make `generate` pass on the hints of the request being served. Idempotent."""
        generate = self._client.generate
        if getattr(generate, "takes_kv_hints", False):
            return

        def with_hints(*args: Any, **kwargs: Any) -> Any:
            hints = _request_hints.get()
            if hints is not None and kwargs.get("kv_hints") is None:
                kwargs["kv_hints"] = hints
            return generate(*args, **kwargs)

        with_hints.takes_kv_hints = True  # type: ignore[attr-defined]
        self._client.generate = with_hints


class KvHintsMiddleware:
    """Pure ASGI; adds its routes to the application, and itself to vLLM's, when it starts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.endpoints = HintEndpoints(
            lambda request: self._engine(request.scope).call,
            os.environ.get("CACHEWISE_HINTS_TOKEN") or None,
        )
        self._known_engine: Engine | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            self._install(scope["app"].router)
        elif scope["type"] == "http" and scope["method"] == "GET":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path.rstrip("/") == "/metrics":
                await self._metrics(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _engine(self, scope: Scope) -> Engine:
        if self._known_engine is None:
            self._known_engine = Engine(scope["app"].state.engine_client)
        return self._known_engine

    def _install(self, router: Router) -> None:
        """Take hints around vLLM's generation routes, where a request has been authenticated."""
        found = set()
        for route in router.routes:
            if isinstance(route, Route) and route.path == PATH:
                return  # started before
            if (
                isinstance(route, Route)
                and route.path in GENERATION_PATHS
                and "POST" in (route.methods or ())
            ):
                found.add(route.path)
                if not vllm_seam.switched_off():
                    route.app = HintedRoute(route.app, self.endpoints, self._engine)
        if missing := GENERATION_PATHS - found:
            logger.warning("kv_hints are ignored at %s: no such route", ", ".join(sorted(missing)))
        router.routes[:0] = self.endpoints.routes()

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Append the patch's metrics to vLLM's, which are asked for as plain text."""
        ours = b""
        try:
            async with asyncio.timeout(METRICS_TIMEOUT_S):
                answers = await self._engine(scope).call("metrics")
            ours = metrics.render(answers)
        except Exception as error:  # vLLM's own metrics matter more than ours
            logger.warning("no CacheWise metrics in this scrape: %r", error)
        negotiated = (b"accept", b"accept-encoding")
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in negotiated]
        start: Message | None = None

        async def send_with_ours(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                length = (b"content-length",)
                kept = [(k, v) for k, v in start.get("headers", []) if k.lower() not in length]
                await send({**start, "headers": kept})
                start = None
            if message["type"] == "http.response.body" and not message.get("more_body"):
                message = {**message, "body": message.get("body", b"") + ours}
            await send(message)

        await self.app({**scope, "headers": headers}, receive, send_with_ours)


class HintedRoute:
    """One of vLLM's generation routes: takes `kv_hints` from the body and passes it on unchanged.

    The body is held as the messages in which it came, which vLLM's own reading holds as well; it
    is copied and parsed only if it names the field.
    """

    def __init__(
        self, app: ASGIApp, endpoints: HintEndpoints, engine: Callable[[Scope], Engine]
    ) -> None:
        self.app = app
        self.endpoints = endpoints
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        messages, named = await _read(receive)
        hints = None
        if named:
            try:
                hints = _from_body(b"".join(m.get("body", b"") for m in messages))
            except HintError as error:
                await malformed(error)(scope, receive, send)
                return

        async def receive_again() -> Message:
            return messages.popleft() if messages else await receive()

        if hints is None:
            await self.app(scope, receive_again, send)
            return
        if not self.endpoints.may_hint(scope["headers"]):
            await error_answer(403, f"{TOKEN_HEADER} is missing or wrong")(scope, receive, send)
            return
        self._engine(scope).take_hints()
        token = _request_hints.set(hints)
        try:
            await self.app(scope, receive_again, send)
        finally:
            _request_hints.reset(token)


async def _read(receive: Receive) -> tuple[deque[Message], bool]:
    """The messages of a request's body, and whether it is complete and names `kv_hints`."""
    messages: deque[Message] = deque()
    named = False
    tail = b""
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":  # the client has left; vLLM is to see it
            return messages, False
        chunk = message.get("body", b"")
        overlap = len(_FIELD) - 1
        named = named or _FIELD in chunk or _FIELD in tail + chunk[:overlap]
        tail = (tail + chunk[-overlap:])[-overlap:]
        if not message.get("more_body"):
            return messages, named


def _from_body(body: bytes) -> Any:
    """vLLM's envelope from a request body, checked; None if the body has none (or is no JSON)."""
    try:
        raw = bytes(msgspec.json.decode(body, type=_Body).kv_hints)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if raw == b"null":
        return None
    parse_field(raw)
    from vllm.v1.kv_hints import KvHintsEnvelope

    return msgspec.json.decode(raw, type=KvHintsEnvelope)
