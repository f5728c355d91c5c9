"""What a scraper finds before anything has happened."""

import re
from pathlib import Path

from prometheus_client import generate_latest

from gateway import metrics
from gateway.metrics import Metrics

GATEWAY = Path(metrics.__file__).parent


def samples() -> dict[str, float]:
    lines = generate_latest(Metrics().registry).decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def test_counters_of_fixed_words_are_there_before_their_first_event() -> None:
    found = samples()
    for name in (
        'cachewise_degraded_total{stage="tick"}',
        'cachewise_retries_total{reason="disconnected"}',
        'cachewise_forecast_saves_total{result="failed"}',
        'cachewise_lost_tokens_total{loss="evicted"}',
        'cachewise_prefix_lost_tokens_total{cause="compaction"}',
        'cachewise_hold_seconds_count{hold_end="too_long"}',
        'cachewise_hints_total{hint_result="dropped"}',
    ):
        assert found[name] == 0.0, name


def test_every_stage_at_which_a_fault_is_survived_is_among_them() -> None:
    used: set[str] = set()
    for file in GATEWAY.rglob("*.py"):
        text = file.read_text()
        used |= set(re.findall(r'(?:degraded\.labels|_degraded|_survived)\("(\w+)"\)', text))
    assert used == set(metrics.STAGES)
