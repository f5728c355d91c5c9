"""What ten thousand sessions of a hundred thousand tokens cost in memory.

Each session sends two turns of about 400 kB (200 messages), the second 2.6 % longer, through the
gateway's own parsing, session store, routing and residency, as a turn does, without the sockets.
"""

import gc
import time
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import orjson
import psutil
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.bodies import AgentSession
from gateway.ask import HEAD_SEGMENTS
from gateway.dialects import DIALECTS, parse
from gateway.dialects.turn import ToolCall, TurnOutcome, Usage
from gateway.fleet.pod import Pod
from gateway.routing import Arrival, choose
from gateway.sessions import SessionStore

RESULTS = Path(__file__).resolve().parents[1] / "results"
BAR_MB = 300
TURN = 100
TOKENS = 100_000
KV_CAPACITY_TOKENS = 700_000


def main(
    sessions: Annotated[int, typer.Option(help="sessions to hold")] = 10_000,
    json: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS / "memory.json",
    plot: Annotated[Path, typer.Option(help="where the plot goes")] = RESULTS / "memory.png",
) -> None:
    """Measure the growth of the process's resident memory."""
    console = Console()
    store = SessionStore(max_sessions=max(20_000, sessions), ttl_s=86_400)
    pods = [Pod(name=f"pod-{number}", url="", ready=True) for number in range(4)]
    for pod in pods:
        pod.residency.set_capacity(KV_CAPACITY_TOKENS)
    process = psutil.Process()
    take_turns(store, pods, seed=0)  # what the first turn makes once is not a session's
    gc.collect()
    before = process.memory_info().rss
    points: list[tuple[int, float]] = [(0, 0.0)]
    body_bytes = messages = 0
    started = time.process_time()
    for number in track(range(1, sessions + 1), description="Sessions", console=console):
        body_bytes, messages = take_turns(store, pods, seed=number)
        if number % max(1, sessions // 50) == 0:
            points.append((number, (process.memory_info().rss - before) / 1e6))
    cpu_s = time.process_time() - started
    gc.collect()
    grown_mb = (process.memory_info().rss - before) / 1e6
    assert len(store) == sessions + 1
    figures = {
        "sessions": sessions,
        "body_bytes": body_bytes,
        "messages": messages,
        "tokens": TOKENS,
        "grown_mb": round(grown_mb, 1),
        "bytes_per_session": round(grown_mb * 1e6 / sessions),
        "bar_mb": BAR_MB,
        "cpu_ms_per_turn_with_making_its_body": round(1e3 * cpu_s / (2 * sessions), 3),
        "points": points,
    }
    json.parent.mkdir(parents=True, exist_ok=True)
    json.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2))
    draw(points, plot)
    table = Table("sessions", "body", "messages", "grown", "a session", "bar")
    table.add_row(
        f"{sessions:,}",
        f"{body_bytes / 1e3:.0f} kB",
        str(messages),
        f"{grown_mb:.0f} MB",
        f"{grown_mb * 1e3 / sessions:.1f} kB",
        f"{BAR_MB} MB at 10,000",
    )
    console.print(table)


def take_turns(store: SessionStore, pods: list[Pod], seed: int) -> tuple[int, int]:
    """Two turns of one session, from body to residency; the size of the last body."""
    chat = DIALECTS[0]
    made = AgentSession(seed)
    headers = {b"x-session-id": b"session-%d" % seed, b"user-agent": b"opencode/1"}
    for turn_number in (TURN, TURN + 1):
        body = made.body(turn_number)
        request = parse(chat, body)
        now = 10.0 * seed + turn_number
        turn = store.begin(headers, request, "default", 7, now)
        session = turn.session
        heads = turn.heads(HEAD_SEGMENTS)
        decision = choose(
            pods,
            Arrival(session.sid, turn.prompt_tokens, turn.same_tokens, heads, home=session.pod),
        )
        calls = [ToolCall.of(f"call-{seed}-{turn_number}", "bash", '{"command": "ls"}')]
        usage = Usage(TOKENS, 400, decision.resident_tokens)
        outcome = TurnOutcome(f"chatcmpl-{seed}-{turn_number}", calls, "tool_calls", usage)
        store.end(turn, outcome, now + 1)
        session.pod, session.decision = decision.pod.name, decision
        decision.pod.residency.touch(session.sid, TOKENS + 400, heads)
    return len(body), len(request.segments) - 2


def draw(points: list[tuple[int, float]], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([n for n, _ in points], [mb for _, mb in points])
    axes.axhline(BAR_MB, color="tab:red", linestyle="--", label="bar at 10,000 sessions")
    axes.set(xlabel="sessions of 100,000 tokens", ylabel="memory grown (MB)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
