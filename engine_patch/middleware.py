"""Hints over HTTP on a vLLM pod, and the patch's metrics on its /metrics.

Launch vLLM with `--middleware engine_patch.middleware.KvHintsMiddleware`. The routes of
`endpoints` are added behind vLLM's own authentication; `CACHEWISE_HINTS_TOKEN`, if set, must also
be sent as `X-Kv-Hints-Token`, since a hint moves others' cache.

A generation request may carry the same envelope in its body's `kv_hints`.
"""

from __future__ import annotations

import contextlib
import json
import os
from contextvars import ContextVar
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_patch import metrics
from engine_patch.endpoints import TOKEN_HEADER, HintEndpoints, error_answer, malformed
from engine_patch.hints import HintError, parse_field

GENERATION_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)

_request_hints: ContextVar[Any] = ContextVar("kv_hints", default=None)


class _Body(msgspec.Struct):
    kv_hints: msgspec.Raw | None = None


class Engine:
    """The engine cores behind one API server."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def call(self, operation: str, argument: str = "") -> list[dict[str, Any]]:
        """Ask every engine core (one for each data-parallel rank); inactive ones say so."""
        core = self._client.engine_core
        try:
            answers = await core.call_utility_all_async("cachewise", operation, argument)
        except Exception as error:  # a core without the patch has no such method
            if "cachewise" not in str(error):
                raise
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
    """Pure ASGI; adds its routes to the application when it starts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.endpoints = HintEndpoints(
            lambda request: Engine(request.app.state.engine_client).call,
            os.environ.get("CACHEWISE_HINTS_TOKEN") or None,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            scope["app"].router.routes[:0] = self.endpoints.routes()
        elif scope["type"] == "http":
            path = scope["path"]
            if scope["method"] == "POST" and path in GENERATION_PATHS:
                await self._generation(scope, receive, send)
                return
            if scope["method"] == "GET" and path.rstrip("/") == "/metrics":
                await self._metrics(scope, receive, send)
                return
        await self.app(scope, receive, send)

    # --- requests passing through ---

    async def _generation(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, take `kv_hints` from it, and pass it on unchanged."""
        messages: list[Message] = []
        body = bytearray()
        while True:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        hints = None
        if b'"kv_hints"' in body:
            try:
                hints = _from_body(bytes(body))
            except HintError as error:
                await malformed(error)(scope, receive, send)
                return
        if hints is not None and not self.endpoints.may_hint(scope["headers"]):
            await error_answer(403, f"{TOKEN_HEADER} is missing or wrong")(scope, receive, send)
            return
        replayed = iter(messages)

        async def receive_again() -> Message:
            return next(replayed, None) or await receive()

        if hints is None:
            await self.app(scope, receive_again, send)
            return
        Engine(scope["app"].state.engine_client).take_hints()
        token = _request_hints.set(hints)
        try:
            await self.app(scope, receive_again, send)
        finally:
            _request_hints.reset(token)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Append the patch's metrics to vLLM's, which are asked for as plain text."""
        ours = b""
        with contextlib.suppress(Exception):  # vLLM's own metrics matter more than ours
            ours = metrics.render(await Engine(scope["app"].state.engine_client).call("metrics"))
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


def _from_body(body: bytes) -> Any:
    """vLLM's envelope from a request body, checked; None if the body has none (or is no JSON)."""
    try:
        raw = msgspec.json.decode(body, type=_Body).kv_hints
    except msgspec.DecodeError:
        return None
    if raw is None or bytes(raw) == b"null":
        return None
    parse_field(bytes(raw))
    from vllm.v1.kv_hints import KvHintsEnvelope

    return msgspec.json.decode(raw, type=KvHintsEnvelope)
