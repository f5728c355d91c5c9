"""The forecast's benchmark and training, on a few made-up sessions."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gateway.predictor import Context, store
from gateway.predictor.train import load

TOOLS = [
    ("Bash", "[timeout=60000] go test ./...", 8.0),
    ("Bash", "cd x && git status --short", 0.3),
    ("Read", "./a/b.go offset=3 limit=5", 0.02),
    ("Edit", "./a/b.go old=30 new=50", 0.05),
    ("AskUserQuestion", "n=1", 60.0),
]


def made_up(folder: Path, sessions: int) -> Path:
    rng = np.random.default_rng(3)
    with gzip.open(folder / "tool-calls-made.jsonl.gz", "wt") as calls:
        for number in range(sessions):
            slow = 10 ** rng.normal(0, 0.4)
            for turn in range(24):
                pick = [TOOLS[i] for i in rng.integers(0, len(TOOLS), 1 + turn % 5 // 4)]
                for place, (tool, args, seconds) in enumerate(pick):
                    record = {
                        "source": f"made/{number % 3}",
                        "session": f"s{number}",
                        "index": 2 * turn + place,
                        "turn": turn,
                        "t": 10.0 * turn,
                        "tool": tool,
                        "args": args,
                        "duration_s": seconds * slow * 10 ** rng.normal(0, 0.1),
                        "is_error": False,
                        "agent": "claude",
                        "ctx": 20_000,
                    }
                    print(json.dumps(record), file=calls)
    with gzip.open(folder / "tool-turns-made.jsonl.gz", "wt") as turns:
        for number in range(sessions):
            gap = {"source": f"made/{number % 3}", "session": f"s{number}"}
            print(json.dumps(gap | {"gap_kind": "user", "gap_s": 100.0 + number}), file=turns)
    return folder


def test_the_shipped_priors_are_scored_beside_the_baselines(tmp_path: Path) -> None:
    data = made_up(tmp_path, 40)
    subprocess.run(
        [sys.executable, "-m", "bench.forecast", "--shipped", "--data", data, "--out", tmp_path],
        check=True,
        capture_output=True,
    )
    seen = json.loads((tmp_path / "forecast.json").read_bytes())
    ours, ewma = (
        seen["methods"][name]
        for name in ("ours", "per session and tool log-EWMA over a tool prior")
    )
    assert ours["ranking_fresh"] > ewma["ranking_fresh"] > 0.5
    assert ours["median_error"] < 0.3
    assert ours["predict_us"] > 0
    assert seen["calls"] == sum(len(turn.calls) for session in load(data) for turn in session.turns)
    assert (tmp_path / "forecast.png").read_bytes().startswith(b"\x89PNG")


def test_priors_are_trained_from_records(tmp_path: Path) -> None:
    pytest.importorskip("catboost", reason="the extra 'train' is not installed")
    data, out = made_up(tmp_path, 24), tmp_path / "priors.npz"
    command = [sys.executable, "-m", "gateway.cli", "forecast", "train"]
    subprocess.run(
        [*command, "--data", data, "--out", out, "--trees", "12"], check=True, capture_output=True
    )
    predictor = store.read(out)
    assert predictor.correction is not None
    call = load(data)[0].turns[0].calls[0]
    assert predictor.forecast([call], "tool", Context("s")).median_s > 0
    assert not any(key[0] == "tenant" for key, _ in predictor.table if isinstance(key, tuple))
