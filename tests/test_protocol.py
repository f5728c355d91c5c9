"""An answer's head travels with the first of its body, and never waits for it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest
import uvicorn

from gateway.protocol import HeadJoined, Protocol

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

    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = uvicorn.Config(app, http=Protocol, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        for path, body in (("/at-once", b"body"), ("/late", b"body"), ("/none", b"")) * 3:
            answer = await client.get(path)
            assert (answer.status_code, answer.content) == (204 if path == "/none" else 200, body)
        assert (await client.head("/at-once")).content == b""
        assert (await client.get("/at-once", headers={"connection": "close"})).content == b"body"
    server.should_exit = True
    await serving
