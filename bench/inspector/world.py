"""A gateway over embedded pods too small for all of a crowd of agents, on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from bench.inspector.agents import World
from gateway import cli
from gateway.app import App, create_app
from gateway.config import EmbeddedSettings, ForecastSettings, Settings

PODS = 4
KV_CAPACITY_TOKENS = 400_000
SPEEDUP = 2.0


@asynccontextmanager
async def crowded_gateway(seconds: float) -> AsyncIterator[tuple[World, App]]:
    """The gateway and a world for agents that ends after so many seconds."""
    settings = Settings(
        port=0,
        embedded=EmbeddedSettings(
            pods=PODS, kv_capacity_tokens=KV_CAPACITY_TOKENS, speedup=SPEEDUP
        ),
        forecast=ForecastSettings(state_file=None),
    )
    app = create_app(settings)
    listening = cli.listen(settings)
    server = cli.server(settings, app)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=seconds + 300)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
            while not server.started:
                await asyncio.sleep(0.05)
            yield World(url, client, asyncio.get_running_loop().time() + seconds), app
    finally:
        server.should_exit = True
        await serving
