"""Gateway overhead beside its peers: `python -m bench.overhead [--quick]`."""

import dataclasses
import importlib.metadata
import multiprocessing
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.progress import Progress

from bench import machine
from bench.overhead import report
from bench.overhead.contenders import (
    CONTENDERS,
    PEERS,
    ROOT,
    UnavailableError,
    engine,
    install_peers,
    running,
)
from bench.overhead.load import WORKLOADS, Window, measure

RESULTS = ROOT / "bench" / "results"
ROUNDS = 7


def main(
    quick: Annotated[bool, typer.Option(help="2 short rounds: a check, not a measure")] = False,
    only: Annotated[list[str] | None, typer.Option(help="contender; may be repeated")] = None,
    at_once: Annotated[int, typer.Option(help="requests in flight", min=1)] = 1,
    json: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS / "overhead.json",
    plot: Annotated[Path, typer.Option(help="where the plot goes")] = RESULTS / "overhead.png",
) -> None:
    """Measure CPU, latency and memory of each contender in front of one mock engine."""
    known = [contender.name for contender in CONTENDERS]
    if unknown := set(only or ()) - set(known):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    chosen = [contender for contender in CONTENDERS if not only or contender.name in only]
    rounds = 2 if quick else ROUNDS
    share = 6 if quick else 1
    workloads = [
        dataclasses.replace(w, workers=at_once, counted=max(2, w.counted // share // at_once))
        for w in WORKLOADS
    ]
    console = Console()
    if not console.is_terminal:
        console.width = 120
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    absent: dict[str, str] = {}
    windows: dict[str, dict[str, list[Window]]] = {
        workload.name: defaultdict(list) for workload in workloads
    }
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine_url = stack.enter_context(engine(logs))
        targets: dict[str, tuple[str, int | None]] = {"direct": (engine_url, None)}
        if any(contender.peer for contender in chosen):
            try:
                with console.status("Installing the peers"):
                    install_peers()
            except UnavailableError as error:
                console.print(f"The peers cannot be installed: {error}", style="yellow")
        for contender in chosen:
            try:
                with console.status(f"Starting {contender.name}"):
                    targets[contender.name] = stack.enter_context(
                        running(contender, engine_url, logs)
                    )
            except UnavailableError as error:
                absent[contender.name] = str(error)
                console.print(f"{contender.name}: {error}", style="yellow")
        spawn = multiprocessing.get_context("spawn")
        load = stack.enter_context(ProcessPoolExecutor(max_workers=1, mp_context=spawn))
        progress = stack.enter_context(Progress(console=console))
        task = progress.add_task("", total=rounds * len(workloads) * len(targets))
        for round_ in range(rounds):
            for workload in workloads:
                for name, (url, pid) in targets.items():
                    progress.update(task, description=f"{workload.title}, {name}")
                    window = load.submit(measure, url, pid, workload, round_).result()
                    windows[workload.name][name].append(window)
                    progress.advance(task)
    summary = report.summarise(windows)
    result = {
        "started_at": started_at,
        "quick": quick,
        "rounds": rounds,
        "machine": machine.described(),
        "versions": {
            "peers": PEERS,
            **{
                name: importlib.metadata.version(name)
                for name in ("aiohttp", "starlette", "uvicorn")
            },
        },
        "settings": [dataclasses.asdict(workload) for workload in workloads],
        "absent": absent,
        "workloads": summary,
    }
    json.parent.mkdir(parents=True, exist_ok=True)
    json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    if len(targets) > 1:
        report.plot(summary, plot)
    console.print(report.table(summary, absent))


if __name__ == "__main__":
    typer.run(main)
