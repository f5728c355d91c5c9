"""What a pod says of its cache, heard by the gateway's own subscription over real ZeroMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from gateway.embedded import EmbeddedFleet, EngineConfig
from tests.embedded.test_pod import CHAT, pod_client, scripted
from tests.served import body_of, gateway_over, until
from tests.test_kv_events import Follower

SMALL = EngineConfig(kv_capacity_tokens=2_048, max_model_len=2_048)
"""Too small for all of the sessions."""
SESSIONS = [f"session-{n}" for n in range(6)]


class Sessions:
    """Some sessions of one pod that publishes its events."""

    def __init__(self, fleet: EmbeddedFleet) -> None:
        self.fleet = fleet
        self.random = Random(0)
        self.said: dict[str, list[Any]] = {sid: [] for sid in SESSIONS}

    async def turn(self, sid: str) -> int:
        """The session's next turn; how many tokens of its prompt were found in the cache."""
        said = self.said[sid]
        said.append({"role": "user", "content": f"{sid} asks: " + "and then? " * 40})
        body = {"messages": said, "session_id": sid}
        async with pod_client(self.fleet) as client:
            reply = await client.post(CHAT, json=body, headers=scripted(output_tokens=70))
        said.append(reply.json()["choices"][0]["message"])
        return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def turns(self, count: int) -> None:
        for sid in self.random.choices(SESSIONS, k=count):
            await self.turn(sid)

    async def heard_by(self, follower: Follower) -> None:
        events, ledger = self.fleet.events[0], follower.ledger
        await until(lambda: ledger.live and follower.subscription.heard == events.published)
        assert len(ledger) == self.fleet.pods[0].scheduler.pool.num_cached_blocks

    @asynccontextmanager
    async def following(self) -> AsyncIterator[Follower]:
        follower = Follower(self.fleet.events[0])
        task = asyncio.create_task(follower.subscription.run())
        try:
            await until(lambda: follower.ledger.live)
            yield follower
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def small_pod() -> AsyncIterator[Sessions]:
    async with EmbeddedFleet(pods=1, config=SMALL, speedup=500, kv_events=True) as fleet:
        yield Sessions(fleet)


async def test_what_its_events_say_is_what_its_sessions_then_find_in_the_cache() -> None:
    async with small_pod() as pod:
        await pod.turn(SESSIONS[0])
        async with pod.following() as follower:
            found = []
            for sid in pod.random.choices(SESSIONS, k=24):
                await pod.heard_by(follower)
                known = follower.ledger.tokens(sid)
                found.append((known or 0, await pod.turn(sid)))
        assert [k for k, _ in found] == [c for _, c in found]
        assert {bool(cached) for _, cached in found} == {True, False}
        assert pod.fleet.pods[0].scheduler.pool.evicted_cached_blocks > 0
        assert set(follower.troubles) == {"replayed"}


async def test_what_is_missed_while_they_are_interrupted_is_replayed() -> None:
    async with small_pod() as pod, pod.following() as follower:
        await pod.turns(6)
        await pod.heard_by(follower)
        replayed = follower.troubles["replayed"]
        pod.fleet.events[0].close()
        await until(lambda: not follower.ledger.live)
        await pod.turns(6)
        pod.fleet.events[0].open()
        await pod.heard_by(follower)
        assert set(follower.troubles) == {"replayed"}
        assert follower.troubles["replayed"] > replayed
        async with pod.following() as late:
            await pod.heard_by(late)
            assert {sid: late.ledger.tokens(sid) for sid in SESSIONS} == {
                sid: follower.ledger.tokens(sid) for sid in SESSIONS
            }


async def test_a_dead_pod_publishes_no_more() -> None:
    async with small_pod() as pod, pod.following() as follower:
        await pod.turn(SESSIONS[0])
        await pod.heard_by(follower)
        await pod.fleet.kill(0)
        await until(lambda: not follower.ledger.live)


async def test_the_gateway_follows_its_embedded_pods_if_asked() -> None:
    async with gateway_over(embedded={"pods": 1, "kv_events": True}) as gateway:
        await until(lambda: bool(gateway.gateway.fleet.able("embedded")))
        headers = {"content-type": "application/json", "x-session-id": "agent"}
        body = body_of("chat", "embedded") | {
            "messages": [{"role": "user", "content": "Why? " * 60}]
        }
        assert (await gateway.post("chat", body, headers=headers)).status == 200
        (session,) = gateway.gateway.sessions
        (pod,) = gateway.gateway.fleet
        await until(lambda: pod.residency.knows(session.sid))
