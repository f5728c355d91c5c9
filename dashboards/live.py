"""A small fleet under load, watched by a real Prometheus: for the boards' pictures and their test.

Embedded pods, two replicas of the gateway that share a Redis, made-up agents and trouble.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import httpx
import yaml

from dashboards.agents import MODEL, Agent, make_trouble
from gateway.embedded.fleet import EmbeddedFleet
from gateway.embedded.scheduler import EngineConfig

RULES: Final = Path(__file__).resolve().parents[1] / "k8s" / "chart" / "rules"
PODS: Final = 3
REPLICAS: Final = 2
ENGINE: Final = EngineConfig(kv_capacity_tokens=48_000, max_model_len=40_000)
"""A cache for a few sessions, so that some must wait and some are evicted."""
SCRAPE_S: Final = 1


@dataclass(frozen=True)
class Series:
    """One series of an answer. Times in seconds since the epoch."""

    labels: dict[str, str]
    times: list[float]
    values: list[float]


class Prometheus:
    """The HTTP API of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self.client = httpx.AsyncClient(base_url=url, timeout=30, trust_env=False)

    async def _get(self, path: str, **parameters: object) -> Any:
        reply = await self.client.post(f"/api/v1/{path}", data=parameters)
        answer = reply.json()
        if answer["status"] != "success":
            raise ValueError(f"{parameters}: {answer['error']}")
        return answer["data"]

    async def over(self, expr: str, start: float, end: float, step_s: float) -> list[Series]:
        """The series of a query over a time, without what is not a number."""
        found = await self._get("query_range", query=expr, start=start, end=end, step=step_s)
        series = []
        for one in found["result"]:
            points = [(t, float(value)) for t, value in one["values"]]
            points = [(t, value) for t, value in points if math.isfinite(value)]
            if points:
                times, values = zip(*points, strict=True)
                series.append(Series(one["metric"], list(times), list(values)))
        return series

    async def names(self) -> set[str]:
        """Every metric's name."""
        reply = await self.client.get("/api/v1/label/__name__/values")
        return set(reply.json()["data"])

    async def rules(self) -> list[dict[str, Any]]:
        """Every rule as loaded, with its health and last error."""
        reply = await self.client.get("/api/v1/rules")
        return [rule for group in reply.json()["data"]["groups"] for rule in group["rules"]]

    async def ready(self) -> bool:
        try:
            return (await self.client.get("/-/ready")).status_code == 200
        except httpx.TransportError:
            return False


@dataclass
class Live:
    """A fleet at work, and its Prometheus."""

    prometheus: Prometheus
    gateway_urls: list[str]
    pods: EmbeddedFleet
    began_at: float

    @asynccontextmanager
    async def at_work(self, agents: int = 24) -> AsyncIterator[None]:
        """Load as long as the context lasts. Raises what went wrong in an agent."""
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0))
                )
                for url in self.gateway_urls
            ]
            crew = [Agent(clients, number).run() for number in range(agents)]
            tasks = [asyncio.create_task(one) for one in (*crew, make_trouble(clients[0]))]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
        for result in ended:
            if isinstance(result, Exception):
                raise result

    async def lose_a_pod(self) -> None:
        await self.pods.kill(PODS - 1)

    async def interrupt_events(self) -> None:
        """Break the KV events of one pod off for a second; then what was missed is replayed."""
        events = self.pods.events[0]
        events.close()
        await asyncio.sleep(1)
        events.open()


@asynccontextmanager
async def live(folder: Path) -> AsyncIterator[Live]:
    """Start it all; files and logs go into ``folder``."""
    async with (
        EmbeddedFleet(pods=PODS, model=MODEL, speedup=6.0, config=ENGINE, kv_events=True) as pods,
        redis(folder) as redis_url,
        AsyncExitStack() as stack,
    ):
        logs = []
        for number in range(REPLICAS):
            settings = {
                "port": 0,
                "pods": [
                    {
                        "url": url,
                        "name": f"pod-{n}",
                        "kv_events": events.endpoint,
                        "kv_events_replay": events.replay_endpoint,
                    }
                    for n, (url, events) in enumerate(zip(pods.urls, pods.events, strict=True))
                ],
                "models": {"aliases": {"*": MODEL}},
                "forecast": {
                    "state_file": str(folder / f"forecast-{number}.npz"),
                    "save_interval_s": 2,
                },
                "probe": {"interval_s": 0.5},
                "sharing": {"redis_url": redis_url},
                "log": {"level": "error"},
            }
            config = folder / f"cachewise-{number}.yaml"
            config.write_text(yaml.safe_dump(settings))
            command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(config)]
            logs.append(folder / f"gateway-{number}.log")
            await stack.enter_async_context(process(command, logs[-1]))
        urls = [await _address(log) for log in logs]
        async with prometheus(folder, urls, pods.urls) as watching:
            yield Live(watching, urls, pods, time.time())


@asynccontextmanager
async def redis(folder: Path) -> AsyncIterator[str]:
    """A Redis that keeps nothing on disk; its address."""
    port = _free_port()
    command = [shutil.which("redis-server") or "redis-server", "--port", str(port)]
    command += [*("--bind", "127.0.0.1", "--save", ""), "--dir", str(folder)]
    async with process(command, folder / "redis.log"):
        yield f"redis://127.0.0.1:{port}/0"


@asynccontextmanager
async def prometheus(
    folder: Path, gateway_urls: Sequence[str], pod_urls: Sequence[str]
) -> AsyncIterator[Prometheus]:
    """Prometheus, set up as in compose.yaml but for the interval: the gateway's own label `pod` is
    kept, and the pods are given the same."""
    pods = [
        {"targets": [url.partition("//")[2]], "labels": {"pod": f"pod-{number}"}}
        for number, url in enumerate(pod_urls)
    ]
    gateway = [{"targets": [url.partition("//")[2] for url in gateway_urls]}]
    every = f"{SCRAPE_S}s"
    config = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(RULES / "*.yaml")],
        "scrape_configs": [
            {"job_name": "cachewise", "honor_labels": True, "static_configs": gateway},
            {"job_name": "vllm", "static_configs": pods},
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    port = _free_port()
    command = [
        shutil.which("prometheus") or "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    async with process(command, folder / "prometheus.log"):
        watching = Prometheus(f"http://127.0.0.1:{port}")
        try:
            async with asyncio.timeout(20):
                while not await watching.ready():
                    await asyncio.sleep(0.1)
            yield watching
        finally:
            await watching.client.aclose()


@asynccontextmanager
async def process(command: Sequence[str], log: Path) -> AsyncIterator[None]:
    """A program that runs as long as the context lasts."""
    with log.open("wb") as out:
        started = await asyncio.create_subprocess_exec(
            *command, stdout=out, stderr=out, env=dict(os.environ)
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.terminate()
        try:
            async with asyncio.timeout(10):
                await started.wait()
        except TimeoutError:
            started.kill()
            await started.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


async def _address(log: Path) -> str:
    """Where the gateway says that it listens."""
    async with asyncio.timeout(30):
        while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            await asyncio.sleep(0.1)
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(30):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{found[0]}/ready")).status_code == 200:
                    return found[0]
            await asyncio.sleep(0.1)
