"""The server's side of a client's connection: uvicorn's, as the gateway needs it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Final, cast
from weakref import ref

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.connection import ABORT, WRITE

_HEAD: Final = b"HTTP/1.1 "


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol. A WebSocket upgrade is answered by the app as plain HTTP (426) and is no
    cause for a warning: Codex tries one at the start of every session. The app may abort the
    connection and write to it (`gateway.connection`), and heads are written with their bodies."""

    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", HeadJoined(transport, self.loop)))

    def _unsupported_upgrade_warning(self) -> None:
        pass

    def connection_lost(self, exc: Exception | None) -> None:
        """uvicorn tells the newest request, which another that runs may be ahead of."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if len(self.pipeline) == 1:
            self.flow.resume_reading()  # or nobody hears the client go
        scope = cast("dict[str, Any]", self.scope)
        write = partial(_write, ref(self.cycle))
        scope["extensions"] = {ABORT: self.transport.abort, WRITE: write}


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
