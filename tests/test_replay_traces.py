"""Reading traces, and what is measured of a replay."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest

from bench.replay import report, traces
from bench.replay.forecasts import by_class, oracle
from bench.replay.sample import SAMPLE


def test_the_sample_is_read() -> None:
    sessions = traces.load([SAMPLE])
    assert len(sessions) >= 24
    for session in sessions:
        for before, after in pairwise(session):
            assert after.blocks[: len(before.blocks)] == before.blocks
            assert 0 <= after.gap_s <= traces.MAX_GAP_S


def turn(ctx: int, out: int = 100, gap_s: float | None = 1.0, **more: object) -> str:
    record = {"session": "s", "ctx": ctx, "out": out, "gap_s": gap_s, "gap_kind": "tool"}
    return json.dumps(record | more)


def test_turns_become_a_growing_prefix_cut_where_the_prompt_shrank(tmp_path: Path) -> None:
    lines = [turn(6_400 + 640 * i) for i in range(10)]
    lines += [turn(3_200, cache_read=640, gap_kind="user", gap_s=None)]
    path = tmp_path / "trace.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines))
    (session,) = traces.load([path])
    assert [len(t.blocks) for t in session] == [100 + 10 * i for i in range(10)] + [50]
    assert session[10].blocks[:10] == session[9].blocks[:10]
    assert not set(session[10].blocks[10:]) & set(session[9].blocks)
    assert (session[0].gap_s, session[1].gap_s, session[10].idle_kind) == (0.0, 1.0, "human")


def test_sessions_are_cut_at_long_gaps(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [turn(6_400 + i, gap_s=1_000.0 if i == 11 else 1.0) for i in range(24)]
    path.write_text("\n".join(lines))
    assert [len(session) for session in traces.load([path])] == [12, 12]


@pytest.mark.parametrize("text", ["nonsense", '{"a": 1}', "[1]"])
def test_what_is_no_trace_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(traces.TraceError, match=r"bad\.jsonl"):
        traces.load([path])
    with pytest.raises(traces.TraceError, match="missing"):
        traces.load([tmp_path / "missing"])


def test_forecasts_know_the_class_or_the_gap() -> None:
    sessions = traces.load([SAMPLE])
    session = sessions[0]
    perfect = oracle(session, 0)
    assert perfect is not None
    assert perfect.curve()[0] == (max(session[1].gap_s, 0.001), 1.0)
    assert oracle(session, len(session) - 1) is None
    curve = by_class(sessions)(session, 0)
    assert curve is not None
    points = curve.curve()
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(points))
    assert 0 < curve.p_return < 1


def test_ratios_are_to_the_same_load_and_seed() -> None:
    def row(policy: str, seed: int, value: float) -> report.Row:
        return {"policy": policy, "per_pod": 30, "seed": seed} | dict.fromkeys(report.RATIOS, value)

    rows = [row("stock", 1, 10.0), row("stock", 2, 30.0), row("ours", 2, 10.0)]
    report.compare(rows, "stock")
    assert rows[2]["ratios"] == dict.fromkeys(report.RATIOS, 3.0)


def mooncake(session: str, ids: list[int], size: int) -> str:
    line = {"timestamp": len(ids), "input_length": size * len(ids), "output_length": 9}
    return json.dumps(line | {"hash_ids": ids, "session_id": session, "delay": 1_000})


@pytest.mark.parametrize(("size", "blocks"), [(16, 1), (64, 4), (512, 32)])
def test_what_sessions_share_and_the_size_of_blocks_are_kept(
    tmp_path: Path, size: int, blocks: int
) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        mooncake(name, [1, 2, 3, 4, *range(base, base + k)], size)
        for name, base in (("a", 100), ("b", 200))
        for k in range(1, 14)
    ]
    path.write_text("\n".join(lines))
    a, b = traces.load([path])
    tokens = [size * (4 + k) for k in range(1, 14)]
    assert [len(t.blocks) for t in a] == [max(1, n // traces.BLOCK_TOKENS) for n in tokens]
    assert a[-1].blocks[:blocks] == b[-1].blocks[:blocks]
    assert min(a[-1].blocks) >= traces.SHARED
    assert not set(a[-1].blocks[blocks:]) & set(b[-1].blocks)


def test_other_files_of_a_directory_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"theme": "dark"}')
    (tmp_path / "trace.jsonl").write_text("\n".join(turn(6_400 + 640 * i) for i in range(10)))
    assert len(traces.load([tmp_path])) == 1
    with pytest.raises(traces.TraceError, match=r"settings\.json"):
        traces.load([tmp_path / "settings.json", tmp_path / "trace.jsonl"])
