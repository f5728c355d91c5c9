"""What the inspector costs: the history of turns, always; the feed, while somebody watches.

Scripted agents work in real time through a gateway over embedded pods; each end of a turn in the
history is timed, and what it keeps is then kept as often as the bound allows. The feed is measured
over sessions in the store that wait for tools with a forecast and hold KV on pods.
"""

from __future__ import annotations

import asyncio
import statistics
import timeit
import tracemalloc
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from bench.inspector.agents import crowd
from bench.inspector.world import PODS, crowded_gateway
from gateway.config import Settings
from gateway.dialects import DIALECTS, parse
from gateway.dialects.turn import ToolCall, TurnOutcome, TurnRequest, Usage
from gateway.fleet.pod import Pod
from gateway.gateway import Gateway
from gateway.inspector.feed import Feed, Watcher
from gateway.turn_history import TOTAL_KEPT, TURNS_KEPT, Kept, TurnHistory

RESULTS = Path(__file__).resolve().parents[1] / "results"
NOW = 1_000.0


def main(
    seconds: Annotated[float, typer.Option(help="how long the agents work")] = 40.0,
    agents: Annotated[int, typer.Option(help="how many")] = 60,
    json: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS / "inspector.json",
) -> None:
    """Measure, print a table, write the figures."""
    kept, end_us = asyncio.run(watched_turns(agents, seconds))
    figures: dict[str, Any] = {
        "history": {
            "turns_seen": len(kept),
            "cpu_us_a_turn": round(end_us, 1),
            "bytes_a_turn": round(statistics.fmean(len(k.span) + len(k.reasons) for k in kept)),
            "turns_kept_a_session": TURNS_KEPT,
            "turns_kept": TOTAL_KEPT,
            "memory_mb": round(history_memory_mb(kept), 1),
        },
        "feed": [asyncio.run(feed_costs(number)) for number in (300, 3_000)],
    }
    json.parent.mkdir(parents=True, exist_ok=True)
    json.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")
    history = figures["history"]
    table = Table("history of turns", "")
    table.add_row(f"a turn, {PODS} pods weighed", f"{history['cpu_us_a_turn']} µs")
    table.add_row("its JSON", f"{history['bytes_a_turn']} bytes")
    table.add_row(f"{TOTAL_KEPT:,} turns, the bound", f"{history['memory_mb']} MB")
    console = Console()
    console.print(table)
    table = Table("feed, sessions", "first refresh", "all rows", "idle refresh", "1 in 10 changed")
    for row in figures["feed"]:
        table.add_row(
            f"{row['sessions']:,}",
            f"{row['first_ms']} ms",
            f"{row['snapshot_kb']} kB",
            f"{row['idle_ms']} ms",
            f"{row['tenth_ms']} ms",
        )
    console.print(table)


async def watched_turns(agents: int, seconds: float) -> tuple[list[Kept], float]:
    """What the history keeps of each turn of the agents, and the microseconds that keeping one of
    the latest takes: the best of many rounds, as other work on the machine only adds."""
    kept: list[Kept] = []
    ends: deque[tuple[Any, ...]] = deque(maxlen=200)
    async with crowded_gateway(seconds) as (world, app):
        history = app.gateway.history
        plain_end, plain_keep = history.end, history._keep

        def end(*arguments: Any) -> None:
            plain_end(*arguments)
            if arguments[0].turn is not None:
                ends.append(arguments)

        def keep(one: Kept) -> None:
            kept.append(Kept(one.sid, one.span, one.reasons))
            plain_keep(one)

        history.end = end  # type: ignore[method-assign, assignment]
        history._keep = keep  # type: ignore[method-assign, assignment]
        await crowd(world, agents, spread_s=seconds / 4)

    def again() -> None:
        history = TurnHistory(0.0)
        for arguments in ends:
            history.begin(arguments[0])
            history.end(*arguments)

    return kept, 1e6 * min(timeit.repeat(again, number=1, repeat=60)) / len(ends)


def history_memory_mb(kept: list[Kept]) -> float:
    """What a history at its bound takes, filled with copies of these turns."""
    tracemalloc.start()
    history = TurnHistory(0.0)
    for number in range(TOTAL_KEPT + 1_000):
        one = kept[number % len(kept)]
        sid = f"{number // TURNS_KEPT:032x}"
        history._keep(Kept(sid, bytes(bytearray(one.span)), bytes(bytearray(one.reasons))))
    size_mb = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    return size_mb


async def feed_costs(number: int) -> dict[str, Any]:
    """CPU time of refreshes over so many sessions that wait for tools."""
    gateway = Gateway(Settings())
    pods = [Pod(name=f"pod-{n}", url="", ready=True) for n in range(4)]
    for pod in pods:
        pod.residency.set_capacity(700_000)
        gateway.fleet.pods[pod.name] = pod
    for n in range(number):
        take_turn(gateway, pods[n % 4], n)
    feed = Feed(gateway)
    first_s = await feed.refresh(NOW)
    watcher = Watcher(feed)
    feed.watchers.add(watcher)
    frames = []
    while watcher.pending:
        frames.append(orjson.dumps(watcher.frame(0.0)))
    idle_s = min([await feed.refresh(NOW + 1 + n) for n in range(5)])
    tenth = []
    for round_number in range(5):
        for n in range(0, number, 10):
            take_turn(gateway, pods[n % 4], n, NOW + 10 + round_number)
        tenth.append(await feed.refresh(NOW + 10.5 + round_number))
    return {
        "sessions": number,
        "first_ms": round(1e3 * first_s, 1),
        "snapshot_kb": round(sum(map(len, frames)) / 1e3),
        "idle_ms": round(1e3 * idle_s, 2),
        "tenth_ms": round(1e3 * min(tenth), 1),
    }


def take_turn(gateway: Gateway, pod: Pod, number: int, now: float = NOW - 100) -> None:
    """A turn of one session, up to the forecast of the gap that follows."""
    headers = {b"x-session-id": b"session-%d" % number, b"user-agent": b"opencode/1"}
    turn = gateway.sessions.begin(headers, request(number), "default", 1, now)
    gateway.loop.gap_ended(turn, headers)
    calls = [ToolCall.of(f"call-{number}", "bash", '{"command": "pytest -q"}')]
    gateway.loop.gap_begins(turn.session, calls, "tool", pod, now)
    outcome = TurnOutcome(f"id-{number}", calls, "tool_calls", Usage(30_000, 200, 29_000))
    gateway.sessions.end(turn, outcome, now)
    turn.session.pod = pod.name
    pod.residency.touch(turn.session.sid, 700_000 // 200, [])


def request(number: int) -> TurnRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": f"task {number}"}]}
    return parse(DIALECTS[0], orjson.dumps(body))


if __name__ == "__main__":
    typer.run(main)
