"""KV events of real vLLM pods with a small cache: what the gateway knows of it is what vLLM finds
there."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.fleet.kv_events import Subscription
from gateway.fleet.ledger import Ledger
from tests.engine import pods as servers
from tests.engine_patch.conftest import Pod, Pods
from tests.served import gateway_over, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

BLOCK = servers.BLOCK_SIZE_TOKENS
NUM_BLOCKS = 600
SETTLED_S = 0.5
"""Events follow an answer within much less."""
SESSIONS, TURNS, FIRST_TOKENS, MORE_TOKENS = 12, 5, 1_600, 200


@pytest.fixture(params=["stock", "patched"])
def pod(pods: Pods, request: pytest.FixtureRequest) -> Pod:
    """One of them, with an empty cache."""
    chosen: Pod = getattr(pods, request.param)
    assert chosen.client.post("/reset_prefix_cache").json()["success"]
    return chosen


@asynccontextmanager
async def following(pod: Pod) -> AsyncIterator[tuple[Ledger, Counter[str]]]:
    assert pod.kv_events is not None
    ledger, troubles = Ledger(), Counter[str]()

    def count(trouble: str) -> None:
        troubles[trouble] += 1

    task = asyncio.create_task(Subscription("pod", *pod.kv_events, ledger, count).run())
    try:
        await until(lambda: ledger.live)
        yield ledger, troubles
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def cached_tokens(pod: Pod, ledger: Ledger, prompt: list[int], session: str) -> int:
    """Run a prompt, of which something is new; how many of its tokens vLLM has found in its cache.
    Then the ledger has heard of all of it."""
    body = {"model": servers.MODEL, "prompt": prompt, "max_tokens": 1}
    answer = await asyncio.to_thread(
        pod.client.post, "/v1/completions", json=body, headers={"x-session-id": session}
    )
    assert answer.status_code == 200, answer.text
    details: dict[str, int] = answer.json()["usage"]["prompt_tokens_details"]
    await until(lambda: ledger.tokens(session) == len(prompt) // BLOCK * BLOCK)
    return details["cached_tokens"]


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 250) for _ in range(count)]


async def test_a_session_finds_in_the_cache_what_its_ledger_says(pod: Pod) -> None:
    """More sessions than fit, each with a prompt of its own that grows: of each turn just the
    tokens are cached that the events said."""
    rng = random.Random(1)
    prompts = {f"own-{n}": tokens(rng, FIRST_TOKENS) for n in range(SESSIONS)}
    async with following(pod) as (ledger, troubles):
        partly = 0
        for turn in range(TURNS):
            for session in rng.sample(sorted(prompts), SESSIONS - 3):
                known = ledger.tokens(session)
                cached = await cached_tokens(pod, ledger, prompts[session], session)
                if known is None:
                    assert cached == 0
                else:
                    assert cached == known, f"{session} in turn {turn}"
                    partly += 0 < known < len(prompts[session]) // 2
                prompts[session] += tokens(rng, MORE_TOKENS)
        assert partly  # some were cut short
        assert len(ledger) <= NUM_BLOCKS
        assert set(troubles) <= {"replayed"}

        # One that listens from now on is told all that was before.
        async with following(pod) as (other, late):
            assert late["replayed"] > 0
            assert {s: other.tokens(s) for s in prompts} == {s: ledger.tokens(s) for s in prompts}

        assert pod.client.post("/reset_prefix_cache").json()["success"]
        # vLLM publishes at its next step.
        assert await cached_tokens(pod, ledger, tokens(rng, 64), "another") == 0
        assert {ledger.tokens(session) for session in prompts} == {0}


async def test_sessions_that_share_a_beginning_have_it_from_each_other(pod: Pod) -> None:
    rng = random.Random(2)
    system = tokens(rng, 10 * BLOCK)
    async with following(pod) as (ledger, _):
        for n in range(3):
            prompt = system + tokens(rng, 4 * BLOCK)
            cached = await cached_tokens(pod, ledger, prompt, f"shares-{n}")
            assert cached == (10 * BLOCK if n else 0)
        assert len(ledger) == 10 + 3 * 4


async def test_the_gateway_knows_what_its_pod_holds(pod: Pod) -> None:
    assert pod.kv_events is not None
    endpoint, replay = pod.kv_events
    url = str(pod.client.base_url).rstrip("/")
    settings: dict[str, Any] = {
        "pods": [{"url": url, "name": "a", "kv_events": endpoint, "kv_events_replay": replay}]
    }
    messages = [{"role": "user", "content": "Why does the build fail? " + "Look closely. " * 60}]
    async with gateway_over(**settings) as gateway:
        (served,) = gateway.gateway.fleet
        ledger = served.residency.ledger
        assert ledger is not None
        await until(lambda: ledger.live)
        before = 0
        headers = {"x-session-id": "through", "content-type": "application/json"}
        for _ in range(3):
            body = {"model": servers.MODEL, "messages": messages, "max_tokens": 8}
            reply = await gateway.post("chat", body, headers=headers)
            assert reply.status == 200, reply.text
            await asyncio.sleep(SETTLED_S)
            (session,) = gateway.gateway.sessions
            assert session.usage is not None
            known = served.residency.tokens(session.sid)
            assert served.residency.knows(session.sid)
            prompt_tokens = session.usage.prompt_tokens
            assert known - prompt_tokens <= 8
            assert known >= prompt_tokens // BLOCK * BLOCK
            assert session.usage.cached_tokens == before
            before = known
            messages.append(reply.json["choices"][0]["message"] | {"tool_calls": []})
            messages.append({"role": "user", "content": "And why else?"})
        listed = (await gateway.get("/v1/cachewise/pods")).json["data"][0]
        assert listed["kv_events"] is True
        assert await gateway.metric('cachewise_pod_kv_events_live{pod="a"}') == 1
