"""The boards: in sync with their code, whole, and with data in every panel of a fleet at work."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dashboards import __main__ as written
from dashboards.live import PODS, REPLICAS, live
from dashboards.queries import boards, filled_in, panels
from engine_patch import metrics as patch_metrics
from gateway.embedded.scheduler import EngineConfig, Scheduler
from gateway.metrics import Metrics
from tests.programs import program
from tests.test_rules import GROUPS

VLLM_METRICS = Path(__file__).parent / "data" / "vllm-0.32-metrics.txt"
"""What a real vLLM 0.32 said at /metrics."""

Json = dict[str, Any]
BOARDS = boards()
PANELS = [
    pytest.param(name, panel, id=f"{name}: {panel['title']}")
    for name, board in BOARDS.items()
    for panel in panels(board)
]


def queries() -> Iterator[tuple[str, str]]:
    """Where each query of a panel stands, and the query."""
    for name, board in BOARDS.items():
        for panel in panels(board):
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]


def metrics_in(expr: str) -> set[str]:
    return set(re.findall(r"\b(?:cachewise|vllm|process|python)[_:][a-zA-Z_:]+", expr))


def test_the_boards_are_in_sync_with_their_code() -> None:
    for path, text in written.texts().items():
        assert path.read_text() == text, f"{path.name}: run `python -m dashboards`"
    assert {path.stem for path in written.FOLDER.iterdir()} == set(written.BOARDS)


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_has_its_variables_and_no_two_panels_in_one_place(name: str) -> None:
    board = BOARDS[name]
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "job", "pod"]
    assert board["uid"].startswith("cachewise-")
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_a_panel_says_what_it_shows_and_what_is_good(board: str, panel: Json) -> None:
    shows, _, good = panel["description"].partition("\n\n**Good:** ")
    assert len(shows) > 10
    assert len(good) > 1
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        assert "$job" in target["expr"] or "$pod" in target["expr"]


def test_every_metric_of_the_gateway_and_of_the_patch_is_on_a_board() -> None:
    shown = {
        re.sub(r"_(total|bucket|count|sum)$", "", name)
        for _, expr in queries()
        for name in metrics_in(expr)
    }
    registry = Metrics().registry
    wanted = {m.name for m in registry.collect() if m.name.startswith("cachewise_")}
    scheduler = Scheduler(EngineConfig())
    page = patch_metrics.render([scheduler.reuse.call("metrics", "")]).decode()
    wanted |= set(re.findall(r"(?m)^# TYPE (cachewise:\w+?)(?:_total)? ", page))
    assert len(wanted) > 50
    assert wanted - shown == set()


def test_what_boards_and_rules_ask_of_vllm_is_what_vllm_has() -> None:
    page = VLLM_METRICS.read_text()
    exprs = [expr for _, expr in queries()]
    exprs += [rule["expr"] for group in GROUPS for rule in group["rules"]]
    asked = {name for expr in exprs for name in metrics_in(expr) if name.startswith("vllm:")}
    assert len(asked) > 5
    for name in asked:
        assert re.search(rf"(?m)^{name}\{{", page), f"vLLM 0.32 has no {name}"
    labels = {"finished_reason": "vllm:request_success_total"}
    for label, name in labels.items():
        assert re.search(rf"(?m)^{name}\{{[^}}]*{label}=", page)


def parts_of(expr: str) -> list[str]:
    """What an alert compares, each as a query that has an answer whether it fires or not."""
    expr = re.sub(r"\babsent\((\w+)\)", r"\1", expr)
    parts = re.split(r"\s(?:and|unless) on \([^)]*\)\s", expr)
    return [re.sub(r"\s(>|<|==)\s", r" \1 bool ", part) for part in parts]


HAPPENED = (
    *(
        f'cachewise_turns_total{{outcome="{outcome}"}}'
        for outcome in ("ok", "pod_error", "gateway_error", "broken_off", "client_gone")
    ),
    'cachewise_hold_seconds_count{hold_end="released"}',
    'cachewise_lost_tokens_total{loss="evicted"}',
    "cachewise_prefix_breaks_total",
    'cachewise_forecast_saves_total{result="ok"}',
    'cachewise_gap_seconds_count{idle_kind="human"}',
    'cachewise:evicted_blocks_total{cause="forecast"}',
    'cachewise:hints_total{result="applied"}',
    'cachewise_store_reads_total{read_result="hit"}',
    'cachewise_pod_kv_events_troubles_total{trouble="replayed"}',
    *(f'cachewise_shared_gaps_total{{direction="{way}"}}' for way in ("told", "taken")),
)
"""What makes the panels worth looking at."""
OF_PODS = ("cachewise_pod_ready", "cachewise_pod_kv_events_live")
"""1 for each pod that lives, at each replica."""


@pytest.mark.timeout(180)
async def test_with_a_fleet_at_work_every_panel_and_every_rule_has_data(tmp_path: Path) -> None:
    program("prometheus", "prometheus")
    program("redis-server", "redis-server")
    async with live(tmp_path) as fleet:
        prometheus = fleet.prometheus

        async def now(expr: str) -> float:
            at = time.time()
            found = await prometheus.over(f"sum({expr})", at, at, step_s=1)
            return found[0].values[-1] if found else 0.0

        async def empty() -> list[tuple[str, str]]:
            end = time.time()
            return [
                (where, expr)
                for where, expr in queries()
                if not await prometheus.over(filled_in(expr, 10), fleet.began_at, end, step_s=1)
            ]

        async with fleet.at_work(agents=32), asyncio.timeout(120):
            await asyncio.sleep(6)
            await fleet.interrupt_events()
            await asyncio.sleep(2)
            await fleet.lose_a_pod()
            left = list(HAPPENED)
            while left or {await now(expr) for expr in OF_PODS} != {(PODS - 1) * REPLICAS}:
                await asyncio.sleep(1)
                left = [expr for expr in left if not await now(expr)]
            scrapes = 0
            while await empty() and scrapes < 15:  # a rate needs two
                await asyncio.sleep(1)
                scrapes += 1
        await asyncio.sleep(1.5)  # the last scrape, and the rules over it
        end = time.time()
        assert await empty() == []

        rules = await prometheus.rules()
        assert len(rules) == sum(len(group["rules"]) for group in GROUPS)
        for rule in rules:
            assert rule["health"] == "ok", rule
            name = rule["name"]
            asked = parts_of(rule["query"]) if rule["type"] == "alerting" else [name]
            for part in asked:
                assert await prometheus.over(part, fleet.began_at, end, step_s=1), (name, part)

        existing = await prometheus.names()
        named = {n for _, expr in queries() for n in metrics_in(expr)}
        assert named - existing == set()
        assert 0.3 < await now("job:cachewise_cached_prompt_tokens:ratio_rate5m") < 1
