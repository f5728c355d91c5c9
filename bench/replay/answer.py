"""What a replay says to the one who asks "what would I gain": a sentence for each load."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Final

BASE: Final = "stock"
PATCHED: Final = "cachewise"
UNPATCHED: Final = "unpatched"
NOTHING: Final = 0.03
"""Changes up to it count as none."""
NOTHING_P99: Final = 0.05
"""The same, of the 99th percentile of a turn, which few turns decide."""

Row = dict[str, Any]


def answer(rows: Sequence[Row]) -> str:
    """What CacheWise changes against stock vLLM, means over the seeds; what gets worse stands in
    the same sentence. Without stock vLLM or CacheWise among the policies there is none."""
    loads = sorted({row["per_pod"] for row in rows})
    told = [_at(load, [row for row in rows if row["per_pod"] == load]) for load in loads]
    if not any(told):
        return f"No answer: it takes the policies {BASE} and {PATCHED} or {UNPATCHED}."
    return " ".join(filter(None, told))


def _at(load: int, rows: Sequence[Row]) -> str:
    by_policy: dict[str, list[Row]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], []).append(row)
    ours = next((name for name in (PATCHED, UNPATCHED) if name in by_policy), None)
    if ours is None or BASE not in by_policy:
        return ""
    where = f"At {load} concurrent session{'s' * (load > 1)}{' a pod' * (rows[0]['pods'] > 1)}"
    stock, changed = by_policy[BASE], _Change.between(by_policy[BASE], by_policy[ours])
    lost = fmean(row["lost_tokens"].get("evicted", 0) for row in stock)
    fits = lost <= NOTHING * fmean(row["prefilled_tokens"] for row in stock)
    if changed.is_nothing:
        return f"{where}{' everything fits:' if fits else ''} nothing changes."
    said = f"{where}: {changed.words} than on stock vLLM ({changed.seconds}), {changed.tail}"
    if ours == PATCHED and UNPATCHED in by_policy:
        if _Change.between(by_policy[UNPATCHED], by_policy[PATCHED]).is_nothing:
            said += "; the patch adds nothing to what admission does"
        else:
            alone = _Change.between(stock, by_policy[UNPATCHED])
            told = "nothing changes" if alone.is_nothing else f"{alone.words}, {alone.tail}"
            said += f"; without the patch {told}"
    return f"{said}."


class _Change:
    """From one policy's runs to another's."""

    def __init__(self, before: dict[str, float], after: dict[str, float]) -> None:
        self._less = 1 - after["prefilled_tokens"] / max(before["prefilled_tokens"], 1)
        self._session_s = before["session_s"], after["session_s"]
        self._sooner = before["session_s"] / max(after["session_s"], 1e-9)
        self._p99_s = before["p99_s"], after["p99_s"]
        self._slower = after["p99_s"] / max(before["p99_s"], 1e-9)

    @classmethod
    def between(cls, before: Sequence[Row], after: Sequence[Row]) -> _Change:
        keys = ("prefilled_tokens", "session_s", "p99_s")
        means = [{key: fmean(row[key] for row in rows) for key in keys} for rows in (before, after)]
        return cls(*means)

    @property
    def is_nothing(self) -> bool:
        return (
            abs(self._less) <= NOTHING
            and abs(self._sooner - 1) <= NOTHING
            and abs(self._slower - 1) <= NOTHING_P99
        )

    @property
    def words(self) -> str:
        return f"{self._prefill} and {self._sessions}"

    @property
    def seconds(self) -> str:
        """Of a session."""
        return " → ".join(map(_seconds, self._session_s))

    @property
    def _prefill(self) -> str:
        if abs(self._less) <= NOTHING:
            return "no less prefill"
        return f"{100 * abs(self._less):.0f} % {'less' if self._less > 0 else 'more'} prefill"

    @property
    def _sessions(self) -> str:
        if abs(self._sooner - 1) <= NOTHING:
            return "sessions no sooner"
        if self._sooner > 1:
            return f"sessions {_times(self._sooner)} sooner"
        return f"sessions {_times(1 / self._sooner)} later"

    @property
    def tail(self) -> str:
        """Of the slowest turns."""
        spread = f"({' → '.join(map(_seconds, self._p99_s))})"
        if abs(self._slower - 1) <= NOTHING_P99:
            return f"with the same 99th percentile of a turn {spread}"
        if self._slower > 1:
            return f"but the 99th percentile of a turn {_times(self._slower)} longer {spread}"
        return f"and the 99th percentile of a turn {_times(1 / self._slower)} shorter {spread}"


def _times(value: float) -> str:
    return f"{value:.2f}x" if value < 1.2 else f"{value:.1f}x"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"
