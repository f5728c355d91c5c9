"""From what a replay measured to figures, a table and a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from bench.replay.world import Outcome

Row = dict[str, Any]
RATIOS = ("session_s", "evicted_blocks", "p99_s")
"""Compared with stock: times smaller."""


def figures(outcome: Outcome) -> Row:
    """One run in numbers. Session time is the sum of its turns' latencies, from arrival at the
    gateway to the last token, holds included."""
    turns = outcome.turns
    session_s: dict[int, float] = {}
    for turn in turns:
        session_s[turn.session] = session_s.get(turn.session, 0.0) + turn.latency_s
    latency = _percentiles([turn.latency_s for turn in turns])
    first_token = _percentiles([turn.first_token_s for turn in turns])
    prompt_tokens = sum(turn.prompt_tokens for turn in turns)
    cached_tokens = sum(turn.cached_tokens for turn in turns)
    return {
        "session_s": fmean(session_s.values()),
        "session_p90_s": _percentiles(list(session_s.values()))[89],
        "p50_s": latency[49],
        "p90_s": latency[89],
        "p99_s": latency[98],
        "first_token_p50_s": first_token[49],
        "first_token_p99_s": first_token[98],
        "evicted_blocks": outcome.evicted_blocks,
        "prefilled_tokens": prompt_tokens - cached_tokens,
        "hit_rate": cached_tokens / prompt_tokens,
        "makespan_s": outcome.makespan_s,
        "goodput_tokens_per_s": sum(turn.output_tokens for turn in turns) / outcome.makespan_s,
        "holds": sum(turn.held_s > 0 for turn in turns),
        "longest_hold_s": max(turn.held_s for turn in turns),
        "sent_away": outcome.sent_away,
        "lost_tokens": outcome.lost_tokens,
        "sessions": len(session_s),
        "turns": len(turns),
    }


def _percentiles(values: list[float]) -> list[float]:
    return quantiles(values, n=100) if len(values) > 1 else values * 99


def compare(rows: Sequence[Row], with_policy: str) -> None:
    """Give each row its ratios to the row of ``with_policy`` with the same load and seed."""
    base = {(row["per_pod"], row["seed"]): row for row in rows if row["policy"] == with_policy}
    for row in rows:
        stock = base.get((row["per_pod"], row["seed"]))
        if stock is not None:
            row["ratios"] = {
                key: stock[key] / max(row[key], 1e-9) if row[key] != stock[key] else 1.0
                for key in RATIOS
            }


def table(rows: Sequence[Row], title: str) -> Table:
    """Means over the seeds, and in brackets how many times better than the policy compared with."""
    made = Table(title=title)
    for name in ("sessions a pod", "policy", "session s", "p90", "turn s p50", "p90", "p99",
                 "first token s p50", "evicted blocks", "prefilled Mtok", "hit rate",
                 "makespan s", "out tok/s", "holds", "longest s"):  # fmt: skip
        made.add_column(name, justify="left" if name == "policy" else "right")
    keys = list(dict.fromkeys((row["per_pod"], row["policy"]) for row in rows))
    for per_pod, policy in keys:
        runs = [r for r in rows if (r["per_pod"], r["policy"]) == (per_pod, policy)]

        def mean(key: str, runs: list[Row] = runs) -> float:
            return fmean(run[key] for run in runs)

        def better(key: str, runs: list[Row] = runs) -> str:
            if "ratios" not in runs[0]:
                return ""
            return f" ({fmean(run['ratios'][key] for run in runs):.2f}x)"

        made.add_row(
            str(per_pod), policy,
            f"{mean('session_s'):,.0f}{better('session_s')}", f"{mean('session_p90_s'):,.0f}",
            f"{mean('p50_s'):.1f}", f"{mean('p90_s'):.0f}",
            f"{mean('p99_s'):,.0f}{better('p99_s')}", f"{mean('first_token_p50_s'):.1f}",
            f"{mean('evicted_blocks'):,.0f}{better('evicted_blocks')}",
            f"{mean('prefilled_tokens') / 1e6:.1f}", f"{mean('hit_rate'):.1%}",
            f"{mean('makespan_s'):,.0f}", f"{mean('goodput_tokens_per_s'):.0f}",
            f"{mean('holds'):.0f}", f"{max(run['longest_hold_s'] for run in runs):,.0f}",
        )  # fmt: skip
    return made


PANELS = (
    ("session_s", "mean time of a session, s", 1.0),
    ("prefilled_tokens", "prefilled, million tokens", 1e-6),
    ("p99_s", "p99 of a turn, s", 1.0),
)


def plot(rows: Sequence[Row], path: Path, answer: str) -> None:
    """Sessions' time, prefill and the slowest turns of each policy by load, seeds averaged, below
    what they mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    loads = sorted({row["per_pod"] for row in rows})
    for axis, (key, title, unit) in zip(axes, PANELS, strict=True):
        for i, policy in enumerate(policies):
            heights = []
            for load in loads:
                runs = [r[key] for r in rows if (r["per_pod"], r["policy"]) == (load, policy)]
                heights.append(unit * fmean(runs) if runs else 0.0)
            width = 0.8 / len(policies)
            places = [j + (i - len(policies) / 2 + 0.5) * width for j in range(len(loads))]
            axis.bar(places, heights, width, label=policy)
        axis.set_xticks(range(len(loads)), [str(load) for load in loads])
        axis.set_xlabel("concurrent sessions a pod")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=7)
    sentences = answer.replace(". At", ".\nAt").splitlines()
    figure.suptitle("\n".join(textwrap.fill(words, 160) for words in sentences), fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
