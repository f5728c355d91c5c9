"""Numbers as people read them."""

from __future__ import annotations


def seconds(value: float | None) -> str:
    """A time: 40 ms, 1.2 s, 3.5 min, 2.1 h, 4 d."""
    if value is None:
        return "–"
    for least, unit, factor in (
        (172_800, "d", 1 / 86_400),
        (7_200, "h", 1 / 3600),
        (120, "min", 1 / 60),
        (1, "s", 1.0),
    ):
        if value >= least:
            return f"{_number(value * factor)} {unit}"
    return f"{_number(value * 1000)} ms"


def count(value: float | None) -> str:
    """A count: 950, 12k, 3.4M, 1.2G."""
    if value is None:
        return "–"
    for least, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= least:
            return f"{_number(value / (1e3 if unit == 'k' else least))}{unit}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else _number(value)


def share(value: float | None) -> str:
    """A share as percent."""
    return "–" if value is None else f"{_number(100 * value)} %"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
