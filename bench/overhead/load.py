"""The load generator: a closed loop over warm connections, in a process of its own.

The window is counted here, between warm-up and the last response, so that the contender's CPU time
and the requests it served are read at the same moments.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp
import psutil
import uvloop

from bench.bodies import AgentSession, chat_body
from bench.overhead.mock_engine import COMPLETION, STREAM

AGENT_MIDDLE_TURN = 100  # the turn at which a body is about 400 kB


@dataclass(frozen=True)
class Workload:
    """Requests are per worker: each of `workers` sends its own, one after the other."""

    name: str
    title: str
    workers: int
    warmup: int
    counted: int
    bar: float  # allowed CPU time, as a multiple of sglang-router's


# One request at a time: what a request costs on its own, as the bars were measured. With several at
# once the Rust routers' threads share their wake-ups and every contender's figures fall.
WORKLOADS = (
    Workload("json_1k", "1 kB JSON", workers=1, warmup=50, counted=1500, bar=3.0),
    Workload("agent_400k", "400 kB agent body", workers=1, warmup=4, counted=100, bar=1.5),
    Workload("stream_100", "100-chunk stream", workers=1, warmup=2, counted=30, bar=1.75),
)


@dataclass(frozen=True)
class Window:
    """One counted window. CPU and RSS are 0 where no process was named."""

    requests: int
    cpu_s: float
    rss_bytes: int
    latencies_s: tuple[float, ...]
    reads: float  # times a response body was readable, a request


def _bodies(workload: Workload, worker: int, round_: int) -> Iterator[bytes]:
    """Every round has bodies of its own, the same for all contenders."""
    seed = (round_ + 1) * 1_000 + worker
    count = workload.warmup + workload.counted
    if workload.name == "agent_400k":
        session = AgentSession(seed)
        first = AGENT_MIDDLE_TURN - workload.warmup - workload.counted // 2
        session.body(first + count - 1)  # all text is made before the window
        return (session.body(turn) for turn in range(first, first + count))
    stream = workload.name == "stream_100"
    return iter([chat_body(seed * 100_000 + i, stream=stream) for i in range(count)])


def tree_usage(pid: int) -> tuple[float, int]:
    """CPU seconds (user + system) and RSS bytes of a process and its descendants."""
    root = psutil.Process(pid)
    cpu_s, rss_bytes = 0.0, 0
    for process in (root, *root.children(recursive=True)):
        times = process.cpu_times()
        cpu_s += times.user + times.system
        rss_bytes += process.memory_info().rss
    return cpu_s, rss_bytes


async def _send(client: aiohttp.ClientSession, url: str, body: bytes) -> tuple[float, int]:
    started = time.perf_counter()
    parts: list[bytes] = []
    headers = {"content-type": "application/json"}
    async with client.post(url, data=body, headers=headers) as response:
        async for part in response.content.iter_any():
            parts.append(part)  # noqa: PERF401
    latency_s = time.perf_counter() - started
    answer = b"".join(parts)
    streamed = response.content_type == "text/event-stream"
    complete = answer == STREAM if streamed else len(answer) >= len(COMPLETION)
    if response.status != 200 or not complete:
        raise RuntimeError(f"{url} answered {response.status}: {answer[:300]!r}")
    return latency_s, len(parts)


async def _measure(url: str, pid: int | None, workload: Workload, round_: int) -> Window:
    bodies = [_bodies(workload, worker, round_) for worker in range(workload.workers)]
    latencies_s: list[float] = []
    reads = 0
    connector = aiohttp.TCPConnector(limit=workload.workers)
    async with aiohttp.ClientSession(connector=connector) as client:

        async def work(worker: int, requests: int) -> None:
            nonlocal reads
            for _ in range(requests):
                latency_s, parts = await _send(client, url, next(bodies[worker]))
                latencies_s.append(latency_s)
                reads += parts

        workers = range(workload.workers)
        await asyncio.gather(*(work(worker, workload.warmup) for worker in workers))
        latencies_s.clear()
        reads = 0
        before_s, _ = tree_usage(pid) if pid else (0.0, 0)
        await asyncio.gather(*(work(worker, workload.counted) for worker in workers))
        after_s, rss_bytes = tree_usage(pid) if pid else (0.0, 0)
    requests = len(latencies_s)
    return Window(requests, after_s - before_s, rss_bytes, tuple(latencies_s), reads / requests)


def measure(base_url: str, pid: int | None, workload: Workload, round_: int) -> Window:
    """Run one window of `workload` against `base_url`, watching process `pid`.

    Raises RuntimeError at the first answer that is not whole.
    """
    return uvloop.run(_measure(f"{base_url}/v1/chat/completions", pid, workload, round_))
