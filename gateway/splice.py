"""A short way for a stream: each piece goes to the client within the callback that brought it from
the pod. Waking a task for each would cost a stream a seventh of its CPU time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp


class Splice(asyncio.Protocol):
    """Stands between a pod's connection and aiohttp's protocol for it while `next` is waited for.

    aiohttp reads as ever; whenever it may have read something, ``passes`` is offered that and tells
    whether it is dealt with. The first piece that is not, or the end, is what `next` returns.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        inner: asyncio.Protocol,
        content: aiohttp.StreamReader,
        passes: Callable[[bytes], bool],
    ) -> None:
        self._transport = transport
        self._inner = inner
        self._content = content
        self._passes = passes
        self._next: asyncio.Future[bytes] | None = None

    @classmethod
    def of(cls, response: aiohttp.ClientResponse, passes: Callable[[bytes], bool]) -> Splice | None:
        """None for a response whose end has come: its connection is another's already."""
        connection = response.connection
        if connection is None or connection.transport is None or connection.protocol is None:
            return None
        return cls(connection.transport, connection.protocol, response.content, passes)

    async def next(self) -> bytes:
        """The next piece that does not pass; empty at the end. Raises what reading raises."""
        piece, held = self._read()
        if held:
            return piece
        self._next = asyncio.get_running_loop().create_future()
        self._transport.set_protocol(self)
        try:
            return await self._next
        finally:
            self._next = None
            if not self._transport.is_closing():
                self._transport.set_protocol(self._inner)

    def look(self) -> None:
        """Something came, ended or broke."""
        waiting = self._next
        if waiting is None or waiting.done():
            return
        try:
            piece, held = self._read()
        except Exception as error:
            waiting.set_exception(error)
        else:
            if held:
                waiting.set_result(piece)

    def _read(self) -> tuple[bytes, bool]:
        """What has come and did not pass, and whether it is for `next` to return."""
        content = self._content
        while piece := content.read_nowait():  # which may let aiohttp read on, and bring more
            if content.at_eof() or not self._passes(piece):
                return piece, True
        return piece, content.at_eof()

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        self.look()

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._inner.connection_lost(error)
        self.look()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()
