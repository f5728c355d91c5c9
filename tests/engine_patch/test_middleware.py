"""The middleware in an application like vLLM's, over engine cores that answer as told."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message

from engine_patch import middleware
from engine_patch.middleware import GENERATION_PATHS, KvHintsMiddleware
from tests.engine_patch import agents

HINTS = "/v1/kv_hints"
Answer = Callable[[str, str], str]


class Core:
    """vLLM's client of engine cores; each core answers `operation, argument`."""

    def __init__(self, *cores: Answer) -> None:
        self.cores = cores
        self.asked = 0

    @property
    def engine_core(self) -> Core:
        return self

    async def call_utility_all_async(self, method: str, *args: str) -> list[str]:
        assert method == "cachewise"
        self.asked += 1
        return [core(*args) for core in self.cores]

    async def generate(self, *args: Any, **kwargs: Any) -> None: ...


def application(client: Any) -> Starlette:
    """The generation routes echo their body; /metrics is a line."""

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    async def metrics(request: Request) -> Response:
        return PlainTextResponse("vllm:up 1\n")

    routes = [Route(path, echo, methods=["POST"]) for path in GENERATION_PATHS]
    app = Starlette(routes=[*routes, Route("/metrics", metrics)])
    app.add_middleware(KvHintsMiddleware)
    app.state.engine_client = client
    return app


async def start(app: Starlette) -> httpx.AsyncClient:
    """Run the application's startup as a server does, then talk to it."""
    waiting: asyncio.Queue[Message] = asyncio.Queue()
    for kind in ("startup", "shutdown"):
        await waiting.put({"type": f"lifespan.{kind}"})
    sent: list[str] = []

    async def send(message: Message) -> None:
        sent.append(message["type"])

    await app({"type": "lifespan", "asgi": {"version": "3.0"}}, waiting.get, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pod")


def inactive(*_: str) -> str:
    raise RuntimeError(
        "Call to cachewise method failed: 'EngineCoreProc' object has no attribute 'cachewise'"
    )


async def test_cores_without_the_patch_are_asked_once() -> None:
    core = Core(inactive)
    async with await start(application(core)) as client:
        for _ in range(3):
            assert (await client.post(HINTS, json=agents.reuse("s", 5))).status_code == 501
            assert not (await client.get(f"{HINTS}/capabilities")).json()["active"]
    assert core.asked == 1


async def test_a_core_that_fails_is_not_taken_for_one_without_the_patch() -> None:
    fails = True

    def core(operation: str, argument: str) -> str:
        if fails:
            raise RuntimeError("Call to cachewise method failed: broken")
        return json.dumps({"active": True})

    async with await start(application(Core(core))) as client:
        with pytest.raises(RuntimeError, match="broken"):
            await client.get(f"{HINTS}/capabilities")
        fails = False
        assert (await client.get(f"{HINTS}/capabilities")).json()["active"]


@pytest.mark.parametrize("broken", [False, True])
async def test_vllms_metrics_come_without_ours_from_a_core_that_is_busy_or_broken(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "METRICS_TIMEOUT_S", 0.05)

    class Busy(Core):
        async def call_utility_all_async(self, method: str, *args: str) -> list[str]:
            if broken:
                raise RuntimeError("the engine is dead")
            return await asyncio.Event().wait()  # type: ignore[return-value]

    async with await start(application(Busy())) as client:
        assert (await client.get("/metrics")).text == "vllm:up 1\n"


async def test_a_second_start_adds_nothing() -> None:
    app = application(Core(lambda *_: json.dumps({"active": True})))
    await (await start(app)).aclose()
    before = list(app.router.routes)
    async with await start(app) as client:
        assert app.router.routes == before
        assert (await client.get(f"{HINTS}/capabilities")).status_code == 200


async def test_routes_that_a_vllm_does_not_serve_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = application(Core())
    app.router.routes = [r for r in app.router.routes if r.path != "/v1/messages"]  # type: ignore[attr-defined]
    async with await start(app):
        assert "ignored at /v1/messages:" in caplog.text


async def test_under_a_root_path_all_is_found() -> None:
    app = application(Core(lambda *_: json.dumps({"active": False})))
    await (await start(app)).aclose()
    transport = httpx.ASGITransport(app, root_path="/pod")
    async with httpx.AsyncClient(transport=transport, base_url="http://pod/pod") as client:
        assert (await client.get(f"{HINTS}/capabilities")).status_code == 200
        assert "cachewise:patch_active" in (await client.get("/metrics")).text
        refused = await client.post("/v1/completions", json={"kv_hints": 3})
        assert refused.status_code == 400


bodies = st.lists(
    st.sampled_from([b'"kv_hints"', b'"kv_hi', b'nts"', b'\\"kv_hints\\"', b"x", b" " * 9]),
    max_size=8,
).map(b"".join)


@given(body=bodies, cuts=st.lists(st.integers(0, 80), max_size=12))
async def test_the_field_is_found_however_the_body_is_cut(body: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(c, len(body)) for c in cuts), len(body)]
    chunks = [body[a:b] for a, b in itertools.pairwise(edges)]
    more = [True] * (len(chunks) - 1) + [False]
    messages = iter(
        {"type": "http.request", "body": c, "more_body": m}
        for c, m in zip(chunks, more, strict=True)
    )

    async def receive() -> Message:
        return next(messages)

    held, named = await middleware._read(receive)
    assert named == (b'"kv_hints"' in body)
    assert b"".join(m["body"] for m in held) == body


async def test_a_body_passes_byte_for_byte_whatever_it_says() -> None:
    async with await start(application(Core())) as client:
        for body in (b"", b"\xff", b'{"kv_hints":null}', b'{"kv_hints":', b'["kv_hints"]'):

            async def pieces(body: bytes = body) -> AsyncIterator[bytes]:
                for byte in body:
                    yield bytes([byte])

            answer = await client.post("/v1/completions", content=pieces())
            assert answer.status_code == 200
            assert answer.content == body


async def test_a_client_that_leaves_is_left_to_the_application() -> None:
    seen: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    coming = iter(
        [
            {"type": "http.request", "body": b'{"kv_hints": 3}', "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> Message:
        return next(coming)

    async def send(message: Message) -> None:
        raise AssertionError(message)

    endpoints = KvHintsMiddleware(app).endpoints
    route = middleware.HintedRoute(app, endpoints, lambda scope: pytest.fail("no hint"))
    await route({"type": "http", "headers": []}, receive, send)
    assert [m["type"] for m in seen] == ["http.request", "http.disconnect"]


@pytest.mark.engine
async def test_the_answers_of_two_data_parallel_ranks_are_merged() -> None:
    schedulers = pytest.importorskip("tests.engine_patch.schedulers")
    ranks: Sequence[Any] = [schedulers.Engine(), schedulers.Engine(async_scheduling=True)]
    client = Core(*(rank.scheduler.cachewise for rank in ranks))
    for i, rank in enumerate(ranks):
        rank.turn(schedulers.prompt(f"s{i}", 4), f"s{i}")
        rank.now += 5
    ranks[0].turn([*schedulers.prompt("s0", 4), 1], "s0")  # closes the gap there

    async with await start(application(client)) as http:
        told = (await http.get(f"{HINTS}/capabilities")).json()
        assert [e["capacity_tokens"] for e in told["engines"]] == [160, 160]

        older = agents.reuse("s0", 50.0)
        older["actions"][0]["payload"]["elapsed_s"] = 3.0
        answers = [json.loads(core("hints", json.dumps(older))) for core in client.cores]
        assert [a["results"][0]["status"] for a in answers] == ["rejected", "applied"]
        best = (await http.post(HINTS, json=older)).json()["results"]
        assert [r["status"] for r in best] == ["applied"]

        # A rank that saw the message in a request's body keeps to its first answers.
        several = agents.reuse("s1", 50.0)
        json.loads(client.cores[0]("hints", json.dumps(several)))
        several["actions"] *= 2
        answer = await http.post(HINTS, json=several)
        assert [r["status"] for r in answer.json()["results"]] == ["applied", "applied"]

        rows = (await http.get(f"{HINTS}/sessions")).json()["sessions"]
        resident = {(r["session_id"], r["engine"]): r["resident_blocks"] for r in rows}
        assert resident == {("s0", 0): 4, ("s0", 1): 0, ("s1", 0): 0, ("s1", 1): 4}
        text = (await http.get("/metrics")).text
        assert 'cachewise:sessions{engine="0"} 2.0' in text
        assert 'cachewise:sessions{engine="1"} 2.0' in text
