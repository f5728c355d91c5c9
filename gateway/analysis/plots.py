"""The report's plots, as small SVGs. Needs matplotlib (the extra ``analyze``)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from gateway.analysis.figures import Figures
from gateway.analysis.words import count, seconds, share

COLOURS: Final = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#65a30d",
                  "#64748b")  # fmt: skip
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cachewise",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.labelcolor": "#334155",
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_MOST: Final = 8


def draw(name: str, figures: Figures) -> str:
    """One plot as an SVG element; empty where the figures hold nothing to draw."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        if not _PLOTS[name](figure.add_subplot(), figures):
            return ""
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name.replace("_", " ")}" ', 1)


def _session_length(ax: Axes, figures: Figures) -> bool:
    points = figures["sessions"]["turns_at_least"]
    ax.step([n for n, _ in points], [s for _, s in points], where="pre", color=COLOURS[0])
    ax.set(xscale="log", xlabel="turns", ylabel="sessions of at least so many turns")
    _axis(ax.xaxis, count)
    _axis(ax.yaxis, share)
    return bool(points)


def _prompt_growth(ax: Axes, figures: Figures) -> bool:
    rows = figures["prompts"]["by_turn"]
    turns = [row[0] for row in rows]
    ax.fill_between(turns, [r[1] for r in rows], [r[3] for r in rows], color=COLOURS[0], alpha=0.15)
    ax.plot(turns, [row[2] for row in rows], color=COLOURS[0], marker="o", markersize=3)
    ax.set(
        xlabel="turn of a session", ylabel="prompt, tokens (median, middle half)", ylim=(0, None)
    )
    _axis(ax.yaxis, count)
    return len(rows) > 1


def _survivals(ax: Axes, groups: dict[str, list[list[float]]], what: str) -> bool:
    for colour, (name, points) in zip(COLOURS, groups.items(), strict=False):
        ax.plot([t for t, _ in points], [s for _, s in points], color=colour, label=name, lw=1.5)
    ax.set(xscale="log", xlabel=what, ylabel="share that takes longer", ylim=(0, 1))
    ax.set_xticks([0.01, 0.1, 1, 10, 60, 600, 3600, 36_000])
    _axis(ax.xaxis, seconds)
    _axis(ax.yaxis, share)
    if groups:
        ax.legend()
    return bool(groups)


def _waits(ax: Axes, figures: Figures) -> bool:
    told = figures["waits"]["by_kind"]
    return _survivals(ax, {kind: each["survival"] for kind, each in told.items()}, "wait")


def _tool_groups(key: str) -> Callable[[Axes, Figures], bool]:
    def plot(ax: Axes, figures: Figures) -> bool:
        groups = list(figures["tools"][key].items())[:_MOST]
        return _survivals(
            ax, {name: each["survival"] for name, each in groups}, "duration of a call"
        )

    return plot


def _prefix_breaks(ax: Axes, figures: Figures) -> bool:
    causes = figures["prefix"]["causes"]
    names = list(causes)[::-1]
    bars = ax.barh(names, [causes[name]["lost_tokens"] for name in names], color=COLOURS[0])
    ax.bar_label(
        bars, [f"{causes[name]['turns']:,} turns" for name in names], padding=3, fontsize=8
    )
    ax.set(xlabel="tokens to prefill again")
    ax.margins(x=0.15)
    ax.grid(visible=False, axis="y")
    _axis(ax.xaxis, count)
    return bool(names)


def _working_set(ax: Axes, figures: Figures) -> bool:
    told = figures["working_set"]
    points = told["over_time"]
    last_s = points[-1][0] if points else 0.0
    unit_s = next((unit for unit in (86_400, 3600, 60) if last_s > 2 * unit), 1)
    ax.fill_between(
        [t / unit_s for t, _ in points], [n for _, n in points], color=COLOURS[0], alpha=0.35, lw=0
    )
    top = max((n for _, n in points), default=0.0)
    shown = {
        pod["kv_tokens"]: pod["pod"] for pod in told["pods"] if 0 < pod["kv_tokens"] < 1.5 * top
    }
    for colour, (tokens, name) in zip(COLOURS[1:], sorted(shown.items()), strict=False):
        ax.axhline(tokens, color=colour, lw=1, label=f"{name} ({count(tokens)})")
    ax.set(xlabel="time", ylabel="KV of live sessions, tokens", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    _axis(ax.xaxis, lambda at: seconds(at * unit_s) if at else "0")
    _axis(ax.yaxis, count)
    if shown:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return bool(points)


def _lru(ax: Axes, figures: Figures) -> bool:
    rows = figures["cache"]["lru"]
    sizes = [row["cache_tokens"] for row in rows]
    ax.plot(
        sizes, [row["hit_rate"] or 0.0 for row in rows], color=COLOURS[0], label="found in cache"
    )
    ceiling = figures["cache"]["reusable_share"] or 0.0
    ax.axhline(ceiling, color=COLOURS[2], ls="--", lw=1, label="computed before")
    ax.fill_between(sizes, [row["hit_rate"] or 0.0 for row in rows], ceiling, color=COLOURS[4],
                    alpha=0.12, label="thrown away but needed")  # fmt: skip
    ax.set(xscale="log", xlabel="cache, tokens", ylabel="share of prompt tokens", ylim=(0, 1))
    _axis(ax.xaxis, count)
    _axis(ax.yaxis, share)
    ax.legend()
    return ceiling > 0


def _axis(axis: Any, show: Callable[[float], str]) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.set_minor_formatter(NullFormatter())


_PLOTS: Final[dict[str, Callable[[Axes, Figures], bool]]] = {
    "session_length": _session_length,
    "prompt_growth": _prompt_growth,
    "waits": _waits,
    "tool_kinds": _tool_groups("by_kind"),
    "programs": _tool_groups("by_program"),
    "prefix_breaks": _prefix_breaks,
    "working_set": _working_set,
    "lru": _lru,
}
