"""A pod is added, one is drained, one is killed, under load: `python -m bench.fleet`.

Everything is real but the GPU: a gateway and embedded pods in a process of their own, agents over
HTTP in this one. Prints a table and writes JSON and a plot.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json as json_
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import aiohttp
import orjson
import typer
from rich.console import Console

from bench.fleet import report
from bench.fleet.agents import Agents

RESULTS = Path(__file__).resolve().parents[1] / "results"
PODS = 3


class Fleet:
    """The process under load."""

    def __init__(self, speedup: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.fleet.served", str(PODS), str(speedup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url: str = self._heard()["url"]

    def _heard(self) -> dict[str, str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the gateway has ended")
        heard: dict[str, str] = json_.loads(line)
        return heard

    async def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        await asyncio.to_thread(self._heard)

    def stop(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@asynccontextmanager
async def load(fleet: Fleet, sessions: int, seed: int) -> AsyncIterator[Agents]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as client:
        agents = Agents(fleet.url, client, seed)
        running = asyncio.create_task(agents.run(sessions))
        try:
            yield agents
        finally:
            agents.stopping = True
            await running


async def pod_takes_turns(client: aiohttp.ClientSession, url: str, name: str) -> None:
    async with asyncio.timeout(20):
        while True:
            async with client.get(f"{url}/ready") as response:
                if (await response.json())["pods"].get(name):
                    return
            await asyncio.sleep(0.02)


async def run(
    fleet: Fleet, sessions: int, phase_s: float, seed: int
) -> tuple[Agents, dict[str, float]]:
    """Four phases; what happens when."""
    marks: dict[str, float] = {}
    async with load(fleet, sessions, seed) as agents:
        await asyncio.sleep(phase_s)
        marks["added"] = agents.now_s
        await fleet.tell("add")
        await pod_takes_turns(agents.client, fleet.url, f"pod-{PODS}")
        marks["ready"] = agents.now_s
        await asyncio.sleep(phase_s)
        async with agents.client.post(f"{fleet.url}/v1/cachewise/pods/pod-0/drain") as answer:
            answer.raise_for_status()
        marks["drained"] = agents.now_s
        await asyncio.sleep(phase_s)
        marks["killed"] = agents.now_s
        await fleet.tell("kill pod-1")
        await asyncio.sleep(phase_s)
        marks["end"] = agents.now_s
    return agents, marks


def main(
    sessions: Annotated[int, typer.Option(help="at once", min=1)] = 48,
    phase_s: Annotated[float, typer.Option(help="length of each phase", min=1)] = 20.0,
    speedup: Annotated[float, typer.Option(help="of the pods' modelled GPU", min=0.1)] = 4.0,
    seed: Annotated[int, typer.Option()] = 1,
    json: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS / "fleet.json",
    plot: Annotated[Path, typer.Option(help="where the plot goes")] = RESULTS / "fleet.png",
) -> None:
    """Measure what agents notice when pods come, leave and die."""
    fleet = Fleet(speedup)
    try:
        agents, marks = asyncio.run(run(fleet, sessions, phase_s, seed))
    finally:
        fleet.stop()
    pods = {"added": f"pod-{PODS}", "drained": "pod-0", "killed": "pod-1"}
    made = report.figures(agents.turns, marks, pods)
    settings = {"sessions": sessions, "phase_s": phase_s, "speedup": speedup, "seed": seed}
    json.parent.mkdir(parents=True, exist_ok=True)
    failed = [dataclasses.asdict(turn) for turn in agents.turns if turn.failed]
    result = {"settings": settings, "marks": marks, **made, "failed_turns": failed}
    json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    report.plot(agents.turns, marks, plot)
    console = Console(width=None if sys.stdout.isatty() else 110)
    for one in report.table(made):
        console.print(one)


if __name__ == "__main__":
    typer.run(main)
