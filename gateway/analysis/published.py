"""What others found of agents' sessions, for one's own to stand beside.

Values of `TRACELAB` are its authors' (CC BY 4.0; arXiv 2606.30560 and tracelab.cs.washington.edu,
state of June 2026: 4,265 sessions, 357,161 model calls, 432,510 tool calls, 54.9 G prompt tokens,
186.9 M generated); the others are what `gateway.analysis.figures` finds in the traces. The paper
this project carries on, CacheWise (arXiv 2606.16824), gives no such value in its abstract.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gateway.analysis.words import count, seconds, share


@dataclass(frozen=True)
class Published:
    """Figures of a trace, by their names in `ROWS`."""

    name: str
    what: str
    figures: dict[str, float]


KV_CACHE_TESTER: Final = Published(
    "kv-cache-tester",
    "483 anonymised sessions of Claude Code (callanjfox/kv-cache-tester, Apache-2.0; a part)",
    {
        "turns_per_session": 65.64,
        "prompt_tokens_mean": 118_100.0,
        "output_tokens_mean": 442.6,
        "prompt_to_output": 266.8,
        "tool_triggered_share": 0.9465,
        "tool_wait_s_p50": 1.14,
        "tool_wait_s_p90": 61.58,
        "human_wait_s_p50": 164.4,
        "human_wait_s_p90": 2392.0,
    },
)
TRANSCRIPTS: Final = Published(
    "public transcripts",
    "477 sessions of Claude Code and Codex whose transcripts nine public repositories hold"
    " (gateway/predictor/PRIORS.md names them; a part)",
    {
        "turns_per_session": 60.8,
        "prompt_tokens_mean": 119_300.0,
        "output_tokens_mean": 295.3,
        "prompt_to_output": 403.9,
        "cached_share": 0.9649,
        "tool_triggered_share": 0.9346,
        "tool_wait_s_p50": 0.262,
        "tool_wait_s_p90": 8.986,
        "human_wait_s_p50": 121.6,
        "human_wait_s_p90": 1308.0,
        "tool_calls_per_turn": 1.187,
        "tool_call_s_p50": 0.265,
        "tool_call_s_p90": 7.743,
    },
)
TRACELAB: Final = Published(
    "TraceLab",
    "4,265 sessions of Claude Code and Codex of 43 people (uw-syfi/TraceLab, CC BY 4.0; arXiv"
    " 2606.30560); its tools' times as the agents measured them where they did, of its tools' and"
    " people's times those above zero",
    {
        "turns_per_session": 83.74,
        "prompt_tokens_mean": 153_700.0,
        "output_tokens_mean": 523.3,
        "prompt_to_output": 293.7,
        "cached_share": 0.958,
        # 73.6 steps a session follow a tool's result, 8.9 a person's message, of which one is the
        # session's first.
        "tool_triggered_share": 0.9031,
        "human_wait_s_p50": 84.0,
        "human_wait_s_p90": 1236.0,
        "tool_calls_per_turn": 1.211,
        "tool_call_s_p50": 0.3,
        "tool_call_s_p90": 13.6,
    },
)
PUBLISHED: Final = (KV_CACHE_TESTER, TRANSCRIPTS, TRACELAB)


@dataclass(frozen=True)
class Row:
    """One figure: what it is called, how it is shown, and where it stands among the others."""

    title: str
    show: Callable[[float | None], str]
    path: tuple[str, ...]


ROWS: Final = {
    "turns_per_session": Row("turns a session, mean", count, ("sessions", "turns", "mean")),
    "prompt_tokens_mean": Row("prompt tokens, mean", count, ("prompts", "prompt_tokens", "mean")),
    "output_tokens_mean": Row(
        "generated tokens, mean", count, ("prompts", "output_tokens", "mean")
    ),
    "prompt_to_output": Row(
        "prompt tokens for each generated one", count, ("prompts", "prompt_to_output")
    ),
    "cached_share": Row(
        "of the prompts in the servers' caches", share, ("prompts", "reported_cached_share")
    ),
    "tool_triggered_share": Row(
        "of the later turns triggered by a tool", share,
        ("waits", "by_kind", "tool", "share_of_turns"),
    ),
    "tool_wait_s_p50": Row(
        "wait for tools, p50", seconds, ("waits", "by_kind", "tool", "gap_s", "p50")
    ),
    "tool_wait_s_p90": Row(
        "wait for tools, p90", seconds, ("waits", "by_kind", "tool", "gap_s", "p90")
    ),
    "human_wait_s_p50": Row(
        "wait for a person, p50", seconds, ("waits", "by_kind", "human", "gap_s", "p50")
    ),
    "human_wait_s_p90": Row(
        "wait for a person, p90", seconds, ("waits", "by_kind", "human", "gap_s", "p90")
    ),
    "tool_calls_per_turn": Row("tool calls a turn, mean", count, ("tools", "calls_per_turn")),
    "tool_call_s_p50": Row("a tool call, p50", seconds, ("tools", "duration_s", "p50")),
    "tool_call_s_p90": Row("a tool call, p90", seconds, ("tools", "duration_s", "p90")),
}  # fmt: skip


def own(figures: dict[str, Any]) -> dict[str, float]:
    """The same figures of a trace, as far as it tells them."""
    found = {name: _at(figures, row.path) for name, row in ROWS.items()}
    return {name: value for name, value in found.items() if value is not None}


def _at(figures: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        figures = figures.get(key) if figures is not None else None
    return None if figures is None else float(figures)
