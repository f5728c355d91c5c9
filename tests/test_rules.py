"""The recording and alert rules: sound, tested one by one, and explained."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.programs import program

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "k8s" / "chart" / "rules" / "cachewise.yaml"
CASES = ROOT / "tests" / "rules.yaml"
OPERATIONS = ROOT / "docs" / "operations.md"

GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {r["alert"]: r for group in GROUPS for r in group["rules"] if "alert" in r}
RECORDED = {r["record"] for group in GROUPS for r in group["rules"] if "record" in r}


def promtool(*arguments: str | Path) -> str:
    command = [program("promtool", "prometheus"), *map(str, arguments)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_rules_are_sound() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", CASES)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    seen: dict[str, set[bool]] = {}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for one in case["alert_rule_test"]:
            seen.setdefault(one["alertname"], set()).add(bool(one["exp_alerts"]))
    assert seen == {name: {True, False} for name in ALERTS}


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_it_is_and_where_it_is_explained(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert {"summary", "description", "runbook_url"} == set(rule["annotations"])
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
    section = re.search(rf"(?m)^### {name}\n\n(?P<text>.+?)(?=^#|\Z)", OPERATIONS.read_text(), re.S)
    assert section is not None, f"docs/operations.md has no section '### {name}'"
    assert len(section["text"].split()) > 15


def test_no_alert_is_explained_that_is_not_there() -> None:
    assert set(re.findall(r"(?m)^### (Cachewise\w+)$", OPERATIONS.read_text())) == set(ALERTS)


def test_alerts_rest_on_what_is_recorded() -> None:
    used = {name for r in ALERTS.values() for name in re.findall(r"job[a-z_]*:[\w:]+", r["expr"])}
    assert used <= RECORDED
