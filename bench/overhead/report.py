"""From windows to medians and ratios; the table and the plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.table import Table

from bench.overhead.contenders import REFERENCE
from bench.overhead.load import WORKLOADS, Window

Windows = Mapping[str, Mapping[str, Sequence[Window]]]  # workload → contender → one a round


def _cpu_ms(window: Window) -> float:
    return 1e3 * window.cpu_s / window.requests


def _row(windows: Sequence[Window], reference: Sequence[Window] | None) -> dict[str, Any]:
    latencies_ms = [1e3 * value for window in windows for value in window.latencies_s]
    percentiles = quantiles(latencies_ms, n=100, method="inclusive")
    row: dict[str, Any] = {
        "requests": sum(window.requests for window in windows),
        "cpu_ms": median(map(_cpu_ms, windows)),
        "cpu_ms_rounds": [_cpu_ms(window) for window in windows],
        "p50_ms": percentiles[49],
        "p99_ms": percentiles[98],
        "rss_mb": max(window.rss_bytes for window in windows) / 1e6,
        "reads_per_response": median(window.reads for window in windows),
        "ratio": None,
    }
    if reference and all(window.cpu_s > 0 for window in reference):
        ratios = [
            _cpu_ms(ours) / _cpu_ms(theirs) for ours, theirs in zip(windows, reference, strict=True)
        ]
        row |= {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return row


def summarise(windows: Windows) -> dict[str, dict[str, dict[str, Any]]]:
    """Medians over rounds. A ratio is taken round by round to the reference's CPU time, then
    its median, least and greatest are kept; it is None without the reference. Percentiles are
    over the requests of all rounds."""
    return {
        workload: {
            name: _row(rounds, None if name == "direct" else contenders.get(REFERENCE))
            for name, rounds in contenders.items()
        }
        for workload, contenders in windows.items()
    }


def table(summary: Mapping[str, Mapping[str, Any]], absent: Mapping[str, str]) -> Table:
    result = Table(title="Cost of a request")
    for heading in ("workload", "contender"):
        result.add_column(heading)
    units = ("CPU ms", "x sglang (spread)", "bar", "p50 ms", "p99 ms", "RSS MB")
    for heading in units:
        result.add_column(heading, justify="right")
    for workload in WORKLOADS:
        for name, row in summary[workload.name].items():
            direct = name == "direct"
            spread = "–"
            if row["ratio"] is not None:
                spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
            result.add_row(
                workload.title,
                name,
                "–" if direct else f"{row['cpu_ms']:.3f}",
                spread,
                f"{workload.bar:g}" if name == "cachewise" else "",
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
                "–" if direct else f"{row['rss_mb']:.0f}",
            )
        for name, reason in absent.items():
            result.add_row(workload.title, name, reason.partition(":")[0])
        result.add_section()
    return result


def plot(summary: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """CPU time of each contender, grouped by workload: as a ratio to the reference with the bars
    allowed, or in milliseconds where the reference did not run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in summary[WORKLOADS[0].name] if name != "direct"]
    relative = REFERENCE in names
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = [summary[workload.name][name] for workload in WORKLOADS]
        heights = [row["ratio"] if relative else row["cpu_ms"] for row in rows]
        errors = None
        if relative:
            errors = [
                [row["ratio"] - row["ratio_min"] for row in rows],
                [row["ratio_max"] - row["ratio"] for row in rows],
            ]
        places = [group - 0.4 + width * (index + 0.5) for group in range(len(WORKLOADS))]
        drawn = axes.bar(places, heights, width, yerr=errors, capsize=3, label=name)
        labels = [f"{row['cpu_ms']:.2f} ms" for row in rows]
        axes.bar_label(drawn, labels, label_type="center", fontsize=8, color="white", rotation=90)
    if relative:
        for group, workload in enumerate(WORKLOADS):
            label = "_nolegend_" if group else "allowed for CacheWise"
            axes.hlines(
                workload.bar, group - 0.45, group + 0.45, colors="black", ls="--", label=label
            )
    axes.set_xticks(range(len(WORKLOADS)), [workload.title for workload in WORKLOADS])
    axes.set_ylabel(f"CPU a request, x {REFERENCE}" if relative else "CPU a request, ms")
    axes.set_title("CPU time a request (median of rounds; whiskers: least and greatest)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
