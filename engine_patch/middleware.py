"""Hints over HTTP on a vLLM pod, and the patch's metrics on its /metrics.

Launch vLLM with `--middleware engine_patch.middleware.KvHintsMiddleware`. The endpoints are added
as routes behind vLLM's own authentication; `CACHEWISE_HINTS_TOKEN`, if set, must also be sent as
`X-Kv-Hints-Token`, since a hint moves others' cache.

    POST /v1/kv_hints                 an envelope; an answer for each action
    GET  /v1/kv_hints/capabilities    dialect versions, block size, capacity
    GET  /v1/kv_hints/sessions        resident blocks and expected reuse of each session

A generation request may carry the same envelope in its body's `kv_hints`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_patch import metrics
from engine_patch.hints import MAX_BODY_BYTES, HintError, parse

PATH = "/v1/kv_hints"
TOKEN_HEADER = "x-kv-hints-token"  # noqa: S105
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
        self.token = os.environ.get("CACHEWISE_HINTS_TOKEN") or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            self._add_routes(scope["app"])
        elif scope["type"] == "http":
            path = scope["path"]
            if scope["method"] == "POST" and path in GENERATION_PATHS:
                await self._generation(scope, receive, send)
                return
            if scope["method"] == "GET" and path.rstrip("/") == "/metrics":
                await self._metrics(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _add_routes(self, app: Any) -> None:
        app.router.routes[:0] = [
            Route(PATH, self.post_hints, methods=["POST"]),
            Route(f"{PATH}/capabilities", self.get_capabilities, methods=["GET"]),
            Route(f"{PATH}/sessions", self.get_sessions, methods=["GET"]),
        ]

    def _may_hint(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        if self.token is None:
            return True
        given = next((v for k, v in headers if k.lower() == TOKEN_HEADER.encode()), b"")
        return hmac.compare_digest(given, self.token.encode())

    # --- endpoints ---

    async def post_hints(self, request: Request) -> Response:
        """Apply an envelope on every engine core."""
        if not self._may_hint(request.scope["headers"]):
            return _error(403, f"{TOKEN_HEADER} is missing or wrong")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return _error(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        try:
            envelope, _ = parse(bytes(body))
        except HintError as error:
            return _error(400, error.reason, error.field)
        answers = await Engine(request.app.state.engine_client).call("hints", body.decode())
        active = [a["results"] for a in answers if "results" in a]
        if not active:
            return _error(501, "the engine runs without the reuse-aware scheduler")
        return JSONResponse(
            {
                "protocol_version": envelope.protocol_version,
                "message_id": envelope.message_id,
                "results": [_best(ranks) for ranks in zip(*active, strict=True)],
            }
        )

    async def get_capabilities(self, request: Request) -> Response:
        """What the pod understands; `engines` has one entry a data-parallel rank."""
        engines = await Engine(request.app.state.engine_client).call("capabilities")
        return JSONResponse(engines[0] | {"engines": engines})

    async def get_sessions(self, request: Request) -> Response:
        """The sessions of every engine core."""
        if not self._may_hint(request.scope["headers"]):
            return _error(403, f"{TOKEN_HEADER} is missing or wrong")
        engines = await Engine(request.app.state.engine_client).call("sessions")
        rows = [row | {"engine": i} for i, e in enumerate(engines) for row in e.get("sessions", ())]
        return JSONResponse({"sessions": rows})

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
                await _error(400, error.reason, error.field)(scope, receive, send)
                return
        if hints is not None and not self._may_hint(scope["headers"]):
            await _error(403, f"{TOKEN_HEADER} is missing or wrong")(scope, receive, send)
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
    try:
        parse(bytes(raw))
    except HintError as error:
        raise HintError(f"kv_hints.{error.field}", error.reason) from None
    from vllm.v1.kv_hints import KvHintsEnvelope

    return msgspec.json.decode(raw, type=KvHintsEnvelope)


_ORDER = ("applied", "clipped", "rejected", "unsupported")


def _best(ranks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A session lives on one data-parallel rank; the best answer is its answer."""
    return min(ranks, key=lambda answer: _ORDER.index(answer["status"]))


def _error(status: int, message: str, field: str | None = None) -> JSONResponse:
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", "param": field}}, status
    )
