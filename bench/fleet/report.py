"""From turns to figures, a table and a plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.table import Table

from bench.fleet.agents import Turn

Figures = dict[str, Any]
AT_ONCE_S = 10.0
"""What counts as the time right after an event."""


def figures(turns: Sequence[Turn], marks: dict[str, float], pods: dict[str, str]) -> Figures:
    """What happened between the marks (``added``, ``ready``, ``drained``, ``killed``, ``end``,
    seconds) to the pods that they name."""
    bounds = [0.0, *(marks[name] for name in ("added", "drained", "killed", "end"))]
    names = ("before", "one added", "one drained", "one killed")
    phases = {
        name: _phase(turns, low, high)
        for name, low, high in zip(names, bounds, bounds[1:], strict=False)
    }
    return {
        "phases": phases,
        "added": _added(turns, marks, pods["added"]),
        "drained": _drained(turns, marks, pods["drained"]),
        "killed": _killed(turns, marks, pods["killed"]),
    }


def _phase(turns: Sequence[Turn], low_s: float, high_s: float) -> Figures:
    those = [turn for turn in turns if low_s <= turn.began_s < high_s]
    waits = [t.first_byte_s - t.began_s for t in those if t.first_byte_s is not None]
    percentiles = quantiles(waits, n=100) if len(waits) > 1 else [0.0] * 99
    return {
        "seconds": high_s - low_s,
        "turns": len(those),
        "failed": sum(bool(turn.failed) for turn in those),
        "first_byte_p50_s": percentiles[49],
        "first_byte_p99_s": percentiles[98],
        "turns_by_pod": dict(sorted(Counter(turn.pod for turn in those if turn.pod).items())),
    }


def _added(turns: Sequence[Turn], marks: dict[str, float], pod: str) -> Figures:
    there = [turn for turn in turns if turn.pod == pod]
    until_s = min(marks["ready"] + AT_ONCE_S, marks["drained"])
    new = [t for t in turns if not t.number and marks["ready"] <= t.began_s < until_s and t.pod]
    return {
        "pod": pod,
        "ready_after_s": marks["ready"] - marks["added"],
        "first_turn_after_ready_s": min((t.began_s for t in there), default=float("inf"))
        - marks["ready"],
        "new_sessions": len(new),
        "new_sessions_there": sum(turn.pod == pod for turn in new),
        "failed": sum(bool(t.failed) for t in turns if marks["added"] <= t.began_s < until_s),
    }


def _drained(turns: Sequence[Turn], marks: dict[str, float], pod: str) -> Figures:
    at = marks["drained"]
    running = [t for t in turns if t.pod == pod and t.began_s <= at < t.ended_s]
    lived = _homes(turns, at, pod)
    after = [t for t in turns if t.session in lived and t.began_s > at and not t.failed]
    return {
        "pod": pod,
        "running_then": len(running),
        "empty_after_s": max((t.ended_s for t in running), default=at) - at,
        "failed_there": sum(bool(t.failed) for t in running),
        "given_later": sum(t.pod == pod and t.began_s > at for t in turns),
        "sessions_there": len(lived),
        "went_on_elsewhere": len({t.session for t in after if t.pod != pod}),
    }


def _killed(turns: Sequence[Turn], marks: dict[str, float], pod: str) -> Figures:
    at = marks["killed"]
    running = [t for t in turns if t.pod == pod and t.began_s <= at < t.ended_s]
    lived = _homes(turns, at, pod)
    next_turns: dict[str, Turn] = {}
    for turn in turns:
        if turn.session in lived and turn.began_s > at and not turn.failed:
            next_turns.setdefault(turn.session, turn)
    later = [t for t in turns if t.began_s > at and t not in running]
    return {
        "pod": pod,
        "running_then": len(running),
        "failed_there": sum(bool(t.failed) for t in running),
        "failed_elsewhere": sum(bool(t.failed) for t in later),
        "sessions_there": len(lived),
        "went_on_elsewhere": len([t for t in next_turns.values() if t.pod != pod]),
        "last_went_on_after_s": max((t.ended_s - at for t in next_turns.values()), default=0.0),
    }


def _homes(turns: Sequence[Turn], at_s: float, pod: str) -> set[str]:
    """Sessions whose latest turn begun by then ran on the pod, and that have more to come."""
    latest: dict[str, Turn] = {}
    going_on = {turn.session for turn in turns if turn.began_s > at_s}
    for turn in turns:
        if turn.began_s <= at_s and turn.pod:
            latest[turn.session] = turn
    return {name for name, turn in latest.items() if turn.pod == pod} & going_on


def table(made: Figures) -> list[Table]:
    phases = Table(title="Load")
    phases.add_column("")
    for heading in ("turns", "a second", "failed", "first byte p50 ms", "p99 ms", "turns by pod"):
        phases.add_column(heading, justify="right")
    for name, phase in made["phases"].items():
        phases.add_row(
            name,
            f"{phase['turns']}",
            f"{phase['turns'] / phase['seconds']:.1f}",
            f"{phase['failed']}",
            f"{1e3 * phase['first_byte_p50_s']:.0f}",
            f"{1e3 * phase['first_byte_p99_s']:.0f}",
            " ".join(str(n) for n in phase["turns_by_pod"].values()),
        )
    events = Table(title="What became of it", show_header=False)
    added, drained, killed = (made[name] for name in ("added", "drained", "killed"))
    for event, lines in (
        (
            f"{added['pod']} is added",
            (
                f"takes turns {added['ready_after_s']:.2f} s after discovery found it",
                f"its first turn {added['first_turn_after_ready_s']:.2f} s later",
                f"{added['new_sessions_there']} of the {added['new_sessions']} sessions that began"
                f" in the {AT_ONCE_S:.0f} s after that",
                f"turns that failed: {added['failed']}",
            ),
        ),
        (
            f"{drained['pod']} is drained",
            (
                f"turns that ran there: {drained['running_then']}; empty after"
                f" {drained['empty_after_s']:.2f} s",
                f"of them failed {drained['failed_there']}; came later {drained['given_later']}",
                f"{drained['went_on_elsewhere']} of its {drained['sessions_there']} sessions went"
                " on elsewhere",
            ),
        ),
        (
            f"{killed['pod']} is killed",
            (
                f"turns that ran there: {killed['running_then']}; broken off"
                f" {killed['failed_there']}",
                f"other turns that failed: {killed['failed_elsewhere']}",
                f"{killed['went_on_elsewhere']} of its {killed['sessions_there']} sessions went on"
                f" elsewhere, the last after {killed['last_went_on_after_s']:.1f} s",
            ),
        ),
    ):
        events.add_row(event, "\n".join(lines), end_section=True)
    return [phases, events]


def plot(turns: Sequence[Turn], marks: dict[str, float], path: Path) -> None:
    """Turns in flight by pod, and each turn's time to its first byte."""
    from matplotlib.figure import Figure

    pods = sorted({turn.pod for turn in turns if turn.pod})
    times = [n / 10 for n in range(int(10 * marks["end"]))]
    running = {
        pod: [sum(t.began_s <= at < t.ended_s for t in turns if t.pod == pod) for at in times]
        for pod in pods
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.stackplot(times, list(running.values()), labels=pods, step="post")
    above.set_ylabel("turns in flight")
    for pod in pods:
        those = [t for t in turns if t.pod == pod and t.first_byte_s is not None and not t.failed]
        below.scatter(
            [t.began_s for t in those],
            [1e3 * ((t.first_byte_s or 0.0) - t.began_s) for t in those],
            s=4,
        )
    failed = [t for t in turns if t.failed]
    below.scatter(
        [t.began_s for t in failed],
        [1e3 * (t.ended_s - t.began_s) for t in failed],
        s=40,
        marker="x",
        color="black",
        label="failed",
    )
    below.set_yscale("log")
    below.set_ylabel("first byte, ms")
    below.set_xlabel("seconds")
    figure.legend(loc="outside upper center", ncols=len(pods) + 1)
    for axes in (above, below):
        for name in ("added", "drained", "killed"):
            axes.axvline(marks[name], color="grey", linestyle="--")
    for name in ("added", "drained", "killed"):
        above.text(
            marks[name], 1.0, name, ha="center", va="bottom", transform=above.get_xaxis_transform()
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
