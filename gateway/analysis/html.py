"""The report as one page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from html import escape
from typing import Final

from gateway.analysis import plots
from gateway.analysis.figures import Figures
from gateway.analysis.report import Section, Table, sections

_STYLE: Final = """
body{margin:0;background:#f8fafc;color:#1e293b;font:15px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem}
h1{font-size:1.5rem;margin:.5rem 0 1rem}h2{font-size:1.15rem;margin:0 0 .5rem}
section{background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:1rem 1.25rem;
margin:0 0 1rem}p{margin:.25rem 0 .75rem;max-width:50rem}
svg{max-width:100%;height:auto;display:block;margin:.5rem 0}
div{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:.25rem 0 1rem}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #e2e8f0;white-space:nowrap;
font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left;padding-left:0}
th{color:#64748b;font-weight:500}
"""


def page(figures: Figures) -> str:
    """The whole page."""
    parts = "\n".join(_section(part, figures) for part in sections(figures))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Workload report</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>Workload report</h1>\n{parts}\n</main></body></html>\n"
    )


def _section(part: Section, figures: Figures) -> str:
    words = "".join(f"<p>{escape(text)}</p>" for text in part.words)
    drawn = "".join(plots.draw(name, figures) for name in part.plots)
    tables = "".join(map(_table, part.tables))
    return f"<section><h2>{escape(part.title)}</h2>{words}{drawn}{tables}</section>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f"<div><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
