"""CPU time of a request with and without recording: `python -m bench.recording [--quick]`.

One gateway before the mock engine of `bench.overhead`, under its workloads; recording is switched
on and off between short windows in turn, as two processes differ by more than recording costs. A
window counts the process's whole CPU time until the recorder's thread has written its turns; that
the windows may be short, it writes more often than it does otherwise, which costs more. Prints a
table, writes JSON and a plot.
"""

import dataclasses
import multiprocessing
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

from bench import machine
from bench.overhead.contenders import ROOT, engine
from bench.overhead.load import WORKLOADS, measure
from bench.recording.served import FLUSH_S, Served

RESULTS = ROOT / "bench" / "results"
ROUNDS = 60
EVERY = {"json_1k": 1, "agent_400k": 1, "stream_100": 4}
"""A workload's windows come once in so many rounds."""
RESAMPLED = 2_000
COUNTED = {"json_1k": 600, "agent_400k": 160, "stream_100": 24}


def main(
    rounds: Annotated[int, typer.Option(help="pairs of windows", min=6)] = ROUNDS,
    quick: Annotated[bool, typer.Option(help="6 short rounds: a check, not a measure")] = False,
    json: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS / "recording.json",
    plot: Annotated[Path, typer.Option(help="where the plot goes")] = RESULTS / "recording.png",
) -> None:
    """Measure what recording adds to a request."""
    rounds = 6 if quick else rounds
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
        task = progress.add_task("", total=2 * sum(rounds // n for n in EVERY.values()))
        for round_ in range(rounds):
            for workload in workloads:
                number, later = divmod(round_, EVERY[workload.name])
                if later:
                    continue
                spent = {}
                for recording in (True, False) if number % 2 else (False, True):
                    progress.update(
                        task, description=f"{workload.title}, {'on' if recording else 'off'}"
                    )
                    served.record(recording)
                    before_s = served.cpu_s()
                    seed = 2 * round_ + recording
                    load.submit(measure, served.url, None, workload, seed).result()
                    time.sleep(1.2 * FLUSH_S)
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
        "machine": machine.described(),
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
    """Medians over the pairs: of the CPU time of a request without and with recording, and of the
    ratio of the two, with the 95 % interval that drawing pairs anew gives (Efron's bootstrap)."""
    rng = Random(1)
    off, on = ([pair[k] for pair in pairs] for k in (0, 1))
    ratios = [b / max(1e-9, a) for a, b in pairs]
    drawn = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLED))
    return {
        "off_cpu_ms": median(off),
        "on_cpu_ms": median(on),
        "off_cpu_ms_windows": off,
        "on_cpu_ms_windows": on,
        "ratio": median(ratios),
        "ratio_low": drawn[int(0.025 * RESAMPLED)],
        "ratio_high": drawn[int(0.975 * RESAMPLED)],
    }


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
