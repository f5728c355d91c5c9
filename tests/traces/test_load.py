"""Files that cannot be read, beside those that can."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gateway.analysis.figures import figures
from gateway.analysis.report import markdown
from gateway.traces.load import load
from tests.traces.sessions import TURN, jsonl


def torn(packed: bytes) -> bytes:
    return packed[: len(packed) // 2]


@pytest.mark.parametrize(
    ("suffix", "content", "what"),
    [
        (".zst", b"garbage garbage", "damaged"),
        (".gz", b"garbage garbage", "damaged"),
        (".gz", gzip.compress(jsonl(TURN))[:10] + b"\xff" * 20, "damaged"),
        (".zst", torn(zstandard.compress(jsonl(TURN))), "torn"),
        (".gz", torn(gzip.compress(jsonl(TURN))), "torn"),
    ],
    ids=["no zstd", "no gzip", "no deflate", "torn zstd", "torn gzip"],
)
def test_a_file_that_is_torn_or_damaged_is_counted_and_named_beside_a_good_one(
    tmp_path: Path, suffix: str, content: bytes, what: str
) -> None:
    bad = tmp_path / f"bad.jsonl{suffix}"
    bad.write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(jsonl(TURN))
    trace = load([tmp_path])
    assert [session.id for session in trace.sessions] == ["s"]
    assert trace.problems.count == 1
    assert trace.problems.named == [f"{bad}:1: the file is {what}"]


def test_a_file_that_is_damaged_behind_good_lines_gives_these(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    no_deflate = gzip.compress(b"")[:10] + b"\xff" * 20
    path.write_bytes(gzip.compress(jsonl(*[TURN] * 20_000)) + no_deflate)
    trace = load([path])
    assert len(trace.sessions[0].turns) > 10_000
    assert trace.problems.named[-1].endswith(": the file is damaged")


def test_other_json_files_are_no_problems(tmp_path: Path) -> None:
    other = {"name": "x", "list": [1, 2, {"a": None}]}
    (tmp_path / "object.json").write_text(json.dumps(other, indent=2))
    (tmp_path / "list.json").write_text(json.dumps([other, 1], indent=2))
    (tmp_path / "rows.jsonl").write_bytes(jsonl([1, 2], [3, 4], "text"))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(jsonl(other, other)))
    trace = load([tmp_path])
    assert len(trace.unknown) == 4
    assert trace.problems.count == 0


def test_a_rollout_that_does_not_name_its_thread_is_a_problem(tmp_path: Path) -> None:
    def entry(kind: str, **payload: Any) -> dict[str, Any]:
        return {"timestamp": "2026-01-01T00:00:00Z", "type": kind, "payload": payload}

    said = entry("response_item", type="message", role="assistant", content=[])
    usage = entry("token_usage_record", usage={"input_tokens": 10, "output_tokens": 1})
    path = tmp_path / "rollout-1.jsonl"
    path.write_bytes(jsonl(said, usage))
    trace = load([path])
    assert (trace.sessions, trace.formats) == ([], {"codex": 1})
    assert trace.problems.named == [f"{path}:1: 'session_meta' is missing"]
    path.write_bytes(jsonl(entry("session_meta", id="t"), said, usage))
    assert [session.id for session in load([path]).sessions] == ["t"]


def test_a_copy_of_a_file_is_left_out_and_counted(tmp_path: Path) -> None:
    records = jsonl(TURN, TURN | {"ctx": 1280})
    (tmp_path / "a.jsonl").write_bytes(records)
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / "copy.jsonl").write_bytes(records)
    (tmp_path / "other.jsonl").write_bytes(jsonl(TURN | {"session": "t"}, TURN | {"ctx": 1290}))
    trace = load([tmp_path])
    assert {s.id: [t.prompt_tokens for t in s.turns] for s in trace.sessions} == {
        "s": [640, 1280, 1290],
        "t": [640],
    }
    assert trace.copies == 1
    assert "1 files were copies of others" in markdown(figures(trace))
