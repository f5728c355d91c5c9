"""The few kinds of panel that the boards are made of, and the PromQL that they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Panel: TypeAlias = Builder[models.Panel]
Query: TypeAlias = tuple[str, str]
"""PromQL, and what the legend calls its series."""
Steps: TypeAlias = Sequence[tuple[float | None, str]]
"""Colours, each from a value up; the first from None."""

DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
GATEWAY: Final = 'job=~"$job"'
"""Of the chosen gateways."""
POD: Final = 'job=~"$job", pod=~"$pod"'
"""What the chosen gateways say of the chosen pods."""
ENGINE: Final = 'pod=~"$pod"'
"""What the chosen pods say of themselves."""
WINDOW: Final = "$__rate_interval"

GOOD_IS_HIGH: Final[Steps] = ((None, "red"), (0.5, "orange"), (0.8, "green"))
GOOD_IS_NONE: Final[Steps] = ((None, "green"), (0.01, "orange"), (0.05, "red"))


def rate(metric: str, where: str, by: str = "", window: str = WINDOW) -> str:
    """Increase a second, summed up by the labels."""
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({metric}{{{where}}}[{window}]))"


def percentile(p: float, histogram: str, where: str, by: str = "") -> str:
    """The p-quantile of a histogram, by the labels."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({p}, {rate(f'{histogram}_bucket', where, labels)})"


def mean(histogram: str, where: str, by: str) -> str:
    """The mean of what a histogram counts, by the labels."""
    total, count = (rate(f"{histogram}_{part}", where, by) for part in ("sum", "count"))
    return f"{total} / {count}"


def percentiles(histogram: str, where: str, *ps: float) -> list[Query]:
    return [(percentile(p, histogram, where), f"p{100 * p:g}") for p in ps]


def graph(
    title: str,
    shows: str,
    good: str,
    unit: str,
    *queries: Query,
    stacked: bool = False,
    log: bool = False,
    top: float | None = None,
    limit: float | None = None,
    colours: Mapping[str, str] | None = None,
    span: int = 8,
) -> Panel:
    """Series over time. ``limit`` draws a line that a good series does not cross."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(_described(shows, good))
        .datasource(DATASOURCE)
        .unit(unit)
        .span(span)
        .height(8)
        .line_width(1)
        .fill_opacity(25 if stacked else 0)
        .show_points(common.VisibilityMode.NEVER)
        .tooltip(
            common_builders.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
        .targets(_targets(queries))
    )
    if stacked:
        panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if not log:
        panel.min(0)
    else:
        panel.scale_distribution(
            common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10)
        )
    if top is not None:
        panel.max(top)
    if limit is not None:
        panel.thresholds(_thresholds(((None, "transparent"), (limit, "red"))))
        panel.thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(
                common.GraphThresholdsStyleMode.DASHED
            )
        )
    for name, colour in (colours or {}).items():
        fixed = {"mode": "fixed", "fixedColor": colour}
        panel.override_by_name(name, [models.DynamicConfigValue(id_val="color", value=fixed)])
    return panel


def number(
    title: str, shows: str, good: str, unit: str, query: str, steps: Steps, decimals: int = 1
) -> Panel:
    """The latest value, large, with its course behind it."""
    return (
        stat.Panel()
        .title(title)
        .description(_described(shows, good))
        .datasource(DATASOURCE)
        .unit(unit)
        .decimals(decimals)
        .span(4)
        .height(4)
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(steps))
        .targets(_targets([(query, "")]))
    )


def heat(title: str, shows: str, good: str, unit: str, histogram: str, where: str) -> Panel:
    """A histogram over time: how many events fell into each bucket."""
    buckets = f"sum by (le) (increase({histogram}_bucket{{{where}}}[{WINDOW}]))"
    target = _target(buckets, "{{le}}").format(PromQueryFormat.HEATMAP).ref_id("A")
    return (
        heatmap.Panel()
        .title(title)
        .description(_described(shows, good))
        .datasource(DATASOURCE)
        .span(8)
        .height(8)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges"))
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .unit("short")
        .targets([target])
    )


def states(title: str, shows: str, good: str, query: Query, names: Mapping[int, Query]) -> Panel:
    """One line a series, coloured by its state. ``names``: value → its name and colour."""
    mapping = models.ValueMap(
        options={
            str(value): models.ValueMappingResult(text=name, color=colour, index=index)
            for index, (value, (name, colour)) in enumerate(names.items())
        }
    )
    return (
        statetimeline.Panel()
        .title(title)
        .description(_described(shows, good))
        .datasource(DATASOURCE)
        .unit("short")
        .span(8)
        .height(8)
        .mappings([mapping])
        .show_value(common.VisibilityMode.NEVER)
        .fill_opacity(75)
        .targets(_targets([query]))
    )


def board(
    uid: str, title: str, about: str, rows: Mapping[str, Sequence[Panel]]
) -> models.Dashboard:
    """A dashboard of rows of panels. The row named `""` has no header."""
    made = (
        builders.Dashboard(title)
        .uid(uid)
        .description(about)
        .tags(["cachewise"])
        .timezone("browser")
        .time("now-3h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            builders.DashboardLink("CacheWise")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["cachewise"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(
            builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(_choice("job", "Gateway", "label_values(cachewise_held_turns, job)"))
        .with_variable(
            _choice("pod", "vLLM pod", f"label_values(cachewise_pod_ready{{{GATEWAY}}}, pod)")
        )
    )
    for header, panels in rows.items():
        if header:
            made.with_row(builders.Row(header))
        for panel in panels:
            made.with_panel(panel)
    built = made.build()
    for number_, panel_or_row in enumerate(built.panels or (), start=1):
        panel_or_row.id_val = number_
    return built


def _choice(name: str, label: str, query: str) -> builders.QueryVariable:
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _described(shows: str, good: str) -> str:
    return f"{shows}\n\n**Good:** {good}"


def _target(expr: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend).range()


def _targets(queries: Sequence[Query]) -> list[Builder[Dataquery]]:
    return [
        _target(expr, legend).ref_id(chr(ord("A") + index))
        for index, (expr, legend) in enumerate(queries)
    ]


def _thresholds(steps: Steps) -> builders.ThresholdsConfig:
    return (
        builders.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=colour) for value, colour in steps])
    )
