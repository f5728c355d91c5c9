"""The replay, in short: admission beats stock on the same sessions through vLLM's scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.replay.sample import SAMPLE

pytestmark = pytest.mark.engine
pytest.importorskip("vllm")

ROOT = Path(__file__).resolve().parents[2]
MANY, FEW = 9, 2
Rows = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each policy with many and with few sessions on a small cache."""
    out = tmp_path_factory.mktemp("replay") / "out"
    command = [sys.executable, "-m", "bench.replay", str(SAMPLE), "--kv-tokens", "200000"]
    command += ["--sessions", str(MANY), "--sessions", str(FEW)]
    for policy in ("stock", "unpatched", "oracle"):
        command += ["--policy", policy]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2_000:]
    assert out.with_suffix(".png").exists()
    assert not done.stderr.strip(), "nothing but the progress bar, which leaves nothing"
    made: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    assert " ".join(done.stdout.split()).endswith(made["answer"])
    return made


@pytest.fixture(scope="module")
def rows(results: dict[str, Any]) -> Rows:
    return {(row["policy"], row["per_pod"]): row for row in results["rows"]}


def test_the_answer_is_a_sentence_for_each_load(results: dict[str, Any]) -> None:
    few, many = f"At {FEW} concurrent sessions", f"At {MANY} concurrent sessions: "
    assert results["answer"].startswith(few)
    assert "nothing changes" in results["answer"].partition(many)[0]
    assert "less prefill and sessions" in results["answer"].partition(many)[2]


@pytest.mark.parametrize("policy", ["unpatched", "oracle"])
def test_admission_beats_stock(rows: Rows, policy: str) -> None:
    stock, ours = rows["stock", MANY], rows[policy, MANY]
    assert ours["turns"] == stock["turns"]
    assert ours["holds"] > 0
    assert ours["session_s"] < 0.7 * stock["session_s"]
    assert ours["evicted_blocks"] < 0.6 * stock["evicted_blocks"]


@pytest.mark.parametrize("policy", ["unpatched", "oracle"])
def test_with_room_for_all_nothing_is_held_and_nothing_changes(rows: Rows, policy: str) -> None:
    stock, ours = rows["stock", FEW], rows[policy, FEW]
    assert ours["holds"] == 0
    assert ours["session_s"] == pytest.approx(stock["session_s"], rel=0.03)
