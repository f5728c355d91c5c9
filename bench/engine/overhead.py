"""CPU time of the scheduler per step, stock against patched, in one run.

    python -m bench.engine.overhead [--steps 3000]

100,000 blocks of 16, 200 sessions whose KV nearly fills them, 32 requests running, 64 waiting.
Each variant does the same turns; they take turns step by step, so that noise meets all alike.
Counted is everything the engine core does for scheduling: arrivals, hints, schedule, update.
Prints a table and writes JSON and a plot (`--out`).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import statistics
import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from bench.engine import simulation
from engine_patch.scheduler import SyncReuseAwareScheduler

BLOCKS, BLOCK_TOKENS = 100_000, 16
SESSIONS, RUNNING, WAITING = 200, 32, 64
STEP_S = 0.025
ROUND_STEPS = 25


class Load:
    """A closed loop of agents on one scheduler, driven step by step."""

    def __init__(self, cls: type[Any], session_ids: bool, hints: bool) -> None:
        self.scheduler = simulation.make_scheduler(cls, BLOCKS, BLOCK_TOKENS, 2048, RUNNING)
        self.hasher = simulation.make_hasher(BLOCK_TOKENS)
        self.session_ids, self.hints = session_ids, hints
        self.now = 0.0
        if (reuse := getattr(self.scheduler, "_reuse", None)) is not None:
            reuse.clock = lambda: self.now
        self.rng = random.Random(0)
        self.history = [self._tokens(7_200 + 8 * i) for i in range(SESSIONS)]
        self.idle = list(range(SESSIONS))
        self.serial = 0
        self.cpu_s: list[float] = []
        self.steps = 0
        self.turns = 0

    def _tokens(self, n: int) -> list[int]:
        return self.rng.choices(range(50_000), k=n)

    def step(self) -> None:
        """One step, with as many arrivals as keep the waiting queue full."""
        requests: list[Any] = []
        while len(self.scheduler.waiting) + len(requests) < WAITING:
            i = self.idle.pop(0)
            self.history[i] += self._tokens(160)
            self.serial += 1
            session = f"s{i}" if self.session_ids else None
            output = self.rng.randint(40, 160)
            request_id = f"{self.serial}-{i}"
            requests.append(
                simulation.make_request(request_id, self.history[i], output, session, self.hasher)
            )
        started = time.process_time()
        for request in requests:
            self.scheduler.add_request(request)
        _, finished = simulation.step(self.scheduler, lambda request: 7)
        cpu_s = time.process_time() - started
        for request in finished:
            i = int(request.request_id.split("-")[1])
            self.idle.append(i)
            self.turns += 1
            if self.hints:
                hint = self._hint(request, i)
                started = time.process_time()
                self.scheduler.cachewise("hints", hint)
                cpu_s += time.process_time() - started
        self.cpu_s.append(cpu_s)
        self.now += STEP_S
        self.steps += 1

    def _hint(self, request: Any, i: int) -> str:
        survival = [[2.0 ** (k / 2 - 3), 1 - (k + 1) / 25] for k in range(24)]
        action = {
            "action_id": "0",
            "action_type": "cachewise.reuse",
            "action_version": "1.0",
            "payload": {
                "session_id": f"s{i}",
                "idle_kind": "tool" if i % 4 else "human",
                "survival": [[t * (1 + i % 7), p] for t, p in survival],
                "p_return": 0.95,
            },
        }
        return json.dumps(
            {"protocol_version": "0.1", "message_id": request.request_id, "actions": [action]}
        )


def main() -> None:
    """Warm each variant until the pool is full, then measure them in rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--warm-steps", type=int, default=1_500)
    parser.add_argument("--out", type=Path, default=Path("build/bench/engine-overhead"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    loads = {
        "stock": Load(Scheduler, True, False),
        "stock again": Load(Scheduler, True, False),
        "patched, no ids": Load(SyncReuseAwareScheduler, False, False),
        "patched, no hints": Load(SyncReuseAwareScheduler, True, False),
        "patched, hints": Load(SyncReuseAwareScheduler, True, True),
    }
    for load in loads.values():
        for _ in range(options.warm_steps):
            load.step()
        load.cpu_s.clear()
        load.turns = 0
    gc.collect()
    gc.freeze()  # as vLLM does once it has started
    for _ in range(options.steps // ROUND_STEPS):
        for load in loads.values():
            for _ in range(ROUND_STEPS):
                load.step()
    base = statistics.mean(loads["stock"].cpu_s)
    base_turn_s = sum(loads["stock"].cpu_s) / loads["stock"].turns
    rows = []
    print(
        f"{'':20}{'mean us':>9}{'p50 us':>9}{'p99 us':>9}{'ratio':>7}"
        f"{'turns':>7}{'a turn':>8}{'scoring us':>12}"
    )
    for name, load in loads.items():
        mean = statistics.mean(load.cpu_s)
        cuts = statistics.quantiles(load.cpu_s, n=100)
        reuse = getattr(load.scheduler, "_reuse", None)
        turn_s = sum(load.cpu_s) / load.turns
        scoring = (reuse.queue.scoring_s + reuse._ordering_s) / load.steps if reuse else 0.0
        rows.append({"variant": name, "mean_s": mean, "p50_s": cuts[49], "p99_s": cuts[98],
                     "ratio": mean / base, "turns": load.turns, "turn_ratio": turn_s / base_turn_s,
                     "scoring_s": scoring})  # fmt: skip
        print(f"{name:20}{mean * 1e6:9.0f}{cuts[49] * 1e6:9.0f}{cuts[98] * 1e6:9.0f}"
              f"{mean / base:7.3f}{load.turns:7}{turn_s / base_turn_s:8.3f}"
              f"{scoring * 1e6:12.1f}")  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    plot(rows, options.out.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean time per step relative to stock."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 2.5), layout="constrained")
    axis.barh([r["variant"] for r in rows], [r["ratio"] for r in rows])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("scheduler CPU time per step, relative to stock")
    axis.invert_yaxis()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
