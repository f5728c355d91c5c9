"""The boards as committed, read as a Grafana would: panels and the queries behind them."""

from __future__ import annotations

import json
from typing import Any

from dashboards.__main__ import BOARDS, FOLDER

Json = dict[str, Any]


def boards() -> dict[str, Json]:
    """Every board by its file's name."""
    return {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in BOARDS}


def panels(board: Json) -> list[Json]:
    """The panels that show something: rows are left out."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def filled_in(expr: str, window_s: float) -> str:
    """A query with Grafana's variables filled in: all gateways, all pods."""
    values = {"$__rate_interval": f"{window_s:.0f}s", "$job": ".*", "$pod": ".*"}
    for name, value in values.items():
        expr = expr.replace(name, value)
    return expr
