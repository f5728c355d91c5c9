"""python -m dashboards.picture: pictures of the boards, `docs/img/dashboard-*.png`.

Runs the fleet of `dashboards.live` for some minutes, asks its Prometheus what each panel asks, and
draws the answers with matplotlib, panel by panel where the board has them.
"""

from __future__ import annotations

import asyncio
import io
import math
import re
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Final

import matplotlib as mpl
import typer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullLocator
from PIL import Image

from dashboards.live import Live, Prometheus, Series, live
from dashboards.queries import Json, boards, filled_in, panels

IMAGES: Final = Path(__file__).resolve().parents[1] / "docs" / "img"
STEP_S: Final = 2
WINDOW_S: Final = 15
COLUMN_IN: Final = 0.62
ROW_IN: Final = 0.37
PAGE, CARD, INK, FAINT, GRID = "#111217", "#181b1f", "#ccccdc", "#8e8e9c", "#2b2e36"
COLOURS: Final = {
    "green": "#73bf69",
    "yellow": "#fade2a",
    "orange": "#ff9830",
    "red": "#f2495c",
    "dark-red": "#c4162a",
    "blue": "#5794f2",
    "purple": "#b877d9",
}
PALETTE: Final = (
    *("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0"),
    *("#37872d", "#33b5e5", "#ffa6b0", "#c15c17", "#890f02"),
)
LEGEND_ROWS: Final = 2


def amount(value: float, unit: str) -> str:
    """A value as a panel writes it."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        for scale, name in ((60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(value) >= scale:
                return f"{value / scale:.3g} {name}"
        return "0 s"
    suffix = {"reqps": "/s", "bytes": "B"}.get(unit, "")
    base = 1024.0 if unit == "bytes" else 1000.0
    for power, name in ((3, "G"), (2, "M"), (1, "k")):
        if abs(value) >= base**power:
            return f"{value / base**power:.3g} {name}{'i' if unit == 'bytes' else ''}{suffix}"
    return f"{value:.3g}{' ' if suffix == 'B' else ''}{suffix}"


def legend(pattern: str, series: Series) -> str:
    """What a series is called: `{{label}}` filled in."""
    filled = re.sub(r"\{\{(\w+)\}\}", lambda match: series.labels.get(match[1], ""), pattern)
    return filled.strip() or "value"


def fixed_colours(panel: Json) -> dict[str, str]:
    return {
        override["matcher"]["options"]: COLOURS[item["value"]["fixedColor"]]
        for override in panel["fieldConfig"]["overrides"]
        for item in override["properties"]
    }


def steps_of(panel: Json) -> list[tuple[float, str]]:
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", ())
    return [(-1e30 if s["value"] is None else s["value"], s["color"]) for s in steps]


class Picture:
    """One board drawn."""

    def __init__(self, board: Json, began_at: float, ended_at: float) -> None:
        self.board = board
        self.duration_s = ended_at - began_at
        self.began_at = began_at
        self.rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in board["panels"])
        self.width_in, self.height_in = 24 * COLUMN_IN, (self.rows + 1.6) * ROW_IN
        self.figure: Figure = plt.figure(figsize=(self.width_in, self.height_in), facecolor=PAGE)
        self.text(0.12, self.height_in - 0.4, board["title"], size=15, weight="bold")
        for panel in board["panels"]:
            if panel["type"] == "row":
                top = self.height_in - (panel["gridPos"]["y"] + 1.6) * ROW_IN
                self.text(0.12, top - 0.27, f"▾ {panel['title']}", size=12, weight="bold")

    def text(self, x_in: float, y_in: float, said: str, **style: Any) -> None:
        self.figure.text(
            x_in / self.width_in, y_in / self.height_in, said, **({"color": INK} | style)
        )

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Axes at a place in inches."""
        made = self.figure.add_axes(
            (
                left / self.width_in,
                bottom / self.height_in,
                width / self.width_in,
                height / self.height_in,
            )
        )
        made.set_facecolor("none")
        for side in ("top", "right", "left", "bottom"):
            made.spines[side].set_visible(False)
        made.tick_params(colors=FAINT, labelsize=7, length=0)
        return made

    def add(self, panel: Json, answers: list[list[Series]]) -> None:
        """Draw a panel. ``answers``: the series of each of its queries."""
        at = panel["gridPos"]
        gap = 0.05
        left, width = at["x"] * COLUMN_IN + gap, at["w"] * COLUMN_IN - 2 * gap
        top = self.height_in - (at["y"] + 1.6) * ROW_IN - gap
        height = at["h"] * ROW_IN - 2 * gap
        card = self.axes(left, top - height, width, height)
        card.set_axis_off()
        card.add_patch(
            FancyBboxPatch(
                (0, 0), 1, 1, boxstyle="square,pad=0", fc=CARD, ec=GRID, transform=card.transAxes
            )
        )
        self.text(left + 0.1, top - 0.22, panel["title"], size=9)
        named = [
            (legend(target["legendFormat"], series), series)
            for target, answer in zip(panel["targets"], answers, strict=True)
            for series in answer
        ]
        if not named:
            self.text(
                left + width / 2,
                top - height / 2,
                "No data",
                size=9,
                color=FAINT,
                ha="center",
            )
            return
        if panel["type"] == "stat":
            self.number(panel, named[0][1], left, top, width, height)
            return
        names = sorted({name for name, _ in named}) if panel["type"] == "timeseries" else []
        shown = self.legend(panel, names, left + 0.1, top - height + 0.08, width - 0.2)
        margin = 0.62 if panel["type"] != "state-timeline" else 0.75
        axes = self.axes(
            left + margin, top - height + 0.3 + shown, width - margin - 0.15, height - 0.72 - shown
        )
        axes.set_xlim(0, self.duration_s)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t // 60:.0f}:{t % 60:02.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 1.5, 3, 6, 10]))
        axes.grid(visible=True, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        {"timeseries": self.lines, "heatmap": self.heat, "state-timeline": self.states}[
            panel["type"]
        ](panel, named, axes)

    def since(self, series: Series) -> list[float]:
        return [t - self.began_at for t in series.times]

    def colours(self, panel: Json, names: list[str]) -> dict[str, str]:
        fixed = fixed_colours(panel)
        rest = iter(PALETTE * 3)
        return {name: fixed.get(name) or next(rest) for name in names}

    def legend(
        self, panel: Json, names: list[str], left: float, bottom: float, wide: float
    ) -> float:
        """The legend below a graph; its height in inches."""
        rows: list[list[str]] = [[]]
        used = 0.0
        for name in names:
            long = 0.22 + 0.062 * len(name)
            if used + long > wide and rows[-1]:
                rows.append([])
                used = 0.0
            rows[-1].append(name)
            used += long
        colours = self.colours(panel, names)
        rows = rows[:LEGEND_ROWS]
        for number, row in enumerate(reversed(rows)):
            x = left
            for name in row:
                y = bottom + 0.14 * number
                self.text(x, y, "▬", size=7, color=colours[name])
                self.text(x + 0.13, y, name, size=6.8, color=INK)
                x += 0.22 + 0.062 * len(name)
        return 0.14 * len(rows) if names else 0.0

    def lines(self, panel: Json, named: list[tuple[str, Series]], axes: Axes) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        custom = defaults["custom"]
        colours = self.colours(panel, sorted({name for name, _ in named}))
        log = custom.get("scaleDistribution", {}).get("type") == "log"
        if custom.get("stacking", {}).get("mode") == "normal":
            ticks = sorted({t for _, series in named for t in self.since(series)})
            below = [0.0] * len(ticks)
            for name, series in sorted(named, key=lambda pair: pair[0]):
                values = dict(zip(self.since(series), series.values, strict=True))
                level = [b + values.get(t, 0.0) for t, b in zip(ticks, below, strict=True)]
                axes.fill_between(ticks, below, level, color=colours[name], alpha=0.35, linewidth=0)
                axes.plot(ticks, level, color=colours[name], linewidth=0.9)
                below = level
        else:
            for name, series in named:
                axes.plot(self.since(series), series.values, color=colours[name], linewidth=1.1)
        for value, colour in steps_of(panel):
            if value > -1e30 and colour in COLOURS and custom.get("thresholdsStyle"):
                axes.axhline(value, color=COLOURS[colour], linewidth=0.9, linestyle=(0, (4, 3)))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            highest = axes.get_ylim()[1]
            top = defaults.get("max") or (highest if highest > 1e-9 else 1.0)
            quiet = not any(any(series.values) for _, series in named)
            axes.set_ylim(0, 1.0 if quiet and "max" not in defaults else top)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if defaults["unit"] == "bytes":
                axes.yaxis.set_major_locator(MultipleLocator(2 ** round(math.log2(top / 5))))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: amount(v, defaults["unit"])))

    def heat(self, panel: Json, named: list[tuple[str, Series]], axes: Axes) -> None:
        buckets = sorted(named, key=lambda pair: float(pair[0]))
        ticks = sorted({t for _, series in buckets for t in self.since(series)})
        below = [0.0] * len(ticks)
        rows = []
        for _, series in buckets:
            values = dict(zip(self.since(series), series.values, strict=True))
            level = [values.get(t, 0.0) for t in ticks]
            rows.append(
                [max(0.0, v - b) or float("nan") for v, b in zip(level, below, strict=True)]
            )
            below = level
        highest = max((v for row in rows for v in row if v == v), default=1.0)
        ramp = LinearSegmentedColormap.from_list("oranges", ["#3a2410", "#ff9830", "#fff2cc"])
        axes.grid(visible=False)
        axes.pcolormesh(
            ticks,
            range(len(rows)),
            rows,
            cmap=ramp,
            norm=LogNorm(0.1, max(1.0, highest)),
            shading="nearest",
        )
        unit = panel["options"]["yAxis"]["unit"]
        names = [amount(float(le), unit) if le != "+Inf" else "+Inf" for le, _ in buckets]
        every = max(1, len(names) // 8)
        axes.set_yticks(range(0, len(names), every), names[::every])

    def states(self, panel: Json, named: list[tuple[str, Series]], axes: Axes) -> None:
        words = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
        named = sorted(named, key=lambda pair: pair[0], reverse=True)
        for row, (_, series) in enumerate(named):
            for t, value in zip(self.since(series), series.values, strict=True):
                colour = COLOURS[words[str(int(value))]["color"]]
                axes.broken_barh([(t, STEP_S)], (row - 0.35, 0.7), facecolors=colour, alpha=0.8)
        axes.set_yticks(range(len(named)), [name for name, _ in named])
        axes.set_ylim(-0.6, len(named) - 0.4)

    def number(
        self, panel: Json, series: Series, left: float, top: float, width: float, height: float
    ) -> None:
        value = series.values[-1]
        name = next(colour for least, colour in reversed(steps_of(panel)) if value >= least)
        colour = COLOURS[name]
        behind = self.axes(left, top - height, width, 0.45 * height)
        behind.set_axis_off()
        times = self.since(series)
        behind.fill_between(times, series.values, color=colour, alpha=0.18)
        behind.plot(times, series.values, color=colour, linewidth=0.9)
        behind.set_xlim(0, self.duration_s)
        behind.set_ylim(0, max(1e-9, 1.1 * max(series.values)))
        said = amount(value, panel["fieldConfig"]["defaults"]["unit"])
        self.text(left + width / 2, top - 0.72, said, size=19, color=colour, ha="center")


async def draw(name: str, board: Json, prometheus: Prometheus, began: float, ended: float) -> Path:
    """Ask what the board asks, and draw the answers."""
    picture = Picture(board, began, ended)
    for panel in panels(board):
        answers = [
            await prometheus.over(filled_in(t["expr"], WINDOW_S), began, ended, STEP_S)
            for t in panel["targets"]
        ]
        picture.add(panel, answers)
    path = IMAGES / f"dashboard-{name}.png"
    drawn = io.BytesIO()
    picture.figure.savefig(drawn, dpi=100, facecolor=PAGE)
    plt.close(picture.figure)
    flat = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    flat.save(path, optimize=True)
    return path


async def draw_all(fleet: Live, seconds: float) -> None:
    async with fleet.at_work():
        await asyncio.sleep(0.4 * seconds)
        await fleet.interrupt_events()
        await asyncio.sleep(0.3 * seconds)
        await fleet.lose_a_pod()
        await asyncio.sleep(0.3 * seconds)
    IMAGES.mkdir(exist_ok=True)
    ended = time.time()
    for name, board in boards().items():
        print(await draw(name, board, fleet.prometheus, fleet.began_at, ended))


def main(
    seconds: Annotated[float, typer.Option(help="How long the fleet works.", min=20)] = 240,
) -> None:
    """Pictures of the boards, from a small fleet at work."""
    mpl.use("agg")

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with live(Path(folder)) as fleet:
                await draw_all(fleet, seconds)

    asyncio.run(run())


if __name__ == "__main__":
    typer.run(main)
