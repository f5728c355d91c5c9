"""*Sessions and tools*: what agents do, and how well it is foreseen."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.fleet import LOSSES
from dashboards.panels import GATEWAY, board, graph, heat, percentile, rate

IDLE = {"tool": "green", "human": "blue", "background": "purple", "ended": "orange"}
BELOW = "cachewise_forecast_gaps_below_total"
GAPS = "cachewise_forecast_gaps_total"
CALIBRATION_WINDOW = "30m"
"""Calibration needs a few hundred gaps to be more than noise."""


def below(quantile: str, by: str = "") -> str:
    """Share of gaps no longer than the forecast's quantile for them."""
    window = CALIBRATION_WINDOW
    part = rate(BELOW, f'{GATEWAY}, quantile="{quantile}"', by, window)
    return f"{part} / {rate(GAPS, GATEWAY, by, window)}"


def make() -> Dashboard:
    return board(
        "cachewise-sessions",
        "CacheWise / Sessions and tools",
        "Who calls, what sessions wait for and how long, whether that was foreseen, and what agents"
        " do to their own prefix.",
        {"Sessions": SESSIONS, "Gaps": GAPS_ROW, "Forecast": FORECAST, "Prefix": PREFIX},
    )


SESSIONS = [
    graph(
        "Sessions by state",
        "Sessions that the gateways remember.",
        "`running` and `idle` follow the working day; `ended` are kept until they lapse.",
        "short",
        (f"sum by (state) (cachewise_sessions{{{GATEWAY}}})", "{{state}}"),
        stacked=True,
        colours={"running": "green", "idle": "blue", "ended": "orange"},
    ),
    graph(
        "Turns by client",
        "Turns a second by client program, told from its `User-Agent`.",
        "the programs that you know of.",
        "reqps",
        (rate("cachewise_turns_total", GATEWAY, "client"), "{{client}}"),
        stacked=True,
    ),
    graph(
        "How sessions were recognised",
        "Turns a second by what named their session. `new` began one.",
        "mostly headers and body fields. Many `prefix` or `tool_call_id`: clients that do not name"
        " their session; many `new`: sessions that are not found again.",
        "reqps",
        (rate("cachewise_identified_turns_total", GATEWAY, "by"), "{{by}}"),
        stacked=True,
        colours={"new": "orange", "prefix": "yellow", "tool_call_id": "purple"},
    ),
    graph(
        "Sessions forgotten early",
        "Sessions a second forgotten because `sessions.max_sessions` was reached.",
        "0. Above: raise the limit, a session takes about 10 kB.",
        "short",
        (rate("cachewise_sessions_evicted_total", GATEWAY), "forgotten"),
        colours={"forgotten": "red"},
    ),
    graph(
        "Tool calls by client",
        "Tool calls a second that answers asked for.",
        "follows the turns: about one a turn for coding agents.",
        "reqps",
        (rate("cachewise_tool_calls_total", GATEWAY, "client"), "{{client}}"),
        stacked=True,
    ),
    graph(
        "Turns by dialect",
        "Turns a second by the API that the client speaks.",
        "as your clients are set up.",
        "reqps",
        (rate("cachewise_turns_total", GATEWAY, "wire"), "{{wire}}"),
        stacked=True,
    ),
]

GAPS_ROW = [
    graph(
        "What sessions waited for",
        "Gaps that ended, a second, by what the session had been waiting for.",
        "mostly `tool`: that is when keeping KV pays most.",
        "reqps",
        (rate("cachewise_gap_seconds_count", GATEWAY, "idle_kind"), "{{idle_kind}}"),
        stacked=True,
        colours=IDLE,
    ),
    graph(
        "Gap by what was waited for, p50",
        "Time from the end of an answer to the session's next turn.",
        "a second or so for `tool`, minutes for `human`.",
        "s",
        (percentile(0.5, "cachewise_gap_seconds", GATEWAY, "idle_kind"), "{{idle_kind}}"),
        log=True,
        colours=IDLE,
    ),
    heat(
        "Tool gaps",
        "How many gaps fell into each range of seconds.",
        "dark at the bottom. A second band far up: tools that take minutes, or prompts for"
        " permission.",
        "s",
        "cachewise_gap_seconds",
        f'{GATEWAY}, idle_kind="tool"',
    ),
    graph(
        "Gaps by tool",
        "Gaps that ended, a second, by the kind of tool that was waited for (of parallel calls the"
        " slowest).",
        "no rule; `other` is for tools that the gateway does not know by name.",
        "reqps",
        (rate("cachewise_tool_gap_seconds_count", GATEWAY, "tool_kind"), "{{tool_kind}}"),
        stacked=True,
    ),
    graph(
        "Gap by tool, p50",
        "The median gap of each kind of tool.",
        "`read`, `edit` and `search` well below `shell`, `subagent` and `web`.",
        "s",
        (percentile(0.5, "cachewise_tool_gap_seconds", GATEWAY, "tool_kind"), "{{tool_kind}}"),
        log=True,
    ),
    graph(
        "Gap by tool, p90",
        "The long gaps of each kind of tool: those that a cache under pressure does not survive.",
        "steady. A kind that grows is a tool that has become slow.",
        "s",
        (percentile(0.9, "cachewise_tool_gap_seconds", GATEWAY, "tool_kind"), "{{tool_kind}}"),
        log=True,
    ),
]

FORECAST = [
    graph(
        "Calibration",
        f"Share of gaps of the last {CALIBRATION_WINDOW} that were no longer than each quantile"
        " forecast for them.",
        "every line at the number that names it.",
        "percentunit",
        (
            f"{rate(BELOW, GATEWAY, 'quantile', CALIBRATION_WINDOW)}"
            f" / on () group_left () {rate(GAPS, GATEWAY, '', CALIBRATION_WINDOW)}",
            "{{quantile}}",
        ),
        top=1,
    ),
    graph(
        "Calibration of the median by tool",
        f"Share of gaps of the last {CALIBRATION_WINDOW} below the median forecast for them.",
        "near 50 %. Above: tools come back sooner than forecast, below: later.",
        "percentunit",
        (below("0.5", "tool_kind"), "{{tool_kind}}"),
        top=1,
    ),
    graph(
        "Inside the forecast's 80 % interval",
        f"Share of gaps of the last {CALIBRATION_WINDOW} between the 10 % and the 90 % quantile.",
        "near 80 %. Below: forecasts are too sure of themselves, above: too vague.",
        "percentunit",
        (f"({below('0.9')}) - ({below('0.1')})", "inside"),
        top=1,
    ),
    graph(
        "Forecasts judged",
        "Gaps that ended and had been forecast, a second, by kind of tool.",
        "as many as there are gaps; few means few sessions are recognised.",
        "reqps",
        (rate(GAPS, GATEWAY, "tool_kind"), "{{tool_kind}}"),
        stacked=True,
    ),
    graph(
        "Size of the forecast",
        "Places in the hierarchy of tools, programs, tenants and sessions.",
        "grows, then levels off below `forecast.max_nodes`.",
        "short",
        (f"sum by (instance) (cachewise_forecast_nodes{{{GATEWAY}}})", "{{instance}}"),
    ),
    graph(
        "Forecast saves",
        "Saves of what was learned, an hour.",
        "one every `forecast.save_interval_s` while there is traffic, none `failed`.",
        "short",
        (f"3600 * {rate('cachewise_forecast_saves_total', GATEWAY, 'result')}", "{{result}}"),
        colours={"ok": "green", "failed": "red"},
    ),
]

PREFIX = [
    graph(
        "Tokens lost by cause",
        "Prompt tokens that were not cached, a second, by why.",
        "only `first_turn` and some `prefix_break`.",
        "short",
        (rate("cachewise_lost_tokens_total", GATEWAY, "loss"), "{{loss}}"),
        stacked=True,
        colours=LOSSES,
    ),
    graph(
        "Prefix breaks by cause",
        "Turns a second whose prompt did not extend the one before.",
        "below 2 % of turns. `system` or `tools` on many turns: a client that writes something"
        " volatile, such as the time, into its prompt's head.",
        "reqps",
        (rate("cachewise_prefix_breaks_total", GATEWAY, "cause"), "{{cause}}"),
        stacked=True,
    ),
    graph(
        "Tokens that breaks made useless",
        "Tokens of earlier prompts, a second, that a break threw away.",
        "compactions only: they shorten the prompt as well.",
        "short",
        (rate("cachewise_prefix_lost_tokens_total", GATEWAY, "cause"), "{{cause}}"),
        stacked=True,
    ),
]
