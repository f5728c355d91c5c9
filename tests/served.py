"""A gateway on a real socket, and pods on raw sockets that behave as a test wants them to."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from uvicorn.server import ServerState

from gateway import cli
from gateway.app import create_app
from gateway.config import Settings
from gateway.gateway import Gateway
from gateway.inspector.endpoints import Inspector

WIRES = ("chat", "completions", "responses", "messages")
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
EVENTS = {
    "chat": b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n',
    "completions": b'data: {"id":"1","object":"text_completion","created":1,"model":"m",'
    b'"choices":[{"index":0,"text":"hi"}]}\n\n',
    "responses": b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
    b'"delta":"hi","item_id":"i","output_index":0,"content_index":0,"sequence_number":1}\n\n',
    "messages": b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":"hi"}}\n\n',
}
"""One event of text in each dialect."""


def body_of(wire: str, model: str = "m", **more: Any) -> dict[str, Any]:
    """The smallest request of a dialect."""
    said = [{"role": "user", "content": "hi"}]
    match wire:
        case "chat":
            return {"model": model, "messages": said, **more}
        case "completions":
            return {"model": model, "prompt": "hi", **more}
        case "responses":
            return {"model": model, "input": "hi", **more}
        case _:
            return {"model": model, "max_tokens": 16, "messages": said, **more}


@dataclass
class Exchange:
    """One request at a pod, and the means to answer it, well or badly."""

    method: str
    target: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the other side closes the connection."""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: bytes) -> list[bytes]:
        return [v for n, v in self.headers if n.lower() == name]

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def whole(self, body: bytes, status: int = 200, *headers: tuple[str, str]) -> None:
        lines = [f"{n}: {v}" for n, v in (("content-type", "application/json"), *headers)]
        head = "\r\n".join([f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *lines])
        self.write(head.encode() + b"\r\n\r\n" + body)

    def begin_stream(self, *headers: tuple[str, str]) -> None:
        lines = [
            f"{n}: {v}"
            for n, v in (
                ("content-type", "text/event-stream"),
                ("transfer-encoding", "chunked"),
                *headers,
            )
        ]
        self.write(("HTTP/1.1 200 OK\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode())

    def chunk(self, data: bytes) -> None:
        self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        self.write(b"0\r\n\r\n")

    def die(self) -> None:
        """Break the connection as a killed process does."""
        self.writer.transport.abort()


Answer = Callable[[Exchange], Awaitable[None]]


def paced(pieces: Sequence[bytes], pause_s: float = 0.001) -> Answer:
    """Streams the pieces, each so long before the next."""

    async def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        for piece in pieces:
            exchange.chunk(piece)
            await asyncio.sleep(pause_s)
        exchange.end_stream()

    return answer


async def well(exchange: Exchange) -> None:
    exchange.whole(b'{"ok": true}')


class Pod:
    """A pod on a raw socket: fit when probed, and for turns whatever `answer` does."""

    def __init__(self, answer: Answer = well, *models: str) -> None:
        self.answer = answer
        self.models = models or ("m",)
        self.turns: list[Exchange] = []
        self.probes: list[Exchange] = []
        self.connections: set[asyncio.StreamWriter] = set()
        self.arrived = asyncio.Event()
        """Set when a turn has come."""
        self.url = ""

    async def __aenter__(self) -> Pod:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=1 << 20)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """From now on the port refuses; open connections are reset."""
        self._server.close()
        for writer in list(self.connections):
            writer.transport.abort()
        await asyncio.sleep(0)

    def close_idle(self) -> None:
        for writer in list(self.connections):
            writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        early = b""
        try:
            while True:
                head = early + await reader.readuntil(b"\r\n\r\n")
                first, *lines = head[:-4].split(b"\r\n")
                method, target, _ = first.decode("latin-1").split(" ")
                headers = []
                for line in lines:
                    name, _, value = line.partition(b":")
                    headers.append((name, value.strip(b" ")))
                length = next((int(v) for n, v in headers if n.lower() == b"content-length"), 0)
                exchange = Exchange(
                    method, target, headers, await reader.readexactly(length), writer
                )
                watching = asyncio.create_task(_watch(reader, exchange))
                try:
                    await self._dispatch(exchange)
                finally:
                    watching.cancel()
                    await asyncio.wait([watching])
                early = b"" if watching.cancelled() else watching.result()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.connections.discard(writer)
            writer.close()

    async def _dispatch(self, exchange: Exchange) -> None:
        if exchange.method == "POST":
            self.turns.append(exchange)
            self.arrived.set()
            await self.answer(exchange)
            return
        self.probes.append(exchange)
        if exchange.path == "/v1/models":
            cards = [{"id": name, "max_model_len": 4096} for name in self.models]
            exchange.whole(json.dumps({"data": cards}).encode())
        elif exchange.path == "/health":
            exchange.whole(b"")
        else:
            exchange.whole(b"{}", 404)


async def _watch(reader: asyncio.StreamReader, exchange: Exchange) -> bytes:
    try:
        early = await reader.read(1)
    except OSError:
        early = b""
    if not early:
        exchange.gone.set()
    return early


@dataclass
class Running:
    """A gateway that listens, and a client of it."""

    url: str
    gateway: Gateway
    server: ServerState
    client: aiohttp.ClientSession
    inspector: Inspector

    async def post(self, wire: str, body: Any = None, **options: Any) -> Reply:
        """One turn, read to its end. ``body`` is bytes, or what the request is made of."""
        data = body if isinstance(body, bytes) else json.dumps(body or body_of(wire)).encode()
        path = PATHS.get(wire, wire)
        async with self.client.post(self.url + path, data=data, **options) as response:
            return await Reply.read(response)

    async def get(self, path: str, **options: Any) -> Reply:
        async with self.client.get(self.url + path, **options) as response:
            return await Reply.read(response)

    async def metric(self, sample: str) -> float:
        """The value of a sample (``name{labels}``) in `/metrics`; 0 if it is not there."""
        for line in (await self.get("/metrics")).text.splitlines():
            name, _, value = line.rpartition(" ")
            if name == sample:
                return float(value)
        return 0.0

    def settled(self) -> bool:
        """Whether every count that a turn raises is down again."""
        gateway = self.gateway
        return all(p.in_flight == 0 == p.queued_prefill_tokens for p in gateway.fleet) and all(
            s.in_flight == 0 for s in gateway.sessions
        )


@dataclass
class Reply:
    status: int
    headers: Any
    data: bytes

    @classmethod
    async def read(cls, response: aiohttp.ClientResponse) -> Reply:
        return cls(response.status, response.headers, await response.read())

    @property
    def text(self) -> str:
        return self.data.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    def error(self, wire: str) -> dict[str, Any]:
        """The error object, after checking that the body has the dialect's shape."""
        body = self.json
        error: dict[str, Any] = body["error"]
        if wire.startswith(("messages", "/v1/messages")):
            assert body["type"] == "error"
            assert set(error) == {"type", "message"}
        else:
            assert set(body) == {"error"}
            assert set(error) == {"message", "type", "param", "code"}
        return error


@asynccontextmanager
async def gateway_over(*pods: Pod | str, **settings: Any) -> AsyncIterator[Running]:
    """A gateway in front of the pods, on a real socket, served as `cachewise serve` serves it."""
    urls = [{"url": pod if isinstance(pod, str) else pod.url} for pod in pods]
    for number, pod in enumerate(urls):
        pod["name"] = f"pod-{number}"
    made = Settings(**({"pods": urls} | settings))
    app = create_app(made)
    config = cli.server(made, app).config
    config.load()
    state = ServerState()
    async with app.router.lifespan_context(app):
        listener = await asyncio.get_running_loop().create_server(
            lambda: config.http_protocol_class(config, state, {}),  # type: ignore[call-arg, operator, union-attr]
            "127.0.0.1",
            0,
            backlog=2048,
        )
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        try:
            async with aiohttp.ClientSession() as client:
                yield Running(url, app.state.gateway, state, client, app.state.inspector)
        finally:
            listener.close()
            for connection in list(state.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            if state.tasks:
                await asyncio.wait(state.tasks, timeout=5)


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until it holds; `TimeoutError` if it never does."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (conditions over plain state)
            await asyncio.sleep(0.005)


def events_of(data: bytes) -> list[tuple[str, Any]]:
    """The events of a stream, as (name, JSON or text). Raises if any of them is torn."""
    assert data.endswith(b"\n\n"), f"the stream ends within an event: {data[-80:]!r}"
    found = []
    for event in data.split(b"\n\n"):
        name, payload = "message", []
        for line in event.split(b"\n"):
            key, _, value = line.partition(b":")
            if key == b"event":
                name = value.strip().decode()
            elif key == b"data":
                payload.append(value.removeprefix(b" "))
        if payload:
            text = b"\n".join(payload)
            found.append((name, "[DONE]" if text == b"[DONE]" else json.loads(text)))
    return found


def stream_error_of(wire: str, data: bytes) -> str:
    """The message of the error that ends a stream, which must be told as the dialect tells it."""
    events = events_of(data)
    if wire == "messages":
        name, last = events[-1]
        assert (name, last["type"]) == ("error", "error")
        return str(last["error"]["message"])
    if wire == "responses":
        (name, first), (final_name, final) = events[-2:]
        assert (name, first["type"]) == ("error", "error")
        assert (final_name, final["type"]) == ("response.failed", "response.failed")
        assert final["response"]["status"] == "failed"
        return str(final["response"]["error"]["message"])
    assert events[-1][1] == "[DONE]"
    return str(events[-2][1]["error"]["message"])


class Logged(logging.Handler):
    """Keeps every record that reaches the root logger."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def errors(self) -> list[str]:
        return [logging.Formatter().format(r) for r in self.records if r.levelno >= logging.ERROR]


@contextmanager
def logged() -> Iterator[Logged]:
    handler = Logged()
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)
