"""What every endpoint does with a request: who asks, its whole body, its model, its error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gateway.access import Tenant, Unauthorized
from gateway.decompress import decompress
from gateway.dialects import MalformedRequestError, splice_model
from gateway.errors import Dialect as Family
from gateway.errors import GatewayError, no_pod_ready, render
from gateway.gateway import Gateway
from gateway.relay import PodError, TimedOut, read_body, too_large

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[Any], Awaitable[None]]

LARGE_BODY_BYTES = 256 * 1024
"""Compressed bodies above this unfold in a thread, not on the event loop."""


def authenticate(gateway: Gateway, scope: Scope) -> Tenant:
    """The caller's tenant. Raises `GatewayError` 401."""
    try:
        return gateway.access.authenticate(scope["headers"])
    except Unauthorized as error:
        raise GatewayError(401, "invalid_api_key", str(error)) from None


async def request_body(gateway: Gateway, scope: Scope, receive: Receive) -> bytes:
    """The whole body, decompressed."""
    limit_bytes = gateway.settings.relay.max_body_bytes
    length = 0
    codings: list[bytes] = []
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value)
        elif name == b"content-encoding":
            codings.append(value)
    if length > limit_bytes:
        raise too_large(limit_bytes)
    body = await read_body(receive, limit_bytes)
    if not codings:
        return body
    name = b",".join(codings).decode("latin-1")
    if len(body) > LARGE_BODY_BYTES:
        return await asyncio.to_thread(decompress, body, name, limit_bytes)
    return decompress(body, name, limit_bytes)


def map_model(body: bytes, model: str, served: str) -> bytes:
    """The body with its model's name mapped. Raises `GatewayError` 400."""
    try:
        return splice_model(body, model, served)
    except MalformedRequestError as error:
        raise GatewayError(400, "invalid_request", str(error)) from None


async def send_error(gateway: Gateway, error: GatewayError, family: Family, send: Send) -> None:
    """Answer with an error of the gateway's own, in the caller's dialect."""
    gateway.metrics.errors.labels(str(error.status)).inc()
    status, headers, body = render(error, family)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def no_answer(model: str, last: PodError | None) -> GatewayError:
    """Why no pod answered; ``last`` is how the last one tried failed."""
    if isinstance(last, TimedOut):
        return GatewayError(504, "pod_timeout", f"The pod gave {last}.")
    if last is not None:
        return GatewayError(
            502, "pod_unreachable", f"No pod could take the turn: {last}.", retry_after_s=2
        )
    return no_pod_ready(model)
