"""The report: what the figures say, as sections of sentences, tables and plots, and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from gateway.analysis.figures import MOST_GROUPS, Figures
from gateway.analysis.published import ROWS
from gateway.analysis.words import count, seconds, share

_SPREAD: Final = ("p10", "p50", "p90", "p99")


@dataclass
class Table:
    head: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    """A part of the report. ``plots`` are names of `gateway.analysis.plots`."""

    title: str
    words: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)


def sections(figures: Figures) -> list[Section]:
    """The report's parts; those that the trace tells nothing of are left out."""
    parts = [
        _overview(figures),
        _prompts(figures),
        _waits(figures),
        _tools(figures),
        _prefix(figures),
        _working_set(figures),
        _cache(figures),
        _beside(figures),
        _input(figures),
    ]
    return [part for part in parts if part is not None]


def markdown(figures: Figures) -> str:
    """The report without its plots."""
    lines = ["# Workload report", ""]
    for part in sections(figures):
        lines += [f"## {part.title}", ""]
        for words in part.words:
            lines += [words, ""]
        for table in part.tables:
            lines += [_row(table.head), _row(["---"] + ["---:"] * (len(table.head) - 1))]
            lines += [*map(_row, table.rows), ""]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _spread(name: str, told: dict[str, float] | None, show: Any) -> list[str]:
    return [name, *(show(told[q]) if told else "–" for q in (*_SPREAD, "mean"))]


def _overview(figures: Figures) -> Section:
    given, told = figures["input"], figures["sessions"]
    clients = ", ".join(f"{name} {n}" for name, n in told["clients"].items())
    words = [
        f"{given['sessions']:,} sessions and {given['sub_agents']:,} sub-agents made"
        f" {given['turns']:,} model calls (clients: {clients})."
    ]
    table = Table(["", *_SPREAD, "mean"], [
        _spread("turns a session", told["turns"], count),
        _spread("length of a session", told["duration_s"], seconds),
    ])  # fmt: skip
    if told["sub_agent_turns"]:
        table.rows.append(_spread("turns a sub-agent", told["sub_agent_turns"], count))
    return Section("Sessions", words, [table], ["session_length"])


def _prompts(figures: Figures) -> Section:
    told = figures["prompts"]
    words = [
        f"Prompts hold {count(told['prompt_to_output'])} tokens for each one generated;"
        f" {share(told['new_share'])} of them are new in their session, which leaves"
        f" {count(told['new_to_output'])} tokens to prefill for each generated one if nothing is"
        " ever lost."
    ]
    if told["reported_cached_share"] is not None:
        words.append(
            f"The servers that answered had {share(told['reported_cached_share'])} of the prompts"
            " in their caches, by their own account."
        )
    table = Table(["tokens", *_SPREAD, "mean"], [
        _spread("prompt", told["prompt_tokens"], count),
        _spread("of it new", told["new_tokens"], count),
        _spread("growth since the turn before", told["growth_tokens"], count),
        _spread("generated", told["output_tokens"], count),
    ])  # fmt: skip
    return Section("Prompts", words, [table], ["prompt_growth"])


_KINDS: Final = {
    "tool": "a tool",
    "human": "a person",
    "background": "a background task",
    "ended": "nothing: it had ended",
}


def _waits(figures: Figures) -> Section | None:
    told = figures["waits"]["by_kind"]
    if not told:
        return None
    table = Table(["waited for", "turns", *_SPREAD, "mean", "in all"], [
        [_KINDS[kind], share(each["share_of_turns"]), *_spread("", each["gap_s"], seconds)[1:],
         seconds(each["total_s"])]
        for kind, each in told.items()
    ])  # fmt: skip
    words = [
        "The time from the end of a response to the session's next request, by what it waited for."
    ]
    if "tool" in told:
        words.append(
            f"{share(told['tool']['share_of_turns'])} of the later turns were triggered by a tool's"
            f" result. Sessions spent {seconds(figures['waits']['model_s'])} with the model and"
            f" {seconds(figures['waits']['tool_s'])} with tools."
        )
    return Section("Waits between turns", words, [table], ["waits"])


def _tools(figures: Figures) -> Section | None:
    told = figures["tools"]
    if not told["by_kind"]:
        return None
    tables = [
        Table([name, "calls", *_SPREAD, "mean", "of all tool time"], [
            [group, count(each["duration_s"]["count"]),
             *_spread("", each["duration_s"], seconds)[1:], share(each["share_of_time"])]
            for group, each in list(told[key].items())[:MOST_GROUPS]
        ])
        for name, key in (("kind", "by_kind"), ("tool", "by_tool"), ("program", "by_program"))
        if told[key]
    ]  # fmt: skip
    words = [
        f"{told['calls']:,} tool calls, {told['timed_calls']:,} of them with a known duration;"
        f" {share(told['failed_share'])} failed. Durations include the time a person took to permit"
        " the call. Rows are sorted by total time; groups of few calls are left out."
    ]
    return Section("Tools", words, tables, ["tool_kinds", "programs"])


def _prefix(figures: Figures) -> Section:
    told = figures["prefix"]
    table = Table(["what broke the prefix", "turns", "tokens to prefill again"], [
        [cause, f"{each['turns']:,}", count(each["lost_tokens"])]
        for cause, each in told["causes"].items()
    ])  # fmt: skip
    words = [
        f"{told['breaks']:,} of {told['later_turns']:,} later turns ({share(told['break_share'])})"
        " did not extend the whole prompt before them."
    ]
    if {"claude-code", "codex", "tracelab", "turns"} & set(figures["input"]["formats"]):
        words.append(
            "Transcripts and turn records tell only the prompts' lengths: there a break shows where"
            " a prompt got shorter or followed a compaction, and sharing between sessions not at"
            " all."
        )
    return Section("Prefix reuse", words, [table] if table.rows else [], ["prefix_breaks"])


def _working_set(figures: Figures) -> Section:
    told = figures["working_set"]
    words = [_clock(told)]
    if told["tokens"]:
        words.append(
            f"Live sessions need the KV of {count(told['tokens']['p50'])} tokens at the median and"
            f" {count(told['tokens']['max'])} at the highest; a live session holds"
            f" {count(told['mean_live_context_tokens'])} tokens on average."
        )
    table = Table(["pod", "KV bytes a token", "KV tokens", "sessions that fit", "time over it"], [
        [pod["pod"], f"{pod['kv_bytes_per_token']:,}", count(pod["kv_tokens"]),
         count(pod["sessions_that_fit"]), share(pod["share_of_time_over"])]
        for pod in told["pods"]
    ])  # fmt: skip
    return Section("Working set and what pods hold", words, [table], ["working_set"])


def _clock(told: Figures) -> str:
    live = f"A session is live from its request until {told['live_s']:.0f} s after its response."
    if told["wall_clock"]:
        return f"Sessions at the times they were recorded. {live}"
    return (
        f"Sessions laid beside one another, {told['slots']} at once, waits over 300 s cut to 300 s."
        f" {live}"
    )


def _cache(figures: Figures) -> Section:
    told = figures["cache"]
    words = [
        f"{share(told['reusable_share'])} of all prompt tokens had been computed before. What a"
        " single cache that evicts the least recently used block first throws away of them, though"
        " it is needed again:",
    ]
    if told["from_other_sessions_share"]:
        words.append(
            f"{share(told['first_turn_from_other_sessions_share'])} of first prompts, and"
            f" {share(told['from_other_sessions_share'])} of all prompt tokens, came from another"
            " session's prompts."
        )
    table = Table(["cache, tokens", "hit rate", "thrown away but needed", "of the reusable"], [
        [count(row["cache_tokens"]), share(row["hit_rate"]), count(row["lost_tokens"]),
         share(row["lost_share_of_reusable"])]
        for row in told["lru"]
    ])  # fmt: skip
    return Section("What LRU throws away", words, [table], ["lru"])


def _beside(figures: Figures) -> Section:
    here, others = figures["beside"]["here"], figures["beside"]["published"]
    table = Table(["", "here", *(other["trace"] for other in others)], [
        [row.title, *(row.show(of.get(name))
                      for of in (here, *(other["figures"] for other in others)))]
        for name, row in ROWS.items()
    ])  # fmt: skip
    words = ["What others found of coding agents' sessions:"]
    words += [f"{other['trace']}: {other['what']}." for other in others]
    return Section("Beside published traces", words, [table])


def _input(figures: Figures) -> Section:
    told = figures["input"]
    formats = ", ".join(f"{name} ({n} files)" for name, n in told["formats"].items())
    words = [f"Formats: {formats}."]
    if told["copied_files"]:
        words.append(f"{told['copied_files']:,} files were copies of others and count once.")
    if told["repeated_sessions"]:
        words.append(f"{told['repeated_sessions']:,} sessions were there twice and count once.")
    if told["unknown_files"]:
        words.append(f"{told['unknown_files']:,} files are of no known format.")
    words.append(f"{told['skipped_records']:,} records could not be read and were skipped.")
    table = Table(["skipped"], [[name] for name in told["problems"]])
    return Section("What was read", words, [table] if table.rows else [])
