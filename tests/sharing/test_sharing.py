"""Two gateways and a real Redis: what one knows the other goes on with, and what if Redis does not
answer."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
import redis.asyncio

from gateway.config import ConfigError
from gateway.dialects.turn import ToolCall
from gateway.embedded.fleet import EmbeddedFleet
from gateway.embedded.scheduler import EngineConfig
from gateway.gateway import Gateway
from gateway.predictor import Context
from gateway.sessions import Session
from gateway.sharing.sharing import Sharing
from gateway.sharing.store import AwayError
from tests.crowded import CAPACITY_TOKENS, Gate, SmallPod, agent_body, of
from tests.served import Running, gateway_over, until
from tests.sharing.agents import Agent
from tests.sharing.redis_server import RedisServer


def sharing(gateway: Running) -> Sharing:
    made = gateway.gateway.sharing
    assert made is not None
    return made


@asynccontextmanager
async def two_gateways(
    server: RedisServer, *pods: Any, **settings: Any
) -> AsyncIterator[tuple[Running, Running]]:
    """That know of each other."""
    shared = {"redis_url": server.url, "read_timeout_s": 0.5} | settings.pop("sharing", {})
    async with AsyncExitStack() as stack:
        a, b = [
            await stack.enter_async_context(gateway_over(*pods, sharing=shared, **settings))
            for _ in range(2)
        ]
        await until(lambda: len(sharing(a).replicas) == len(sharing(b).replicas) == 1)
        yield a, b


@asynccontextmanager
async def agents(count: int) -> AsyncIterator[list[Agent]]:
    async with aiohttp.ClientSession() as client:
        yield [Agent(f"s{n}", n % 2 == 0, client) for n in range(count)]


def only_session(gateway: Running) -> Session:
    (session,) = gateway.gateway.sessions
    return session


async def told(gateway: Running) -> None:
    """Until the gateway has told all that it has to tell."""
    made = sharing(gateway)
    await until(lambda: not made._unwritten and not made._left and not made._began)
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("number", [0, 1], ids=["named", "unnamed"])
async def test_a_session_goes_on_at_a_replica_that_never_saw_it(
    redis: RedisServer, number: int
) -> None:
    async with (
        EmbeddedFleet(pods=2) as fleet,
        two_gateways(redis, *fleet.urls) as (a, b),
        agents(2) as made,
    ):
        agent = made[number]
        assert await agent.turn(a.url)
        assert await agent.turn(a.url)
        await told(a)
        before = only_session(a)
        learned = a.gateway.foresight.predictor.observed_total
        await asyncio.sleep(0.2)
        assert await agent.turn(b.url)
        session = only_session(b)
        assert (session.sid, session.turns, session.pod) == (before.sid, 3, before.pod)
        assert session.affinity == before.affinity
        assert session.breaks == session.lost_tokens == 0
        (gap,) = session.gaps
        assert gap.kind == "tool"
        assert gap.tools == ("bash",)
        assert 0.2 < gap.seconds < 2
        assert len(set(agent.pods)) == 1
        assert agent.cached[2] > agent.cached[1] > 0
        assert b.gateway.loop.conductor.totals.lost_tokens == {}

        # The other has heard: the forecast it made is judged, its place is free, its home known.
        await told(b)
        await until(lambda: only_session(a).turns == 3)
        assert a.gateway.foresight.predictor.observed_total == learned + 1
        assert a.gateway.loop.admission.place_of(before.sid) is None
        assert b.gateway.loop.admission.place_of(before.sid) is not None
        assert len(a.gateway.loop.waits) == 0

        # And back again, where an older state of it is known.
        assert await agent.turn(a.url)
        assert only_session(a) is before
        assert (before.turns, before.breaks) == (4, 0)
        assert len(set(agent.pods)) == 1
        for gateway in (a, b):
            assert gateway.settled()


@pytest.mark.parametrize("number", [0, 1], ids=["named", "unnamed"])
async def test_a_prompt_that_breaks_at_one_replica_is_not_broken_again_at_the_next(
    redis: RedisServer, number: int
) -> None:
    async with (
        EmbeddedFleet(pods=2) as fleet,
        two_gateways(redis, *fleet.urls) as (a, b),
        agents(2) as made,
    ):
        agent = made[number]
        for turn in range(8):
            if turn in (4, 7):
                agent.messages[0]["content"] += "It is noon."
            gateway = (a, b)[turn % 2]
            assert await agent.turn(gateway.url)
            await told(gateway)
            known = [s for g in (a, b) for s in g.gateway.sessions]
            await until(lambda known=known, turn=turn: {s.turns for s in known} == {turn + 1})
        assert only_session(a).breaks == only_session(b).breaks == 1  # each its own
        assert {route["reason"] for route in agent.routes[1:]} == {"home"}
        assert len(set(agent.pods)) == 1
        for turn in (2, 3, 5, 6):
            route = agent.routes[turn]["candidates"]
            (resident,) = [c["resident_tokens"] for c in route if c["pod"] == agent.pods[0]]
            assert resident == pytest.approx(agent.cached[turn], abs=64)
        lost = [g.gateway.loop.conductor.totals.lost_tokens["prefix_break"] for g in (a, b)]
        assert sum(lost) < sum(agent.cached[turn] for turn in (3, 6)) + 200  # those of two breaks


async def test_a_session_whose_turns_only_their_text_tells_goes_on_too(redis: RedisServer) -> None:
    messages = [{"role": "user", "content": "count"}]
    async with EmbeddedFleet(pods=2) as fleet, two_gateways(redis, *fleet.urls) as (a, b):
        for gateway in (a, b, a):
            reply = await gateway.post("chat", {"model": "embedded", "messages": messages})
            messages.append(reply.json["choices"][0]["message"])
            messages.append({"role": "user", "content": "go on"})
            await told(gateway)
        assert [len(g.gateway.sessions) for g in (a, b)] == [1, 1]
        assert only_session(a).sid == only_session(b).sid
        assert only_session(a).turns == 3


async def test_a_tenants_session_is_not_found_by_another(redis: RedisServer) -> None:
    async with (
        EmbeddedFleet(pods=2) as fleet,
        two_gateways(redis, *fleet.urls) as (a, b),
        agents(2) as made,
    ):
        for agent in made:
            assert await agent.turn(a.url)
        await told(a)
        for agent in made:
            agent.key = "somebody-else"
            assert await agent.turn(b.url)
        known = {session.sid for session in a.gateway.sessions}
        assert known.isdisjoint(session.sid for session in b.gateway.sessions)
        assert {session.turns for session in b.gateway.sessions} == {1}


# -- places ---------------------------------------------------------------------------------------


async def test_a_pod_is_not_given_more_sessions_than_it_holds(redis: RedisServer) -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, two_gateways(redis, pod) as (a, b):
        first = asyncio.create_task(
            a.post("chat", agent_body("chat", "first"), headers=of("first", final=True))
        )
        await until(lambda: gate.seen == ["first"])
        (book,) = a.gateway.loop.admission.books.values()
        b.gateway.loop.admission.take_in(b.gateway.fleet, time.monotonic())
        (other,) = b.gateway.loop.admission.books.values()
        await until(lambda: other.others.placed_tokens == book.tokens > 0)
        second = asyncio.create_task(
            b.post("chat", agent_body("chat", "second"), headers=of("second", final=True))
        )
        await until(lambda: b.gateway.loop.admission.held_count == 1)
        await until(lambda: book.others.held == 1)
        gate.open("first", "second")
        assert (await first).status == (await second).status == 200
        assert gate.seen == ["first", "second"]


async def test_a_session_brings_its_place_along(redis: RedisServer) -> None:
    gate = Gate(opened={"first", "second"})
    async with SmallPod(gate) as pod, two_gateways(redis, pod) as (a, b):
        body = agent_body("chat", "first")
        assert (await a.post("chat", body, headers=of("first"))).status == 200
        sid = only_session(a).sid
        await until(lambda: sid in b.gateway.loop.admission.lent)
        body["messages"] += [
            {"role": "assistant", "content": "so be it"},
            {"role": "user", "content": "go on"},
        ]
        assert (await b.post("chat", body, headers=of("first"))).status == 200
        assert not b.gateway.loop.admission.lent
        assert b.gateway.metrics.holds == {}
        await until(lambda: a.gateway.loop.admission.place_of(sid) is None)
        await until(lambda: sid in a.gateway.loop.admission.lent)


async def test_what_a_replica_held_is_free_when_it_stops(redis: RedisServer) -> None:
    gate = Gate(opened={"first"})
    shared = {"redis_url": redis.url, "read_timeout_s": 0.5}
    async with SmallPod(gate) as pod, gateway_over(pod, sharing=shared) as b:
        async with gateway_over(pod, sharing=shared) as a:
            assert (
                await a.post("chat", agent_body("chat", "first"), headers=of("first"))
            ).status == 200
            await until(lambda: len(b.gateway.loop.admission.lent) == 1)
        await until(lambda: not sharing(b).replicas)
        assert not b.gateway.loop.admission.lent


# -- what was learned -----------------------------------------------------------------------------


def taught(gateway: Running, count: int = 40) -> None:
    """Let its forecasts see waits for a tool that nobody has heard of."""
    predictor = gateway.gateway.foresight.predictor
    for n in range(count):
        context = Context(f"s{n}", "acme")
        predictor.observe(predictor.forecast([ODD_CALL], "tool", context), 400.0)


def expects(gateway: Running) -> float:
    context = Context("new", "acme")
    return gateway.gateway.foresight.predictor.forecast([ODD_CALL], "tool", context).median_s


ODD_CALL = ToolCall.of("id", "Bash", '{"command": "frobnicate --all"}')


async def test_what_one_replica_learns_of_gaps_all_know_and_new_ones_too(
    redis: RedisServer,
) -> None:
    async with EmbeddedFleet(pods=2) as fleet:
        async with two_gateways(redis, *fleet.urls) as (a, b):
            await until(lambda: all(sharing(g).learned._began for g in (a, b)))
            before = expects(b)
            taught(a)
            redis.kill()
            await until(lambda: not sharing(a).store.up)
            with pytest.raises(AwayError):
                await sharing(a).learned.tell()  # it is kept
            redis.start()
            await until(lambda: sharing(a).store.up and sharing(b).store.up)
            for _ in range(2):  # the second time there is nothing new
                for gateway in (a, b):
                    await sharing(gateway).learned.tell()
                    await sharing(gateway).learned.take()
            assert expects(b) == pytest.approx(expects(a), rel=0.2)
            assert expects(b) > 3 * before
            assert await a.metric('cachewise_shared_gaps_total{direction="told"}') == 40
            assert await b.metric('cachewise_shared_gaps_total{direction="taken"}') == 40
            assert await a.metric('cachewise_shared_gaps_total{direction="taken"}') == 0
            await sharing(b).learned.keep()
        async with two_gateways(redis, *fleet.urls) as (c, _):
            await until(lambda: expects(c) > 3 * before)
            assert expects(c) == pytest.approx(expects(b), rel=0.2)


# -- a store that does not answer -----------------------------------------------------------------


async def test_a_turn_waits_no_longer_than_it_may_for_a_store_that_hangs(
    redis: RedisServer,
) -> None:
    engine = EngineConfig(kv_capacity_tokens=CAPACITY_TOKENS * 100, max_model_len=CAPACITY_TOKENS)
    async with (
        EmbeddedFleet(pods=2, config=engine, speedup=1000) as fleet,
        two_gateways(redis, *fleet.urls, sharing={"read_timeout_s": 0.1}) as (a, b),
        agents(12) as made,
    ):
        for agent in made:
            assert await agent.turn(a.url)
        await told(a)
        redis.freeze(True)
        took = []
        for agent in made:
            began = time.perf_counter()
            assert await agent.turn(b.url)
            took.append(time.perf_counter() - began)
        late = await b.metric('cachewise_store_reads_total{read_result="late"}')
        assert 3 <= late <= 4  # then nothing waits for it any more
        assert sorted(took)[6] < 0.1
        assert max(took) < 1.0
        assert len({agent.pods[0] == agent.pods[1] for agent in made}) == 1
        redis.freeze(False)
        await until(lambda: sharing(b).store.answers)
        await until(lambda: len(sharing(a).replicas) == len(sharing(b).replicas) == 1)
        fresh = Agent("fresh", True, made[0].client)
        assert await fresh.turn(a.url)
        await told(a)
        assert await fresh.turn(b.url)
        found = b.gateway.sessions.by_sid(next(reversed(a.gateway.sessions)).sid)
        assert found is not None
        assert found.turns == 2


async def test_without_the_store_from_the_start_the_gateway_works(redis: RedisServer) -> None:
    redis.kill()
    async with (
        EmbeddedFleet(pods=2) as fleet,
        gateway_over(*fleet.urls, sharing={"redis_url": redis.url}) as gateway,
        agents(2) as made,
    ):
        for agent in made:
            assert await agent.turn(gateway.url)
        assert await gateway.metric('cachewise_store_up{store="redis"}') == 0
        assert sharing(gateway)._unwritten
        await until(lambda: not sharing(gateway)._left)
        assert await gateway.metric("cachewise_store_dropped_total") == 2
        redis.start()
        await told(gateway)
        assert int(redis.cli("dbsize")) >= 2


async def test_what_somebody_else_writes_there_is_not_believed(redis: RedisServer) -> None:
    async with (
        EmbeddedFleet(pods=2) as fleet,
        two_gateways(redis, *fleet.urls) as (a, b),
        agents(2) as made,
        redis_client(redis) as client,
    ):
        for agent in made:
            assert await agent.turn(a.url)
        await told(a)
        async for key in client.scan_iter("cachewise:*"):
            if await client.type(key) == b"string":
                await client.set(key, b"\x93\x01\x02\xff nonsense", ex=60)
        for junk in (b"", b"\xff", b"\x92\x01", json.dumps({"a": 1}).encode()):
            await client.publish("cachewise:news", junk)
        for agent in made:
            assert await agent.turn(b.url)
            assert agent.pods[0] == agent.pods[1]
        assert await b.metric('cachewise_degraded_total{stage="sharing"}') == 0
        assert len(sharing(b).replicas) == 1


@asynccontextmanager
async def redis_client(server: RedisServer) -> AsyncIterator[Any]:
    client = redis.asyncio.Redis.from_url(server.url)
    try:
        yield client
    finally:
        await client.aclose()


# -- what is in it --------------------------------------------------------------------------------


async def test_nothing_in_the_store_or_on_its_channel_tells_who_said_what_and_all_of_it_lapses(
    redis: RedisServer,
) -> None:
    said = []
    async with (
        EmbeddedFleet(pods=2) as fleet,
        redis_client(redis) as client,
        client.pubsub() as channel,
        two_gateways(redis, *fleet.urls) as (a, b),
        agents(2) as made,
    ):
        await channel.psubscribe("*")
        for gateway in (a, b, a):
            for agent in made:
                assert await agent.turn(gateway.url)
            await told(gateway)
        await sharing(a).learned.tell()
        await sharing(b).learned.keep()
        stored = b""
        async for key in client.scan_iter("*"):
            assert key.startswith(b"cachewise:")
            assert 0 < await client.ttl(key) <= 2 * 86_400
            kind = await client.type(key)
            stored += key
            if kind == b"string":
                stored += await client.get(key)
            else:
                stored += repr(await client.xrange(key)).encode()
        while (message := await channel.get_message(timeout=0)) is not None:
            if message["type"] == "pmessage":
                said.append(message["data"])
        calls = [c["id"] for agent in made for m in agent.messages for c in m.get("tool_calls", ())]
        secrets = [*calls, "somebody", "Look closely", "make test", "fine fine", "You are an agent"]
        secrets += [f":{agent.name}" for agent in made if agent.named]
        assert len(calls) == 6
        assert len(said) > 3
        for secret in secrets:
            assert secret.encode() not in stored + b"".join(said), secret
        assert b"bash" in stored  # names of tools are


def test_a_missing_client_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway.config import Settings

    for name in [n for n in sys.modules if n.startswith("gateway.sharing.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    settings = Settings(sharing={"redis_url": "redis://localhost"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^sharing.redis_url: .*\[redis\]"):
        Gateway(settings)
