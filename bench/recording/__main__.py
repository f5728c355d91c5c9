"""CPU time of a request with and without recording: `python -m bench.recording [--quick]`.

One gateway before the mock engine of `bench.overhead`, under its workloads; recording is switched
on and off between short windows in turn, as two processes differ by more than recording costs. A
window counts the process's whole CPU time until the recorder's thread has written its turns. Prints
a table, writes JSON and a plot.
"""

import dataclasses
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.overhead.contenders import ROOT, engine
from bench.overhead.load import WORKLOADS, measure
from bench.recording.served import Served
from gateway.recorder.recorder import FLUSH_S

RESULTS = ROOT / "bench" / "results"
ROUNDS = 40
RESAMPLED = 2_000
COUNTED = {"json_1k": 500, "agent_400k": 100, "stream_100": 30}


def main(
    rounds: Annotated[int, typer.Option(help="windows of each kind", min=2)] = ROUNDS,
    quick: Annotated[bool, typer.Option(help="2 short rounds: a check, not a measure")] = False,
    json: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS / "recording.json",
    plot: Annotated[Path, typer.Option(help="where the plot goes")] = RESULTS / "recording.png",
) -> None:
    """Measure what recording adds to a request."""
    rounds = 2 if quick else rounds
    share = 6 if quick else 1
    workloads = [dataclasses.replace(w, counted=COUNTED[w.name] // share) for w in WORKLOADS]
    console = Console()
    if not console.is_terminal:
        console.width = 120
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    cpu_ms: dict[str, list[tuple[float, float]]] = {w.name: [] for w in workloads}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine_url = stack.enter_context(engine(folder))
        served = stack.enter_context(Served(engine_url, folder / "recordings"))
        spawn = multiprocessing.get_context("spawn")
        load = stack.enter_context(ProcessPoolExecutor(max_workers=1, mp_context=spawn))
        progress = stack.enter_context(Progress(console=console))
        task = progress.add_task("", total=2 * rounds * len(workloads))
        for round_ in range(rounds):
            for workload in workloads:
                spent = {}
                for recording in (True, False) if round_ % 2 else (False, True):
                    progress.update(
                        task, description=f"{workload.title}, {'on' if recording else 'off'}"
                    )
                    served.record(recording)
                    before_s = served.cpu_s()
                    seed = 2 * round_ + recording
                    load.submit(measure, served.url, None, workload, seed).result()
                    time.sleep(1.1 * FLUSH_S)
                    requests = workload.workers * (workload.warmup + workload.counted)
                    spent[recording] = 1e3 * (served.cpu_s() - before_s) / requests
                    progress.advance(task)
                cpu_ms[workload.name].append((spent[False], spent[True]))
        lost, recorded = served.counts()
    summary = {name: row(pairs) for name, pairs in cpu_ms.items()}
    result = {
        "started_at": started_at,
        "quick": quick,
        "rounds": rounds,
        "machine": {
            "cpus": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "settings": [dataclasses.asdict(workload) for workload in workloads],
        "workloads": summary,
        "recorded_turns": recorded,
        "lost_turns": lost,
    }
    json.parent.mkdir(parents=True, exist_ok=True)
    json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    draw(summary, plot)
    console.print(table(summary))
    console.print(f"{recorded} turns recorded, {lost} lost")


def row(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """CPU time a request without and with recording, and the ratio of the two over all rounds, with
    the 95 % interval that drawing rounds anew gives (Efron's bootstrap)."""
    rng = Random(1)
    drawn = sorted(ratio(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLED))
    off, on = ([pair[k] for pair in pairs] for k in (0, 1))
    return {
        "off_cpu_ms": median(off),
        "on_cpu_ms": median(on),
        "off_cpu_ms_rounds": off,
        "on_cpu_ms_rounds": on,
        "ratio": ratio(pairs),
        "ratio_low": drawn[int(0.025 * RESAMPLED)],
        "ratio_high": drawn[int(0.975 * RESAMPLED)],
    }


def ratio(pairs: list[tuple[float, float]]) -> float:
    return sum(on for _, on in pairs) / max(1e-9, sum(off for off, _ in pairs))


def table(summary: dict[str, dict[str, Any]]) -> Table:
    result = Table(title="Cost of recording")
    result.add_column("workload")
    for heading in ("off, CPU ms", "on, CPU ms", "x (95 %)"):
        result.add_column(heading, justify="right")
    for workload in WORKLOADS:
        of = summary[workload.name]
        result.add_row(
            workload.title,
            f"{of['off_cpu_ms']:.3f}",
            f"{of['on_cpu_ms']:.3f}",
            f"{of['ratio']:.3f} ({of['ratio_low']:.3f}–{of['ratio_high']:.3f})",
        )
    return result


def draw(summary: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for place, workload in enumerate(WORKLOADS):
        of = summary[workload.name]
        low, high = of["ratio"] - of["ratio_low"], of["ratio_high"] - of["ratio"]
        axes.errorbar(of["ratio"], place, xerr=[[low], [high]], fmt="o", color="C0", capsize=4)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.axvline(1.03, color="C3", linewidth=0.8, linestyle="--", label="bar: 1.03")
    axes.set_yticks(range(len(WORKLOADS)), [workload.title for workload in WORKLOADS])
    axes.set_ylim(len(WORKLOADS) - 0.5, -0.5)
    axes.set_xlabel("CPU time of a request with recording, over that without (95 %)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
