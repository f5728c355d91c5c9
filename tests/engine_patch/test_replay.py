"""The replay, in short: admission beats stock on the same sessions through vLLM's scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.replay import traces
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
    options = ["--kv-tokens", "200000", "--sessions", str(MANY), "--sessions", str(FEW)]
    return replayed(SAMPLE, ("stock", "unpatched", "oracle"), out, *options)


def replayed(trace: Path, policies: tuple[str, ...], out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "gateway.cli", "replay", str(trace), "--out", str(out)]
    for policy in policies:
        command += ["--policy", policy]
    done = subprocess.run(
        [*command, *options],
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


def test_made_sessions_are_replayed_on_the_pod_asked_for(tmp_path: Path) -> None:
    """What is common to sessions is computed once."""
    line = [sys.executable, "-m", "gateway.cli", "trace", "synthesize", "--like", str(SAMPLE)]
    trace = tmp_path / "made.jsonl"
    line += ["--to", "mooncake", "--sessions", "12", "--concurrent", "12", "--out", str(trace)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True, timeout=60)
    head = list(range(10**9, 10**9 + 200))
    requests = [json.loads(request) for request in trace.read_text().splitlines()]
    for request in requests:
        request["hash_ids"] = head + request["hash_ids"]
        request["input_length"] = 64 * len(request["hash_ids"])
    trace.write_text("".join(json.dumps(request) + "\n" for request in requests))
    pod = ("--model", "devstral", "--gpu", "h100", "--gpus", "1", "--sessions", "3")
    made = replayed(trace, ("stock", "cachewise"), tmp_path / "out", *pod)
    assert made["fleet"]["pod"] == "Devstral-Small-24B on 1xH100-80GB"
    chosen = traces.sample(traces.load([trace]), 3, 1)
    first_tokens = sum(traces.BLOCK_TOKENS * len(session[0].blocks) for session in chosen)
    for row in made["rows"]:
        found = first_tokens - row["lost_tokens"]["first_turn"]
        assert found == 2 * traces.BLOCK_TOKENS * len(head)


def test_too_few_sessions_are_refused_with_what_makes_more() -> None:
    line = [sys.executable, "-m", "gateway.cli", "replay", str(SAMPLE), "--sessions", "99"]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert f"`cachewise trace synthesize --like {SAMPLE} --sessions 396" in done.stderr
