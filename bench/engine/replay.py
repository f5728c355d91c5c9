"""Replay real sessions through vLLM's scheduler: stock against patched, forecasts none to perfect.

    python -m bench.engine.replay --traces weka-dev.jsonl.gz --sessions 30 --seeds 1 2 3

Prints a table and writes JSON and a plot beside it (`--out`). The model of the engine is in
`simulation`, that of the sessions in `traces`.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from bench.engine import simulation, traces
from engine_patch.scheduler import SyncReuseAwareScheduler

POINTS = 24


def oracle(session: str, turns: list[traces.Turn], k: int) -> dict[str, Any]:
    """The gap as it will be; a session after its last turn has ended."""
    last = k + 1 == len(turns)
    gap_s = 0.0 if last else max(turns[k + 1].gap_s, 0.001)
    return {
        "session_id": session,
        "idle_kind": "ended" if last else turns[k].idle_kind,
        "survival": [] if last else [[gap_s, 1.0], [gap_s + 0.001, 0.0]],
        "p_return": 0.0 if last else 1.0,
    }


def by_class(pieces: list[list[traces.Turn]]) -> simulation.Hinter:
    """What gaps after a tool call, and after an answer, are like on the whole."""
    curves = {}
    for kind in ("tool", "human"):
        gaps = sorted(
            following.gap_s
            for piece in pieces
            for turn, following in pairwise(piece)
            if turn.idle_kind == kind
        )
        ends = sum(piece[-1].idle_kind == kind for piece in pieces)
        curve: dict[float, float] = {}
        for i in range(1, POINTS + 1):
            curve[round(gaps[len(gaps) * i // (POINTS + 1)], 3)] = 1 - i / (POINTS + 1)
        curve[gaps[-1]] = 0.0
        points = [[t, p] for t, p in curve.items() if t > 0]
        curves[kind] = (points, len(gaps) / (len(gaps) + ends))

    def hint(session: str, turns: list[traces.Turn], k: int) -> dict[str, Any]:
        points, p_return = curves[turns[k].idle_kind]
        kind = turns[k].idle_kind
        return {
            "session_id": session, "idle_kind": kind, "survival": points, "p_return": p_return
        }  # fmt: skip

    return hint


def main() -> None:
    """Run every variant on every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--sessions", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", default=["stock", "no hints", "class", "oracle"])
    parser.add_argument("--out", type=Path, default=Path("build/bench/engine-replay"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    pieces = traces.load(options.traces)
    variants: dict[str, tuple[type[Any], simulation.Hinter | None]] = {
        "stock": (Scheduler, None),
        "no hints": (SyncReuseAwareScheduler, None),
        "class": (SyncReuseAwareScheduler, by_class(pieces)),
        "oracle": (SyncReuseAwareScheduler, oracle),
    }
    print(f"{len(pieces)} sessions to draw from, {options.sessions} at once")
    print(f"{'':10}{'seed':>5}{'session s':>11}{'p99 turn s':>11}{'evictions':>11}"
          f"{'hit rate':>9}{'overtakes':>10}{'longest s':>10}{'ran s':>7}")  # fmt: skip
    rows = []
    for seed in options.seeds:
        sessions = traces.sample(pieces, options.sessions, seed)
        for name in options.variants:
            cls, hint = variants[name]
            started = time.process_time()
            figures = simulation.replay(sessions, cls, hint)
            row = asdict(figures) | {
                "variant": name,
                "seed": seed,
                "sessions": options.sessions,
                "mean_session_s": statistics.mean(figures.session_s),
                "p99_turn_s": statistics.quantiles(figures.turn_s, n=100)[98],
                "hit_rate": figures.cached_tokens / figures.prompt_tokens,
            }
            del row["turn_s"]
            rows.append(row)
            print(f"{name:10}{seed:5}{row['mean_session_s']:11.1f}{row['p99_turn_s']:11.1f}"
                  f"{figures.evicted_blocks:11,}{row['hit_rate']:9.1%}{figures.overtakes:10}"
                  f"{figures.longest_wait_s:10.1f}{time.process_time() - started:7.0f}",
                  flush=True)  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    plot(rows, options.out.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean session time and evictions of each variant, over the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key, title in zip(
        axes,
        ("mean_session_s", "evicted_blocks"),
        ("mean session time, s", "evicted blocks"),
        strict=True,
    ):
        axis.bar(names, [statistics.mean(r[key] for r in rows if r["variant"] == n) for n in names])
        axis.set_title(title)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
