"""The server's side of a client's connection: uvicorn's, as the gateway needs it."""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import Any, Final, cast
from weakref import ref

from httptools import HttpParserError, HttpParserUpgrade
from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    Scope,
)
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from gateway.connection import ABORT, WRITE
from gateway.errors import GatewayError, render

MAX_HEAD_BYTES: Final = 256 * 1024
"""A request's head that is not at its end after so many bytes is refused, for it is kept before
anything is known of who sends it. Agents' heads have less than 8 KB."""

_HEAD: Final = b"HTTP/1.1 "
_HEAD_TOO_LARGE: Final = GatewayError(
    431,
    "request_header_fields_too_large",
    f"The request's head is larger than {MAX_HEAD_BYTES // 1024} KB.",
)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol. A request that asks for an upgrade is a request like any other: to
    WebSocket, which Codex tries at the start of every session, the app's answer is 426. The app may
    abort the connection and write to it (`gateway.connection`), and heads are written with their
    bodies."""

    _running: RequestResponseCycle | None = None
    _room: float = math.inf
    """How much more may come before the head, or the trailer, that is being read is too large."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", HeadJoined(transport, self.loop)))

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._room -= len(data)
        try:
            self._parse(data)
        except HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)
        else:
            if self._room < 0:
                self._refuse_head()

    def _refuse_head(self) -> None:
        if self._running is None or self._running.response_complete:
            status, headers, body = render(_HEAD_TOO_LARGE, "openai")
            headers = [*self.server_state.default_headers, *headers, (b"connection", b"close")]
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], lines, body))
        self.transport.close()

    def _parse(self, data: bytes) -> None:
        """The parser takes the head that asks for an upgrade for the last of HTTP. An upgrade may
        be ignored (RFC 9110 §7.8), so it reads the head again without the wish, then the rest."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as upgrade:
                method, version = self.parser.get_method(), self.parser.get_http_version()
                if method == b"CONNECT":
                    raise HttpParserError("No proxy.") from None
                head = [b"%b %b HTTP/%b\r\n" % (method, self.url, version.encode())]
                head += [b"%b: %b\r\n" % (k, v) for k, v in self.headers if k != b"upgrade"]
                wishes = [(k, v) for k, v in self.headers if k == b"upgrade"]
                self.parser.feed_data(b"".join(head))
                self.headers += wishes
                self.parser.feed_data(b"\r\n")
                data = data[upgrade.args[0] :]

    def _should_upgrade(self) -> bool:
        """Whether uvicorn is to leave the request alone: until its head has been read again."""
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """uvicorn tells the newest request, which another that runs may be ahead of."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        if cycle.scope["http_version"] == "1.0":
            app = partial(_unchunked, app, cycle)
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        self._room = MAX_HEAD_BYTES
        super().on_message_begin()

    def on_chunk_header(self) -> None:
        self._room = MAX_HEAD_BYTES  # for the last chunk is followed by the trailer

    def on_body(self, body: bytes) -> None:
        self._room = math.inf
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._room = math.inf
        super().on_headers_complete()
        if self.parser.should_upgrade():
            return
        if len(self.pipeline) == 1:
            self.flow.resume_reading()  # or nobody hears the client go
        scope = cast("dict[str, Any]", self.scope)
        write = partial(_write, ref(self.cycle))
        scope["extensions"] = {ABORT: self.transport.abort, WRITE: write}


async def _unchunked(
    app: ASGI3Application,
    cycle: RequestResponseCycle,
    scope: Scope,
    receive: ASGIReceiveCallable,
    send: ASGISendCallable,
) -> None:
    """The app for HTTP/1.0, which has no chunks: a body of no known length ends where the
    connection does. To uvicorn each of its pieces is as long as was promised."""
    sized = True

    async def raw(message: ASGISendEvent) -> None:
        nonlocal sized
        if message["type"] == "http.response.start":
            sized = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not sized:
                cycle.chunked_encoding = False
        elif message["type"] == "http.response.body" and not sized:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, raw)


def _write(of: ref[RequestResponseCycle], piece: bytes) -> bool:
    """What `RequestResponseCycle.send` does with a piece of a chunked answer, at once. The cycle
    has the scope, which has this."""
    cycle = of()
    if cycle is None or not cycle.response_started or cycle.response_complete:
        return False
    if not piece or not cycle.chunked_encoding or cycle.flow.write_paused or cycle.disconnected:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    return True


class HeadJoined:
    """A transport that sends an answer's head with the first of its body if that comes at once:
    uvicorn writes each by itself, and a write to a socket costs as much as all of routing."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._write = transport.write
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            self._head, data = b"", self._head + data
        elif data.startswith(_HEAD):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._write(data)

    def _flush(self) -> None:
        if self._head and not self._transport.is_closing():
            head, self._head = self._head, b""
            self._write(head)

    def close(self) -> None:
        self._flush()
        self._transport.close()
