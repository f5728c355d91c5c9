"""CPU time of the scheduler per step, stock against patched, in one run.

    python -m bench.engine.overhead [--steps 2000]

100,000 blocks of 16, 200 sessions that share a system prompt, 32 requests running, 64 waiting.
Under the load `fits` all live sessions fit the pool, what is evicted is of ended ones, and every
variant does the same work: the bars are for it. Under `overflows` they do not fit, hints change
what is evicted and so what a step does; a finished turn is then the fairer measure.

Counted is everything the engine core does for scheduling: arrivals, hints, schedule, update. The
variants take turns, a round of steps each, in an order that rotates; a ratio is the median over
rounds of a variant's CPU time to stock's in the same round. A second copy of stock shows the noise.
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
from gateway import hints

BLOCKS, BLOCK_TOKENS = 100_000, 16
SESSIONS, RUNNING, WAITING = 200, 32, 64
SYSTEM_TOKENS = 2_000
FIRST_TOKENS = {"fits": 3_000, "overflows": 6_500}
TURNS = 20  # of a session, then another takes its place
STEP_S = 0.025
ROUND_STEPS = 25


class Load:
    """A closed loop of agents on one scheduler, driven step by step."""

    def __init__(self, cls: type[Any], first_tokens: int, session_ids: bool, hints: bool) -> None:
        self.scheduler = simulation.make_scheduler(cls, BLOCKS, BLOCK_TOKENS, 2048, RUNNING)
        self.hasher = simulation.make_hasher(BLOCK_TOKENS)
        self.first_tokens, self.session_ids, self.hints = first_tokens, session_ids, hints
        self.now = 0.0
        if (reuse := getattr(self.scheduler, "_reuse", None)) is not None:
            reuse.clock = lambda: self.now
        self.rng = random.Random(0)
        self.system = self._tokens(SYSTEM_TOKENS)
        self.turns_left = [1 + i % TURNS for i in range(SESSIONS)]
        self.history = [self._begin(self.turns_left[i]) for i in range(SESSIONS)]
        self.generation = [0] * SESSIONS
        self.idle = list(range(SESSIONS))
        self.serial = 0
        self.rounds_s: list[float] = []
        self.steps = self.turns = 0

    def _tokens(self, n: int) -> list[int]:
        return self.rng.choices(range(50_000), k=n)

    def _begin(self, turns_left: int) -> list[int]:
        return self.system + self._tokens(self.first_tokens + 160 * (TURNS - turns_left))

    def _session(self, i: int) -> str:
        return f"s{i}.{self.generation[i]}"

    def round(self) -> None:
        """A round of steps; its CPU time goes to `rounds_s`."""
        self.rounds_s.append(sum(self._step() for _ in range(ROUND_STEPS)))

    def _step(self) -> float:
        """One step, with as many arrivals as keep the waiting queue full: its CPU seconds."""
        requests: list[Any] = []
        while len(self.scheduler.waiting) + len(requests) < WAITING:
            i = self.idle.pop(0)
            self.history[i] += self._tokens(160)
            self.serial += 1
            session = self._session(i) if self.session_ids else None
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
            self.history[i] += request.output_token_ids
            self.turns += 1
            self.turns_left[i] -= 1
            if self.hints:
                hint = self._hint(request.request_id, i)
                started = time.process_time()
                self.scheduler.cachewise("hints", hint)
                cpu_s += time.process_time() - started
            if not self.turns_left[i]:
                self.turns_left[i] = TURNS
                self.history[i] = self._begin(TURNS)
                self.generation[i] += 1
        self.now += STEP_S
        self.steps += 1
        return cpu_s

    def _hint(self, message_id: str, i: int) -> str:
        survival = [[2.0 ** (k / 2 - 3) * (1 + i % 7), 1 - (k + 1) / 25] for k in range(24)]
        ended = not self.turns_left[i]
        action = {
            "action_type": "cachewise.reuse",
            "action_version": "1.0",
            "payload": {
                "session_id": self._session(i),
                "idle_kind": "ended" if ended else "tool" if i % 4 else "human",
                "survival": [] if ended else survival,
                "p_return": 0.0 if ended else 0.95,
            },
        }
        return json.dumps(hints.envelope(message_id, action))


VARIANTS: dict[str, tuple[type[Any], bool, bool]] = {
    "stock": (Scheduler, True, False),
    "stock again": (Scheduler, True, False),
    "patched, no ids": (SyncReuseAwareScheduler, False, False),
    "patched, no hints": (SyncReuseAwareScheduler, True, False),
    "patched, hints": (SyncReuseAwareScheduler, True, True),
}


def measure(load: str, warm_steps: int, steps: int) -> list[dict[str, Any]]:
    """Warm each variant until the pool is full, then measure them in rounds."""
    loads = {name: Load(cls, FIRST_TOKENS[load], *how) for name, (cls, *how) in VARIANTS.items()}
    for each in loads.values():
        for _ in range(warm_steps // ROUND_STEPS):
            each.round()
        each.rounds_s.clear()
        each.steps = each.turns = 0
    gc.collect()
    gc.freeze()  # as vLLM does once it has started
    names = list(loads)
    for k in range(steps // ROUND_STEPS):
        for i in range(len(names)):
            loads[names[(i + k) % len(names)]].round()
    gc.unfreeze()
    stock = loads["stock"]
    rows = []
    for name, each in loads.items():
        paired = [mine / theirs for mine, theirs in zip(each.rounds_s, stock.rounds_s, strict=True)]
        ratio = statistics.median(paired)
        row: dict[str, Any] = {
            "load": load,
            "variant": name,
            "step_s": sum(each.rounds_s) / each.steps,
            "ratio": ratio,
            "turns": each.turns,
            "turn_ratio": ratio * stock.turns / each.turns,
        }
        rows.append(row)
        print(f"{load:11}{name:19}{row['step_s'] * 1e6:9.0f}{ratio:8.3f}{each.turns:7}"
              f"{row['turn_ratio']:8.3f}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    """Measure both loads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--warm-steps", type=int, default=2_000)
    parser.add_argument("--loads", nargs="+", choices=FIRST_TOKENS, default=list(FIRST_TOKENS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/engine-overhead"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(f"{'load':11}{'':19}{'us/step':>9}{'ratio':>8}{'turns':>7}{'a turn':>8}")
    rows = []
    for load in options.loads:
        rows += measure(load, options.warm_steps, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.out.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """CPU time of a finished turn relative to stock's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["variant"] for row in rows))
    loads = list(dict.fromkeys(row["load"] for row in rows))
    figure, axis = pyplot.subplots(figsize=(7, 3), layout="constrained")
    height = 0.8 / len(loads)
    for k, load in enumerate(loads):
        ratios = {r["variant"]: r["turn_ratio"] for r in rows if r["load"] == load}
        places = [i + (k - (len(loads) - 1) / 2) * height for i in range(len(names))]
        bars = axis.barh(places, [ratios[n] for n in names], height, label=load)
        axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set_yticks(range(len(names)), names)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("scheduler CPU time of a finished turn, relative to stock")
    axis.legend()
    axis.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
