"""The short way of a stream: what passes, what does not, and whose the connection is after."""

import asyncio
import types
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.splice import Splice
from tests.served import Exchange, Pod, paced


@asynccontextmanager
async def asking(pod: Pod) -> AsyncIterator[aiohttp.ClientSession]:
    async with pod, aiohttp.ClientSession(pod.url) as client:
        yield client


def ends_of(response: aiohttp.ClientResponse) -> tuple[asyncio.Transport, object]:
    """The connection's transport, and aiohttp's protocol for it."""
    assert response.connection is not None
    assert response.connection.transport is not None
    return response.connection.transport, response.connection.protocol


@types.coroutine
def counted(
    coroutine: Coroutine[Any, Any, bytes], waits: list[object]
) -> Generator[object, None, bytes]:
    """The same, and what its task waited for."""
    steps = coroutine.__await__()
    while True:
        try:
            step = next(steps)
        except StopIteration as ended:
            result: bytes = ended.value
            return result
        waits.append(step)
        yield step


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=20),
    refused=st.sets(st.integers(0, 30)),
)
def test_pieces_pass_or_are_returned_in_their_order(pieces: list[bytes], refused: set[int]) -> None:
    async def read(response: aiohttp.ClientResponse) -> bytes:
        got: list[bytes] = []
        offered = 0

        def passes(piece: bytes) -> bool:
            nonlocal offered
            offered += 1
            if offered in refused:
                return False
            got.append(piece)
            return True

        splice = Splice.of(response, passes)
        if splice is None:
            return await response.read()
        transport, inner = ends_of(response)
        while not response.content.at_eof():
            got.append(await splice.next())
            assert transport.get_protocol() is inner
        return b"".join(got)

    async def run() -> None:
        pod = Pod(paced(pieces))
        async with asking(pod) as client:
            for _ in range(2):
                assert await read(await client.post("/")) == b"".join(pieces)
            assert len(pod.connections) == 1, "one connection serves both"

    asyncio.run(run())


async def test_pieces_that_pass_wake_no_task() -> None:
    got: list[bytes] = []

    def passes(piece: bytes) -> bool:
        got.append(piece)
        return True

    async with asking(Pod(paced([b"piece"] * 50))) as client:
        splice = Splice.of(await client.post("/"), passes)
        assert splice is not None
        waits: list[object] = []
        got.append(await counted(splice.next(), waits))
    assert b"".join(got) == b"piece" * 50
    assert len(got) > 10
    assert len(waits) == 1


async def test_a_stream_that_breaks_raises_what_reading_it_raises() -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.chunk(b"piece")
        await asyncio.sleep(0.05)
        exchange.die()

    async with asking(Pod(answer)) as client:
        splice = Splice.of(await client.post("/"), lambda _: True)
        assert splice is not None
        with pytest.raises(aiohttp.ClientPayloadError):
            await splice.next()


@pytest.mark.parametrize("cause", [ValueError, TimeoutError, asyncio.CancelledError])
async def test_the_connection_has_its_protocol_back_after(cause: type[BaseException]) -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.chunk(b"first")
        await asyncio.sleep(0.05)
        exchange.chunk(b"second")
        await exchange.gone.wait()

    def passes(piece: bytes) -> bool:
        if cause is ValueError:
            raise ValueError(piece)
        return True

    async with asking(Pod(answer)) as client:
        response = await client.post("/")
        assert await response.content.readany() == b"first"
        splice = Splice.of(response, passes)
        assert splice is not None
        transport, inner = ends_of(response)
        waiting = asyncio.create_task(splice.next())
        await asyncio.sleep(0)
        assert transport.get_protocol() is splice
        if cause is TimeoutError:
            response.content.set_exception(TimeoutError("silent"))
            splice.look()
        elif cause is asyncio.CancelledError:
            waiting.cancel()
        with pytest.raises(cause):
            await waiting
        assert transport.get_protocol() is inner
        splice.look()  # nobody waits any more
        response.close()


async def test_a_request_still_under_way_goes_on_as_fast_as_the_pod_reads() -> None:
    piece, pieces = bytes(1 << 20), 64
    spliced, reads = asyncio.Event(), asyncio.Event()
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await reads.wait()
        left = pieces * len(piece)
        while left:
            left -= len(await reader.read(left))
        writer.write(b"4\r\nlast\r\n0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(pieces):
            yield piece
            await spliced.wait()
            sent += 1

    pod = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = pod.sockets[0].getsockname()[1]
    headers = {"content-length": str(pieces * len(piece))}
    got: list[bytes] = []
    async with pod, aiohttp.ClientSession() as client:
        response = await client.post(f"http://127.0.0.1:{port}/", data=body(), headers=headers)
        assert await response.content.readany() == b"first"
        splice = Splice.of(response, lambda _: False)
        assert splice is not None
        waiting = asyncio.create_task(splice.next())
        await asyncio.sleep(0)
        spliced.set()
        await asyncio.sleep(0.2)
        assert sent < pieces, "a pod that does not read fills no memory here"
        reads.set()
        async with asyncio.timeout(10):
            got.append(await waiting)
    assert sent == pieces
    assert got == [b"last"]
