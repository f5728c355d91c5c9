"""A crowd of agents on pods too small for it, while things break: pods, clients, the policy."""

import asyncio
import json
import random
from collections import Counter
from typing import Any

import aiohttp
import pytest

from gateway.admission import Admission
from gateway.conductor import Conductor
from gateway.embedded.fleet import EmbeddedFleet
from gateway.foresight import Foresight
from gateway.hints import HintSender
from tests.crowded import AGENT_WIRES, ENGINE, agent_body, held, nothing_left, of
from tests.served import PATHS, Reply, Running, gateway_over, until
from tests.test_soak import judge

SESSIONS = 60
TURNS = 3
FAULTS = {
    Admission: ("arrive", "_hold", "_fill", "_admit", "_make_room", "end", "tick"),
    Conductor: ("arrive", "end"),
    HintSender: ("send",),
    Foresight: ("fell_idle", "came_back", "given_up"),
}


async def agent(gateway: Running, client: aiohttp.ClientSession, n: int) -> list[str]:
    """A session of a few turns; some leave in the middle of one."""
    rng = random.Random(n)
    wire, stream = AGENT_WIRES[n % 3], rng.random() < 0.7
    seen = []
    for k in range(TURNS):
        body = agent_body(wire, f"s{n}", "embedded", tokens=rng.randint(500, 7000), stream=stream)
        headers = of(f"s{n}", final=k == TURNS - 1) | {
            "x-embedded-script": json.dumps({"output_tokens": rng.randint(5, 60)})
        }
        patience_s = rng.random() / 2 if rng.random() < 0.2 else None
        try:
            async with (
                asyncio.timeout(patience_s),
                client.post(gateway.url + PATHS[wire], json=body, headers=headers) as response,
            ):
                reply = await Reply.read(response)
        except TimeoutError:
            seen.append("left")
            continue
        if reply.status == 429:
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            seen.append("refused")
            continue
        if reply.status == 500 and b"EngineCore" in reply.data:
            seen.append("error")  # the dying pod's own
            continue
        reply.data = reply.data.replace(b": held\n\n", b"")
        seen.append(judge(wire, stream, reply))
    return seen


@pytest.mark.parametrize("faulty", [False, True])
async def test_a_crowd_leaves_nothing_behind(faulty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    injected = Counter[str]()
    for owner, names in FAULTS.items() if faulty else ():
        for name in names:
            monkeypatch.setattr(owner, name, sometimes(owner, name, rng, injected))
    options = {"heartbeat_s": 0.1, "max_hold_s": 20, "max_hold_unstreamed_s": 20}
    async with (
        EmbeddedFleet(pods=3, speedup=8, config=ENGINE) as fleet,
        gateway_over(
            *fleet.urls,
            admission=options,
            probe={"interval_s": 0.2, "unhealthy_after": 1},
        ) as gateway,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        most_held = 0

        async def die_in_the_middle() -> None:
            nonlocal most_held
            await until(lambda: held(gateway) > SESSIONS // 4)
            most_held = held(gateway)
            await fleet.kill(1)

        killing = asyncio.create_task(die_in_the_middle())
        crowd = await asyncio.gather(*(agent(gateway, client, n) for n in range(SESSIONS)))
        await killing
        results = Counter(result for seen in crowd for result in seen)
        assert results.total() == SESSIONS * TURNS
        assert results["complete"] > SESSIONS * TURNS // 2, results
        assert results["left"] > 0
        monkeypatch.undo()
        await until(lambda: nothing_left(gateway))
        assert not gateway.gateway.loop.waiting
        assert not gateway.gateway.loop.open
        degraded = sum(
            child._value.get() for child in gateway.gateway.metrics.degraded._metrics.values()
        )
        if faulty:
            assert injected.total() > 20, injected
            assert set(injected) >= {"Admission.end", "Admission.arrive", "HintSender.send"}
            assert degraded > 0
        else:
            assert degraded == 0
            assert results["error"] <= SESSIONS * TURNS // 5, results


def sometimes(owner: Any, name: str, rng: random.Random, injected: Counter[str]) -> Any:
    """The method, failing now and then before it does anything, or after."""
    method = getattr(owner, name)

    def broken(*args: Any, **options: Any) -> Any:
        fate = rng.random()
        if fate < 0.02:
            injected[f"{owner.__name__}.{name}"] += 1
            raise RuntimeError("broken on purpose")
        result = method(*args, **options)
        if fate > 0.98:
            injected[f"{owner.__name__}.{name}"] += 1
            raise RuntimeError("broken on purpose, too late")
        return result

    return broken
