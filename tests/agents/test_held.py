"""Codex, unmodified, while its turn is held for longer than it waits for an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.connect import CLIENTS
from gateway.embedded.fleet import EmbeddedFleet
from gateway.embedded.scheduler import EngineConfig
from tests.agents.clients import CODEX, Client
from tests.agents.conftest import Workplace, finish
from tests.agents.script import prompt, turn
from tests.crowded import agent_body, held, of
from tests.served import gateway_over, until

pytestmark = [pytest.mark.agents, pytest.mark.timeout(600)]

KV_TOKENS = 40_000
IDLE_LIMIT_MS = 2_000
HELD_S = 5.0


async def test_codex_waits_for_a_place_beyond_its_own_limit_and_does_not_try_again(
    install: Callable[[Client], Path], workplace: Workplace
) -> None:
    program = install(CODEX)
    engine = EngineConfig(kv_capacity_tokens=KV_TOKENS, max_model_len=KV_TOKENS)
    async with (
        EmbeddedFleet(pods=1, speedup=1, config=engine) as fleet,
        gateway_over(*fleet.urls, admission={"heartbeat_s": 0.5}) as gateway,
    ):
        setup = next(client.setup for client in CLIENTS if client.name == "Codex")
        config = setup.format(url=gateway.url, model="embedded", key="any")
        folder = workplace.home / ".codex"
        folder.mkdir()
        (folder / "config.toml").write_text(f"{config}\nstream_idle_timeout_ms = {IDLE_LIMIT_MS}\n")
        body = agent_body("chat", "first", "embedded", tokens=30_000)
        endless = of("first", final=True) | {"x-embedded-script": '{"output_tokens": 4000}'}
        first = asyncio.create_task(gateway.post("chat", body, headers=endless))
        await until(lambda: any(pod.in_flight for pod in gateway.gateway.fleet))
        codex = workplace.start(
            *(program, "exec", "--skip-git-repo-check"),
            prompt("Say something.", turn(text="All done.")),
            RUST_LOG="warn",
            CACHEWISE_KEY="any",
        )
        answered = asyncio.create_task(asyncio.to_thread(finish, codex))
        await until(lambda: held(gateway) == 1 or answered.done())
        await asyncio.sleep(HELD_S)
        assert held(gateway) == 1
        first.cancel()
        out, err = await answered
        assert out.strip() == "All done."
        assert "Reconnecting" not in err
        released = 'cachewise_hold_seconds_count{hold_end="released"}'
        assert await gateway.metric(released) == 1
        assert await gateway.metric('cachewise_hold_seconds_count{hold_end="client_gone"}') == 0
