"""An answer's head travels with the first of its body, and never waits for it."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import orjson
import pytest
import uvicorn

from gateway.connection import writer
from gateway.protocol import MAX_HEAD_BYTES, HeadJoined, Protocol

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Written(asyncio.Transport):
    """A transport that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.writes.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=Protocol, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listening]))
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    await running


async def test_a_head_and_a_body_that_come_together_are_one_write() -> None:
    written = Written()
    joined = HeadJoined(written, asyncio.get_running_loop())
    joined.write(HEAD)
    assert written.writes == []
    joined.write(b"body")
    joined.write(b"more")
    assert written.writes == [HEAD + b"body", b"more"]
    await asyncio.sleep(0)
    assert len(written.writes) == 2


async def test_a_head_alone_goes_out_before_anything_else_happens() -> None:
    written = Written()
    joined = HeadJoined(written, asyncio.get_running_loop())
    joined.write(HEAD)
    await asyncio.sleep(0)
    assert written.writes == [HEAD]
    joined.write(b"body")
    assert written.writes == [HEAD, b"body"]


@pytest.mark.parametrize("lost", [False, True])
async def test_a_connection_that_closes_gets_its_head_while_it_can(lost: bool) -> None:
    written = Written()
    joined = HeadJoined(written, asyncio.get_running_loop())
    joined.write(HEAD)
    if lost:
        written.close()
    joined.close()
    await asyncio.sleep(0)
    assert written.closed
    assert joined.is_closing()
    assert written.writes == ([] if lost else [HEAD])


async def test_answers_of_every_kind_arrive_whole() -> None:
    """A body at once, one that comes late, none at all, and several on one connection."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        status = 204 if path == "/none" else 200
        headers = [] if path == "/late" else [(b"content-length", b"0" if status == 204 else b"4")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if path == "/late":
            await asyncio.sleep(0.05)
            for part in (b"bo", b"dy"):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        body = b"body" if path == "/at-once" else b""
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async with serving(app) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        for path, body in (("/at-once", b"body"), ("/late", b"body"), ("/none", b"")) * 3:
            answer = await client.get(path)
            assert (answer.status_code, answer.content) == (204 if path == "/none" else 200, body)
        assert (await client.head("/at-once")).content == b""
        assert (await client.get("/at-once", headers={"connection": "close"})).content == b"body"


async def test_pieces_are_written_at_once_where_an_answer_that_has_begun_can_take_them() -> None:
    wrote: list[bool] = []
    refused = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        write = writer(scope)
        wrote.append(write(b"too early"))
        headers = [(b"content-length", b"4")] if scope["path"] == "/whole" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["path"] == "/whole":
            wrote.append(write(b"of no known length"))
            await send({"type": "http.response.body", "body": b"body", "more_body": False})
        elif scope["path"] == "/slow":
            wrote.append(all(write(b"x" * 65_536) for _ in range(1000)))
            refused.set()
            await send({"type": "http.response.body", "body": b"end", "more_body": False})
        else:
            wrote.append(write(b"one, "))
            await send({"type": "http.response.body", "body": b"two, ", "more_body": True})
            wrote.append(write(b"three"))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        wrote.append(write(b"too late"))

    async with serving(app) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        assert (await client.get("/stream")).content == b"one, two, three"
        assert wrote == [False, True, True, False]
        wrote.clear()
        assert (await client.get("/whole")).content == b"body"
        assert wrote == [False, False, False]
        async with client.stream("GET", "/slow") as answer:
            await refused.wait()  # for nobody reads
            assert (await answer.aread()).lstrip(b"x") == b"end"
        assert wrote[-2:] == [False, False]


async def test_a_piece_belongs_to_its_own_request_of_several_on_a_connection() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        write = writer(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first, ", "more_body": True})
        await asyncio.sleep(0.02)
        assert write(scope["path"].encode())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with serving(app) as url:
        reader, client = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        client.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % i for i in range(3)))
        for i in range(3):
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            body = b"7\r\nfirst, \r\n2\r\n/%d\r\n0\r\n\r\n" % i
            assert await reader.readexactly(len(body)) == body
        client.close()


async def test_another_server_offers_no_writing() -> None:
    assert writer({"type": "http"})(b"piece") is False


async def test_a_client_that_has_gone_takes_no_piece() -> None:
    wrote: list[bool] = []
    tried = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        write = writer(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        wrote.append(write(b"piece"))
        while (await receive())["type"] != "http.disconnect":
            pass
        wrote.append(write(b"for nobody"))
        tried.set()

    async with serving(app) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        async with client.stream("GET", "/") as answer:
            assert await anext(answer.aiter_raw()) == b"piece"
        await tried.wait()
        assert wrote == [True, False]


@pytest.mark.parametrize("together", [True, False])
async def test_a_client_that_goes_is_heard_by_the_request_ahead_of_one_that_waits(
    together: bool,
) -> None:
    begun, gone = asyncio.Event(), asyncio.Event()
    paths: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        paths.append(scope["path"])
        await receive()
        begun.set()
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"for nobody", "more_body": False})
        gone.set()

    async with serving(app) as url:
        _, client = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        first, second = (b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % i for i in (1, 2))
        client.write(first + second if together else first)
        await begun.wait()
        if not together:
            client.write(second)
        await asyncio.sleep(0.05)
        client.close()
        await asyncio.wait_for(gone.wait(), 2)
        assert paths == ["/1"]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the request: its method, path, upgrade header and body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    upgrade = dict(scope["headers"]).get(b"upgrade", b"-")
    answer = b" ".join((scope["method"].encode(), scope["raw_path"], upgrade, body))
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer, "more_body": False})


UPGRADES = {
    "java": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n",
    "websocket": b"upgrade: websocket\r\nconnection: keep-alive, Upgrade\r\n",
    "twice": b"upgrade: a\r\nupgrade: h2c\r\nproxy-connection: upgrade\r\nconnection: upgrade\r\n",
}


@pytest.mark.parametrize("piece", [1, 7, 100_000])
@pytest.mark.parametrize("upgrade", UPGRADES)
async def test_a_request_that_wishes_for_an_upgrade_is_served_without(
    upgrade: str, piece: int
) -> None:
    """With its body, of either framing, and with the requests after it."""
    head = b"POST /%b HTTP/1.1\r\nhost: x\r\n" + UPGRADES[upgrade]
    sent = b"".join(
        (
            head % b"sized" + b"Content-Length: 5\r\n\r\nsized",
            head % b"chunked"
            + b"transfer-encoding: chunked\r\n\r\n3\r\nchu\r\n4\r\nnked\r\n0\r\n\r\n",
            head.replace(b"POST", b"GET") % b"none" + b"\r\n",
            b"POST /after HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nafter",
        )
    )
    wished = {"java": b"h2c", "websocket": b"websocket", "twice": b"h2c"}[upgrade]
    async with serving(echo) as url:
        reader, client = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        for at in range(0, len(sent), piece):
            client.write(sent[at : at + piece])
            await asyncio.sleep(0)
        for answer in (
            b"POST /sized %b sized" % wished,
            b"POST /chunked %b chunked" % wished,
            b"GET /none %b " % wished,
            b"POST /after - after",
        ):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert await asyncio.wait_for(reader.readexactly(len(answer)), 2) == answer
        client.close()


async def test_a_wish_to_be_a_proxy_is_refused() -> None:
    async with serving(echo) as url:
        for target in (b"example.com:443", b"/path"):
            reader, client = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            client.write(b"CONNECT %b HTTP/1.1\r\nhost: x\r\n\r\n" % target)
            assert (await asyncio.wait_for(reader.read(), 2)).startswith(b"HTTP/1.1 400 ")
            client.close()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_only_a_client_that_knows_chunks_gets_them(version: str) -> None:
    """To another the connection's end is the body's, whatever it asks of the connection."""
    wrote: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sized = [(b"Content-Length", b"8")] if scope["path"] == "/sized" else []
        await send({"type": "http.response.start", "status": 200, "headers": sized})
        await send({"type": "http.response.body", "body": b"one,", "more_body": True})
        await send({"type": "http.response.body", "body": b"two,", "more_body": True})
        wrote.append(writer(scope)(b"-"))
        await send({"type": "http.response.body"})

    async with serving(app) as url:
        for path, method in (("/", "GET"), ("/sized", "GET"), ("/", "HEAD")):
            reader, client = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            connection = "keep-alive" if version == "1.0" else "close"
            request = f"{method} {path} HTTP/{version}\r\nconnection: {connection}\r\n\r\n"
            client.write(request.encode())
            answer = await asyncio.wait_for(reader.read(), 2)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"connection: close" in head
            chunked = version == "1.1" and (path, method) == ("/", "GET")
            assert (b"transfer-encoding" in head) is chunked
            if chunked:
                assert body == b"4\r\none,\r\n4\r\ntwo,\r\n1\r\n-\r\n0\r\n\r\n"
            else:
                assert body == (b"" if method == "HEAD" else b"one,two,")
            client.close()
    assert wrote.count(True) == (version == "1.1")


def poured(url: str, head: bytes, endless: bytes) -> tuple[bytes, int]:
    """The answer to a request that does not end by itself, and how much of it was sent."""
    sent = 0
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 2) as client:
        client.sendall(head)
        client.setblocking(False)
        answer = b""
        while sent < 40_000_000:
            try:
                sent += client.send(endless)
            except BlockingIOError:
                select.select([client], [client], [])
            except ConnectionError:
                break
        client.settimeout(2)
        with suppress(ConnectionError):
            while piece := client.recv(65_536):
                answer += piece
    return answer, sent


@pytest.mark.parametrize(
    ("head", "endless"),
    [
        (b"GET /", b"x" * 10_000),
        (b"GET / HTTP/1.1\r\nx: ", b"x" * 10_000),
        (b"GET / HTTP/1.1\r\n", b"name: value\r\n" * 1000),
        (b"GET / HTTP/1.1\r\nupgrade: h2c\r\n", b"upgrade: h2c\r\n" * 1000),
    ],
)
async def test_a_head_without_an_end_is_refused_before_it_is_kept(
    head: bytes, endless: bytes
) -> None:
    async with serving(echo) as url:
        answer, sent = await asyncio.to_thread(poured, url, head, endless)
    assert sent < 40_000_000
    status, _, rest = answer.partition(b"\r\n")
    assert status == b"HTTP/1.1 431 Request Header Fields Too Large"
    assert b"connection: close" in rest
    assert orjson.loads(rest.partition(b"\r\n\r\n")[2]) == {
        "error": {
            "message": "The request's head is larger than 256 KB.",
            "type": "invalid_request_error",
            "param": None,
            "code": "request_header_fields_too_large",
        }
    }


async def test_a_trailer_without_an_end_ends_the_connection() -> None:
    head = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    async with serving(echo) as url:
        _, sent = await asyncio.to_thread(poured, url, head, b"name: value\r\n" * 1000)
    assert sent < 40_000_000


async def test_only_a_head_is_refused_for_its_size() -> None:
    """And none that ends in time, in however many requests on one connection."""
    body = b"x" * (3 * MAX_HEAD_BYTES)
    headers = {"x-long": "x" * (MAX_HEAD_BYTES // 2)}

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(body), MAX_HEAD_BYTES // 2):
            yield body[at : at + MAX_HEAD_BYTES // 2]

    async with serving(echo) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        for content in (body, chunks(), body, chunks()):
            answer = await client.post("/", headers=headers, content=content)
            assert answer.content == b"POST / - " + body
