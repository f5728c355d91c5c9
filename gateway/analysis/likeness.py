"""How like its source a made-up trace is: two-sample distances of what matters to a cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gateway.analysis.reuse import reuse
from gateway.analysis.timeline import timeline
from gateway.analysis.words import count
from gateway.traces.session import Session

Samples = dict[str, list[float]]
LEAST = 20
"""Values of a kind, in both traces, without which nothing is said of it."""
CACHE_PROMPTS = (1, 2, 4, 8, 16, 32)
"""Sizes of the cache, in mean prompts of each trace."""


CAPTION = (
    "Distributions by their medians. Distance: the most by which they differ (Kolmogorov-Smirnov),"
    " or the difference of two shares; by chance: what equal distributions of so many independent"
    " values exceed once in 20 times. Means of sessions are of logarithms."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One thing compared. ``kind`` is ``distribution`` or ``share``."""

    name: str
    kind: str
    source: float
    made: float
    distance: float
    chance: float | None = None
    """What the distance of equal distributions exceeds with a probability of 0.05."""

    @property
    def cells(self) -> list[str]:
        chance = "" if self.chance is None else f"{self.chance:.3f}"
        return [self.name, count(self.source), count(self.made), f"{self.distance:.3f}", chance]


def compare(source: Sequence[Session], made: Sequence[Session]) -> list[Row]:
    """All that both traces tell enough of."""
    a, b = samples(source), samples(made)
    rows = [
        Row(name, "distribution", float(np.median(values)), float(np.median(b[name])),
            distance(values, b[name]), 1.358 * (1 / len(values) + 1 / len(b[name])) ** 0.5)
        for name, values in a.items()
        if min(len(values), len(b.get(name, ()))) >= LEAST
    ]  # fmt: skip
    x, y = shares(source), shares(made)
    rows += [
        Row(name, "share", x[name], y[name], abs(x[name] - y[name]))
        for name in x
        if x[name] or y[name]
    ]
    slots = min(32, len(made) // 4)
    if slots:
        rates = zip(CACHE_PROMPTS, hit_rates(source, slots), hit_rates(made, slots), strict=True)
        rows += [
            Row(f"hits of {n} prompts' cache, {slots} at once", "share", p, q, abs(p - q))
            for n, p, q in rates
        ]
    return rows


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sample Kolmogorov-Smirnov statistic: the most by which the distributions differ."""
    x, y = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    at = np.concatenate((x, y))
    below = np.searchsorted(x, at, side="right") / len(x)
    return float(np.abs(below - np.searchsorted(y, at, side="right") / len(y)).max())


def samples(sessions: Sequence[Session]) -> Samples:
    """What is compared by distribution. Of the turns: prompt, growth, output, waits by kind, the
    part of calls' time in waits; of the sessions: turns, and means over their turns, which differ
    from session to session only where turns of a session belong together."""
    found: Samples = defaultdict(list)
    for session in sessions:
        turns = session.turns
        found["turns a session" if session.parent is None else "turns a sub-agent"].append(
            len(turns)
        )
        found["first prompt"].append(turns[0].prompt_tokens)
        found["last prompt"].append(turns[-1].prompt_tokens)
        waits: list[float] = []
        for before, turn in pairwise(turns):
            found["growth"].append(turn.prompt_tokens - before.prompt_tokens)
            if turn.gap_known:
                found[f"wait: {before.idle_kind}"].append(turn.gap_s)
                waits.append(turn.gap_s)
            for call in before.calls:
                if call.duration_s is not None:
                    found[f"duration: {call.tool}"].append(call.duration_s)
        for turn in turns:
            found["prompt"].append(turn.prompt_tokens)
            found["output"].append(turn.output_tokens)
            if turn.api_s is not None:
                found["response time"].append(turn.api_s)
        if len(turns) >= LEAST:
            outputs = [turn.output_tokens for turn in turns]
            found["output, mean of a session"].append(float(np.mean(np.log1p(outputs))))
            if waits:
                found["wait, mean of a session"].append(float(np.mean(np.log1p(waits))))
    return found


def shares(sessions: Sequence[Session]) -> dict[str, float]:
    """What is compared by its share of the turns: what they are followed by, broken prefixes; and
    correlations of neighbouring turns, -1..1."""
    turns = [turn for session in sessions for turn in session.turns]
    found = {
        f"turns before: {kind}": sum(turn.idle_kind == kind for turn in turns) / len(turns)
        for kind in ("tool", "human", "background", "ended")
    }
    later = broken = deep = 0
    after_output: list[tuple[float, float]] = []
    waits: list[tuple[float, float]] = []
    for session in sessions:
        length = 0
        for k, turn in enumerate(session.turns):
            if k:
                later += 1
                lost = length - turn.shared if turn.back == 1 else length
                broken += lost > 1
                deep += lost > length / 2
                before = session.turns[k - 1]
                after_output.append(
                    (
                        before.output_tokens,
                        max(0, turn.prompt_tokens - before.prompt_tokens),
                    )
                )
                if k > 1:
                    waits.append((before.gap_s, turn.gap_s))
            length = turn.shared + turn.fresh_blocks
    found["broken prefixes"] = broken / max(1, later)
    found["prefixes broken in their first half"] = deep / max(1, later)
    found["correlation of an output and the growth after it"] = _correlation(after_output)
    found["correlation of a wait and the next"] = _correlation(waits)
    return found


def hit_rates(sessions: Sequence[Session], slots: int) -> list[float]:
    """Of an LRU cache of several sizes, with ``slots`` sessions at once."""
    sessions = list(sessions)
    found = reuse(sessions, timeline(sessions, slots).sent)
    prompts = [turn.prompt_tokens for session in sessions for turn in session.turns]
    mean = float(np.mean(prompts))
    needed, whole = found.reusable_tokens, max(1, found.prompt_tokens)
    return [(needed - found.lost_tokens(n * mean)) / whole for n in CACHE_PROMPTS]


def _correlation(pairs: list[tuple[float, float]]) -> float:
    if len(pairs) < LEAST:
        return 0.0
    a, b = np.log1p(np.array(pairs, float)).T
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0
