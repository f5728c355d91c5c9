"""Hints on the embedded pod: the engine patch's eviction, order and endpoints."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine_patch.hints import parse
from gateway.embedded import EmbeddedFleet, EngineConfig
from gateway.embedded.prompt import BYTES_PER_TOKEN, block_hashes
from gateway.embedded.scheduler import Request, Scheduler
from gateway.fleet.probe import probe

BLOCK = 4
HELLO: dict[str, Any] = {"model": "embedded", "messages": [{"role": "user", "content": "hello"}]}
_serial = itertools.count()


def envelope(session: str, gap_s: float | None, **changes: Any) -> dict[str, Any]:
    """A hint that the session is back after `gap_s`, or never for None."""
    payload = {
        "session_id": session,
        "idle_kind": "ended" if gap_s is None else "tool",
        "survival": [] if gap_s is None else [[gap_s, 1.0], [gap_s * 1.01, 0.0]],
        "p_return": 0.0 if gap_s is None else 1.0,
    }
    action = {"action_id": "a", "action_type": "cachewise.reuse", "action_version": "1.0"}
    return {
        "protocol_version": "0.1",
        "message_id": f"m-{next(_serial)}",
        "actions": [action | {"payload": payload | changes}],
    }


class Pod:
    """A scheduler, a clock that only moves when told, and histories that grow turn by turn."""

    def __init__(self, capacity_blocks: int) -> None:
        self.now = 1000.0
        tokens = capacity_blocks * BLOCK
        config = EngineConfig(BLOCK, tokens, tokens, max_num_batched_tokens=16)
        self.scheduler = Scheduler(config, clock=lambda: self.now)
        self.scheduler.reuse.call("capabilities")  # as a gateway does that will send hints

    def request(
        self, name: str, tokens: int, output: int = BLOCK, session: str | None = None
    ) -> Request:
        data = (name.encode() * 4000)[: (tokens + output) * BYTES_PER_TOKEN]
        return Request(
            f"r{next(_serial)}", tokens, output, block_hashes(data, BLOCK), self.now, session
        )

    def add(self, name: str, tokens: int, *, anonymous: bool = False) -> Request:
        request = self.request(name, tokens, session=None if anonymous else name)
        self.scheduler.add(request)
        return request

    def drain(self) -> None:
        while (step := self.scheduler.schedule()) is not None:
            self.scheduler.complete(step, self.now)
        assert not self.scheduler.has_work

    def turn(self, name: str, tokens: int, *, anonymous: bool = False) -> int:
        """Serve a request alone; its cached tokens."""
        request = self.add(name, tokens, anonymous=anonymous)
        self.drain()
        assert request.num_cached_tokens is not None
        return request.num_cached_tokens

    def hint(self, name: str, gap_s: float | None) -> None:
        reuse = self.scheduler.reuse
        (answer,) = reuse.hints.apply(*parse(envelope(name, gap_s)), self.now)
        assert answer.status == "applied"

    def evicted(self, name: str) -> int:
        session = self.scheduler.reuse.sessions.get(name)
        return session.evicted_blocks if session is not None else 0


@pytest.mark.parametrize("hinted", [False, True])
def test_under_pressure_the_session_expected_latest_is_evicted(hinted: bool) -> None:
    pod = Pod(24)
    for name, gap_s in (("soon", 5.0), ("late", 500.0)):
        pod.turn(name, 32)
        if hinted:
            pod.hint(name, gap_s)
        pod.now += 1
    pod.turn("other", 40)
    causes = pod.scheduler.reuse.queue.evictions
    evicted = pod.scheduler.pool.evicted_cached_blocks
    assert evicted > 0
    if hinted:  # the oldest stays, and from the session expected latest its tail goes
        assert (pod.evicted("soon"), pod.evicted("late")) == (0, evicted)
        assert causes == {"lru": 0, "forecast": evicted, "ended": 0, "superseded": 0}
        assert pod.turn("soon", 40) == 32
    else:
        assert (pod.evicted("soon"), pod.evicted("late")) == (evicted, 0)
        assert causes["lru"] == evicted
        assert pod.turn("soon", 40) < 32


def test_an_ended_session_goes_first() -> None:
    pod = Pod(24)
    for name, gap_s in (("alive", 900.0), ("ended", None)):
        pod.turn(name, 32)
        pod.hint(name, gap_s)
    pod.turn("other", 40, anonymous=True)
    assert pod.evicted("alive") == 0
    assert pod.evicted("ended") == pod.scheduler.reuse.queue.evictions["ended"] > 0


def cached_tokens_of_rounds(hinted: bool) -> tuple[int, int]:
    """Six sessions in turns, their working set twice the cache; cached tokens and evictions."""
    pod = Pod(48)
    cached, tokens = 0, dict.fromkeys("abcdef", 48)
    for _ in range(5):
        for name in tokens:
            cached += pod.turn(name, tokens[name])
            tokens[name] += BLOCK
            if hinted:
                pod.hint(name, len(tokens))
            pod.now += 1
    return cached, pod.scheduler.pool.evicted_cached_blocks


def test_hints_save_what_lru_loses_when_the_sessions_do_not_fit() -> None:
    (cached, evicted), (hinted_cached, hinted_evicted) = map(cached_tokens_of_rounds, (False, True))
    assert hinted_cached > 2 * max(cached, 100)
    assert hinted_evicted < 0.8 * evicted


@pytest.mark.parametrize("hinted", [False, True])
def test_with_hints_whoever_needs_fewest_blocks_goes_first(hinted: bool) -> None:
    pod = Pod(24)
    pod.turn("warm", 40)
    if hinted:
        pod.hint("warm", 5.0)
    running = pod.add("running", 48)
    step = pod.scheduler.schedule()
    assert step is not None
    cold = pod.add("cold", 60)
    pod.now += 1
    warm = pod.add("warm", 44)
    pod.scheduler.complete(step, pod.now)
    first: Request | None = None
    while first is None:
        step = pod.scheduler.schedule()
        assert step is not None
        first = next((r for r in step.scheduled if r is not running), None)
        pod.scheduler.complete(step, pod.now)
    assert first is (warm if hinted else cold)
    pod.drain()
    assert pod.scheduler.reuse.order.overtakes == hinted


def test_a_pod_of_full_size_counts_the_evicted_tokens_that_came_back() -> None:
    now = 0.0
    scheduler = Scheduler(EngineConfig(), clock=lambda: now)
    scheduler.reuse.hints.apply(*parse(envelope("another", 60.0)), now)
    prompt_tokens, size = 240_000, scheduler.config.block_size_tokens
    for start in (0, 100_000, 200_000, 0):  # three do not fit together
        now += 1
        hashes = range(start, start + prompt_tokens // size + 1)
        scheduler.add(Request(f"{start}", prompt_tokens, size, hashes, now, f"s{start}"))
        while (step := scheduler.schedule()) is not None:
            scheduler.complete(step, now)
    evicted = scheduler.pool.evicted_cached_blocks
    returned = scheduler.reuse.ledger.tokens
    assert evicted > 0
    assert 0 < returned[60] == returned[600] <= 1.1 * evicted * size


TURNS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 60), st.booleans()), max_size=25)


@settings(max_examples=60, deadline=None)
@given(TURNS)
def test_session_ids_alone_change_nothing(turns: list[tuple[str, int, bool]]) -> None:
    def play(*, anonymous: bool) -> list[Any]:
        pod, seen = Pod(20), []
        for name, tokens, alone in turns:
            request = pod.add(name, tokens, anonymous=anonymous)
            if alone:
                pod.drain()
            pod.now += 1
            seen.append(request)
        pod.drain()
        free = [b.block_id for b in pod.scheduler.pool.free_queue.get_all_free_blocks()]
        return [[(r.num_cached_tokens, r.num_preemptions) for r in seen], free]

    assert play(anonymous=False) == play(anonymous=True)


class HintedPod(RuleBasedStateMachine):
    """Requests, hints, aborts and time in any order; blocks and turns must always add up."""

    def __init__(self) -> None:
        super().__init__()
        self.pod = Pod(20)
        self.alive: list[Request] = []

    @rule(name=st.sampled_from("abc"), tokens=st.integers(1, 50), known=st.booleans())
    def arrive(self, name: str, tokens: int, known: bool) -> None:
        self.alive.append(self.pod.add(name, tokens, anonymous=not known))

    @rule(
        name=st.sampled_from("abc"),
        gap_s=st.one_of(st.none(), st.floats(0.1, 5000)),
    )
    def hint(self, name: str, gap_s: float | None) -> None:
        self.pod.hint(name, gap_s)

    @rule(steps=st.integers(1, 20))
    def work(self, steps: int) -> None:
        for _ in range(steps):
            step = self.pod.scheduler.schedule()
            if step is None:
                break
            self.pod.scheduler.complete(step, self.pod.now)
        self.alive = [r for r in self.alive if not r.finished]

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.alive))
        self.alive.remove(request)
        self.pod.scheduler.abort(request)

    @rule(seconds=st.floats(0, 2000))
    def wait(self, seconds: float) -> None:
        self.pod.now += seconds

    @invariant()
    def every_block_is_in_exactly_one_place(self) -> None:
        scheduler = self.pod.scheduler
        free = [b.block_id for b in scheduler.pool.free_queue.get_all_free_blocks()]
        held = {b.block_id for r in scheduler.running for b in r.blocks}
        assert len(free) == len(set(free)) == scheduler.pool.num_free_blocks
        assert not held & set(free)
        assert held | set(free) == set(range(1, 21))

    @invariant()
    def open_turns_are_the_requests_alive(self) -> None:
        turns = sum(s.open_turns for s in self.pod.scheduler.reuse.sessions)
        assert turns == sum(r.session_id is not None for r in self.alive)
        assert len(self.pod.scheduler.reuse.order) <= len(self.alive)

    def teardown(self) -> None:
        pod, reuse = self.pod, self.pod.scheduler.reuse
        pod.drain()
        assert len(reuse.order) == 0
        pod.now += 100_000
        for name in "xyz":  # strangers take every block
            pod.turn(name, 76, anonymous=True)
        pod.now += 10
        pod.turn("z", 1, anonymous=True)
        assert len(reuse.sessions) == 0
        assert list(reuse.queue.groups()) == []


TestHintedPod = HintedPod.TestCase
TestHintedPod.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


# --- over HTTP ---


@pytest.fixture
async def client(fleet: EmbeddedFleet) -> Any:
    async with httpx.AsyncClient(base_url=fleet.urls[0], timeout=30) as client:
        yield client


async def test_the_gateways_probe_sees_that_the_pod_takes_hints(
    fleet: EmbeddedFleet, client: httpx.AsyncClient
) -> None:
    result = await probe(client, fleet.urls[0], None, 5.0)
    assert result.capabilities.kv_hints
    capabilities = (await client.get("/v1/kv_hints/capabilities")).json()
    assert capabilities["active"] is True
    assert (capabilities["block_size"], capabilities["capacity_tokens"]) == (16, 65_536)
    assert capabilities["actions"] == {"kv.retain": ["1.0"], "cachewise.reuse": ["1.0"]}


async def test_a_hint_is_answered_and_shows_in_sessions_and_metrics(
    client: httpx.AsyncClient,
) -> None:
    await client.get("/v1/kv_hints/capabilities")
    await client.post("/v1/chat/completions", json=HELLO | {"session_id": "s"})
    message = envelope("s", 60.0)
    answer = await client.post("/v1/kv_hints", json=message)
    assert answer.json() == {
        "protocol_version": "0.1",
        "message_id": message["message_id"],
        "results": [{"action_id": "a", "status": "applied"}],
    }
    (row,) = (await client.get("/v1/kv_hints/sessions")).json()["sessions"]
    assert (row["session_id"], row["idle_kind"], row["engine"]) == ("s", "tool", 0)
    assert row["resident_blocks"] > 0
    assert 0 < row["expected_reuse_s"] <= 61
    metrics = (await client.get("/metrics")).text
    labels = 'action="cachewise.reuse",engine="0",result="applied"'
    assert f"cachewise:hints_total{{{labels}}} 1.0" in metrics
    assert 'cachewise:evicted_blocks_total{cause="lru",engine="0"} 0.0' in metrics


async def test_a_request_may_bring_the_hint_for_the_gap_after_it(client: httpx.AsyncClient) -> None:
    body = HELLO | {"kv_hints": envelope("s", 60.0)}
    for path in ("/v1/chat/completions", "/v1/messages"):
        await client.post(path, json=body | {"max_tokens": 99}, headers={"x-session-id": "s"})
    (row,) = (await client.get("/v1/kv_hints/sessions")).json()["sessions"]
    assert (row["session_id"], row["idle_kind"]) == ("s", "unknown")  # the second message is a copy
    fresh = HELLO | {"kv_hints": envelope("s", 60.0)}
    await client.post("/v1/chat/completions", json=fresh, headers={"x-session-id": "s"})
    (row,) = (await client.get("/v1/kv_hints/sessions")).json()["sessions"]
    assert row["idle_kind"] == "tool"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"p_return": 1.5}, "p_return"),
        ({"survival": [[1.0, 0.5], [2.0, 0.6]]}, "survival[1][1]"),
        ({"session_id": "x" * 300}, "session_id"),
    ],
)
async def test_a_bad_hint_is_refused_by_the_name_of_its_field(
    fleet: EmbeddedFleet, client: httpx.AsyncClient, changes: dict[str, Any], field: str
) -> None:
    bad, where = envelope("s", 60.0, **changes), f"actions[0].payload.{field}"
    answer = await client.post("/v1/kv_hints", json=bad)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, where)
    answer = await client.post("/v1/chat/completions", json=HELLO | {"kv_hints": bad})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"kv_hints.{where}")
    assert len(fleet.pods[0].scheduler.reuse.sessions) == 0


async def test_kv_hints_of_another_type_are_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=HELLO | {"kv_hints": 3})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kv_hints.body")
