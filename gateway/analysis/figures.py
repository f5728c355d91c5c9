"""The figures of a trace, as plain numbers: what the report is made of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.analysis.capacity import PODS
from gateway.analysis.published import PUBLISHED, own
from gateway.analysis.reuse import Reuse, reuse
from gateway.analysis.timeline import LIVE_S, Timeline, timeline
from gateway.traces.load import Trace
from gateway.traces.session import Call, Session

SCHEMA: Final = 1
Figures: TypeAlias = dict[str, Any]
Floats: TypeAlias = npt.NDArray[np.float64]

GRID_S: Final = np.logspace(-2, 5, 71)
QUANTILES: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
LEAST_CALLS: Final = 20
MOST_GROUPS: Final = 15
TURN_NUMBERS: Final = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 500)
CACHE_TOKENS: Final = tuple(
    int(n) for n in (5e4, 1e5, 2e5, 3e5, 5e5, 7e5, 1e6, 1.5e6, 2e6, 3e6, 5e6, 7e6, 1e7)
)
POINTS: Final = 400


def figures(
    trace: Trace, slots: int | None = None, step: Callable[[], None] | None = None
) -> Figures:
    """Everything the report tells. ``step`` is called once a turn of the longest part. Sessions
    without wall-clock times are laid into `slots` seats (`gateway.analysis.timeline`)."""
    sessions = [session for session in trace.sessions if session.turns]
    line = timeline(sessions, slots)
    found = {
        "schema": SCHEMA,
        "input": _input(trace, sessions),
        "sessions": _sessions(sessions),
        "prompts": _prompts(sessions),
        "waits": _waits(sessions),
        "tools": _tools(sessions),
        "prefix": _prefix(sessions),
        "working_set": _working_set(sessions, line),
        "cache": _cache(reuse(sessions, line.sent, step)),
    }
    return found | {"beside": _beside(found)}


def quantiles(values: Iterable[float]) -> dict[str, float] | None:
    """p10 to p99, the mean and the count; None of no values."""
    array = np.fromiter(values, float)
    if not len(array):
        return None
    told = np.quantile(array, QUANTILES)
    named = {f"p{round(100 * q)}": _short(v) for q, v in zip(QUANTILES, told, strict=True)}
    return named | {"mean": _short(array.mean()), "count": len(array)}


def survival(values: Sequence[float]) -> list[list[float]]:
    """[t, share over t], from all down to none."""
    array = np.sort(np.asarray(values, float))
    over = 1.0 - np.searchsorted(array, GRID_S, side="right") / len(array)
    points = [[_short(t), _short(s)] for t, s in zip(GRID_S, over, strict=True)]
    last = next((i for i, (_, share) in enumerate(points) if share == 0.0), len(points) - 1)
    return points[: last + 1]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _share(part: float, whole: float) -> float | None:
    return _short(part / whole) if whole else None


def _input(trace: Trace, sessions: list[Session]) -> Figures:
    return {
        "formats": trace.formats,
        "sessions": sum(s.parent is None for s in sessions),
        "sub_agents": sum(s.parent is not None for s in sessions),
        "turns": sum(len(s.turns) for s in sessions),
        "skipped_records": trace.problems.count,
        "problems": trace.problems.named,
        "unknown_files": len(trace.unknown),
        "copied_files": trace.copies,
        "repeated_sessions": trace.repeated,
    }


def _sessions(sessions: list[Session]) -> Figures:
    roots = [s for s in sessions if s.parent is None]
    children = [s for s in sessions if s.parent is not None]
    clients = Counter(s.client or "unknown" for s in roots)
    models = Counter(t.model or "unknown" for s in sessions for t in s.turns)
    lengths = np.sort([len(s.turns) for s in roots])
    longer = [[int(n), _short(float((lengths >= n).mean()))] for n in np.unique(lengths)]
    return {
        "turns": quantiles(len(s.turns) for s in roots),
        "turns_at_least": longer,
        "duration_s": quantiles(s.ends_s for s in roots),
        "sub_agent_turns": quantiles(len(s.turns) for s in children),
        "sub_agent_types": dict(
            Counter(s.agent_type or "unknown" for s in children).most_common(10)
        ),
        "clients": dict(clients.most_common()),
        "turns_by_model": dict(models.most_common(10)),
    }


def _prompts(sessions: list[Session]) -> Figures:
    turns = [t for s in sessions for t in s.turns]
    new = [t.prompt_tokens - min(t.prompt_tokens, t.shared * s.block_tokens)
           for s in sessions for t in s.turns]  # fmt: skip
    growth = [
        after.prompt_tokens - before.prompt_tokens
        for s in sessions
        for before, after in zip(s.turns, s.turns[1:], strict=False)
    ]
    prompt, output = sum(t.prompt_tokens for t in turns), sum(t.output_tokens for t in turns)
    told = [(t.prompt_tokens, t.cached_tokens) for t in turns if t.cached_tokens is not None]
    roots = [s for s in sessions if s.parent is None]
    by_turn = []
    for number in TURN_NUMBERS:
        there = [s.turns[number - 1].prompt_tokens for s in roots if len(s.turns) >= number]
        if len(there) >= min(10, len(roots)) and there:
            low, middle, high = np.quantile(there, (0.25, 0.5, 0.75))
            by_turn.append([number, _short(low), _short(middle), _short(high), len(there)])
    return {
        "prompt_tokens": quantiles(t.prompt_tokens for t in turns),
        "output_tokens": quantiles(t.output_tokens for t in turns),
        "new_tokens": quantiles(new),
        "growth_tokens": quantiles(growth),
        "total_prompt_tokens": prompt,
        "total_output_tokens": output,
        "total_new_tokens": sum(new),
        "new_share": _share(sum(new), prompt),
        "prompt_to_output": _share(prompt, output),
        "new_to_output": _share(sum(new), output),
        "reported_cached_share": _share(sum(c for _, c in told), sum(p for p, _ in told)),
        "by_turn": by_turn,
    }


def _waits(sessions: list[Session]) -> Figures:
    gaps: dict[str, list[float]] = defaultdict(list)
    for session in sessions:
        if not session.tells_waits:
            continue
        for before, turn in zip(session.turns, session.turns[1:], strict=False):
            if turn.gap_known:
                gaps[before.idle_kind].append(turn.gap_s)
    total = sum(map(len, gaps.values()))
    busy_s = sum(t.api_s or 0.0 for s in sessions for t in s.turns)
    return {
        "by_kind": {
            kind: {
                "share_of_turns": _share(len(values), total),
                "total_s": _short(sum(values)),
                "gap_s": quantiles(values),
                "survival": survival(values),
            }
            for kind, values in sorted(gaps.items(), key=lambda item: -len(item[1]))
        },
        "model_s": _short(busy_s),
        "tool_s": _short(sum(gaps.get("tool", ()))),
    }


def _tools(sessions: list[Session]) -> Figures:
    timed = [
        (call, call.duration_s)
        for s in sessions
        for t in s.turns
        for call in t.calls
        if call.duration_s is not None
    ]
    calls = sum(len(t.calls) for s in sessions for t in s.turns)
    asking = [len(t.calls) for s in sessions for t in s.turns if t.calls]
    telling = [s for s in sessions if any(t.calls for t in s.turns)]
    return {
        "calls": calls,
        "timed_calls": len(timed),
        "calls_per_turn": _share(calls, sum(len(s.turns) for s in telling)),
        "duration_s": quantiles(duration_s for _, duration_s in timed),
        "failed_share": _share(sum(call.failed for call, _ in timed), len(timed)),
        "calls_per_asking_turn": quantiles(asking),
        "by_kind": _groups(timed, lambda call: call.kind),
        "by_tool": _groups(timed, lambda call: call.tool),
        "by_program": _groups(timed, _program),
    }


def _program(call: Call) -> str:
    if call.kind != "shell" or not call.program:
        return ""
    return f"{call.program} {call.sub}".strip()


def _groups(timed: list[tuple[Call, float]], name_of: Callable[[Call], str]) -> Figures:
    """Durations by group: those of enough calls, most total time first."""
    groups: dict[str, list[float]] = defaultdict(list)
    for call, duration_s in timed:
        if name := name_of(call):
            groups[name].append(duration_s)
    total = sum(duration_s for _, duration_s in timed)
    least = min(LEAST_CALLS, max(1, len(timed) // 50))
    big = sorted(groups.items(), key=lambda item: -sum(item[1]))
    return {
        name: {
            "share_of_time": _share(sum(values), total),
            "duration_s": quantiles(values),
            "survival": survival(values),
        }
        for name, values in big
        if len(values) >= least
    } if timed else {}  # fmt: skip


def _prefix(sessions: list[Session]) -> Figures:
    causes: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    turns = 0
    for session in sessions:
        size = session.block_tokens
        lengths: list[int] = []
        head = session.tool_tokens + session.system_tokens
        for k, turn in enumerate(session.turns):
            own = turn.shared + turn.fresh_blocks
            if k:
                turns += 1
                before = session.turns[k - 1]
                kept = turn.shared if turn.back == 1 else 0
                broken = lengths[-1] - kept
                if broken > 1:
                    smaller = turn.prompt_tokens < 0.6 * before.prompt_tokens
                    if turn.back > 1:
                        cause = "went on from an older prompt"
                    elif turn.compacted or smaller:
                        cause = "compacted or cut to under 60 %"
                    elif turn.model != before.model:
                        cause = "another model"
                    elif turn.shared * size <= head or turn.shared == 0:
                        cause = "tools or system prompt changed"
                    elif turn.prompt_tokens < before.prompt_tokens:
                        cause = "history shortened"
                    else:
                        cause = "history edited"
                    causes[cause] += 1
                    lost[cause] += broken * size
            lengths.append(own)
    breaks = sum(causes.values())
    return {
        "later_turns": turns,
        "breaks": breaks,
        "break_share": _share(breaks, turns),
        "causes": {
            cause: {"turns": count, "lost_tokens": lost[cause]}
            for cause, count in causes.most_common()
        },
    }


def _working_set(sessions: list[Session], line: Timeline) -> Figures:
    by_session: dict[int, list[tuple[float, float, int]]] = defaultdict(list)
    for sent in line.sent:
        turn = sessions[sent.session].turns[sent.turn]
        tokens = turn.prompt_tokens + turn.output_tokens
        by_session[sent.session].append((sent.at_s, sent.ends_s, tokens))
    times: list[float] = []
    tokens_by: list[int] = []
    alive: list[int] = []
    for turns in by_session.values():
        for (at_s, ends_s, tokens), after in zip(turns, [*turns[1:], None], strict=True):
            until_s = ends_s + LIVE_S
            if after is not None:
                until_s = min(until_s, after[0])
            times += [at_s, max(at_s, until_s)]
            tokens_by += [tokens, -tokens]
            alive += [1, -1]
    order = np.argsort(np.array(times), kind="stable")
    at = np.array(times)[order]
    level = np.cumsum(np.array(tokens_by, float)[order])
    count = np.cumsum(np.array(alive, float)[order])
    lasts = np.diff(at, append=at[-1] if len(at) else 0.0)
    used = (lasts > 0) & (count > 0) & (at <= line.full_s)
    told = _weighted(level[used], lasts[used])
    at_once = _weighted(count[used], lasts[used])
    mean = float(np.average(level[used], weights=lasts[used])) if used.any() else 0.0
    sessions_mean = float(np.average(count[used], weights=lasts[used])) if used.any() else 0.0
    context = mean / sessions_mean if sessions_mean else 0.0
    return {
        "wall_clock": line.wall_clock,
        "slots": line.slots,
        "live_s": LIVE_S,
        "tokens": told,
        "sessions_at_once": at_once,
        "mean_live_context_tokens": _short(context),
        "over_time": _sampled(at[at <= line.full_s], level[at <= line.full_s]),
        "pods": [
            {
                "pod": pod.name,
                "kv_bytes_per_token": pod.model.kv_bytes_per_token,
                "kv_tokens": pod.kv_tokens,
                "sessions_that_fit": _share(pod.kv_tokens, context),
                "share_of_time_over": _share(
                    float(lasts[used & (level > pod.kv_tokens)].sum()), float(lasts[used].sum())
                ),
            }
            for pod in PODS
        ],
    }


def _weighted(values: Floats, weights: Floats) -> dict[str, float] | None:
    if not len(values):
        return None
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    found = {
        f"p{round(100 * q)}": _short(
            values[order][min(int(np.searchsorted(reached, q)), len(order) - 1)]
        )
        for q in QUANTILES
    }
    return found | {"max": _short(values.max())}


def _sampled(at: Floats, level: Floats) -> list[list[float]]:
    """The highest level in each of equal spans of time: [seconds, tokens]."""
    if len(at) < 2 or at[-1] <= at[0]:
        return []
    edges = np.linspace(at[0], at[-1], POINTS + 1)
    begin = np.clip(np.searchsorted(at, edges[:-1], side="right") - 1, 0, None)
    end = np.searchsorted(at, edges[1:], side="left")
    return [
        [_short(edges[i]), _short(level[begin[i] : max(end[i], begin[i] + 1)].max())]
        for i in range(POINTS)
    ]


def _cache(found: Reuse) -> Figures:
    whole = found.prompt_tokens
    sizes = sorted({*CACHE_TOKENS, *(pod.kv_tokens for pod in PODS if pod.kv_tokens)})
    needed = found.reusable_tokens
    return {
        "prompt_tokens": whole,
        "reusable_tokens": needed,
        "reusable_share": _share(needed, whole),
        "from_other_sessions_share": _share(found.from_others_tokens, whole),
        "first_turn_from_other_sessions_share": _share(
            found.first_from_others_tokens, found.first_prompt_tokens
        ),
        "lru": [
            {
                "cache_tokens": size,
                "lost_tokens": (lost := found.lost_tokens(size)),
                "lost_share_of_reusable": _share(lost, needed),
                "hit_rate": _share(needed - lost, whole),
            }
            for size in sizes
        ],
    }


def _beside(found: Figures) -> Figures:
    """Some of the figures, and the same of other traces."""
    return {
        "here": own(found),
        "published": [
            {"trace": trace.name, "what": trace.what, "figures": trace.figures}
            for trace in PUBLISHED
        ],
    }
