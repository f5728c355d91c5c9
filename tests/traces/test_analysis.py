"""What is counted of a trace, and the report of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench.replay.sample import SAMPLE
from gateway.analysis import capacity, plots
from gateway.analysis.figures import figures, quantiles, survival
from gateway.analysis.published import KV_CACHE_TESTER, PUBLISHED, ROWS, TRANSCRIPTS, own
from gateway.analysis.report import markdown
from gateway.analysis.reuse import reuse
from gateway.analysis.timeline import Sent, timeline
from gateway.cli import app
from gateway.traces.load import Trace, load
from gateway.traces.session import Call, Chain, Session, Turn
from tests.traces.sessions import NEEDS_SHARED, SHARED, chains, sessions
from tests.yardstick import plain_python_s


def lru_lost_tokens(found: list[Session], sent: list[Sent], capacity_tokens: int) -> int:
    """An LRU cache of blocks, one by one."""
    size = 64
    cached: dict[tuple[str, int], None] = {}  # least recently used first
    seen: set[tuple[str, int]] = set()
    prompts = [chains(session) for session in found]
    lost = 0
    for turn in sent:
        session = found[turn.session]
        ids = [(session.scope or session.id, b) for b in prompts[turn.session][turn.turn]]
        lost += sum(size for block in ids if block in seen and block not in cached)
        for block in reversed(ids):
            cached.pop(block, None)
            cached[block] = None
        seen.update(ids)
        while len(cached) * size > capacity_tokens:
            del cached[next(iter(cached))]
    return lost


@settings(max_examples=60)
@given(sessions() | sessions(shared=True), st.integers(0, 40))
def test_losses_are_those_of_an_lru_cache(found: list[Session], blocks: int) -> None:
    sent = timeline(found, slots=2).sent
    assert reuse(found, sent).lost_tokens(64 * blocks) == lru_lost_tokens(found, sent, 64 * blocks)


@settings(max_examples=30)
@given(sessions(started_at=5.0), st.integers(1, 3))
def test_a_timeline_has_every_turn_once_and_in_its_sessions_order(
    found: list[Session], slots: int
) -> None:
    for line in (timeline(found), timeline(found, slots)):
        assert sorted((s.session, s.turn) for s in line.sent) == [
            (n, k) for n, session in enumerate(found) for k in range(len(session.turns))
        ]
        assert [s.at_s for s in line.sent] == sorted(s.at_s for s in line.sent)
        for n in range(len(found)):
            own = [s.turn for s in line.sent if s.session == n]
            assert own == sorted(own)


def test_seats_hold_one_session_after_another_and_long_waits_are_cut() -> None:
    found = [Session(f"s{n}", [Turn(0.0, 64, 1, api_s=1.0), Turn(0.0, 64, 1, gap_s=900.0)])
             for n in range(3)]  # fmt: skip
    line = timeline(found, slots=1)
    assert [s.at_s for s in line.sent] == [0.0, 301.0, 301.0, 602.0, 602.0, 903.0]
    assert line.full_s == 903.0


def test_kv_sizes_follow_from_the_models_numbers() -> None:
    pods = {pod.name: pod for pod in capacity.PODS}
    assert capacity.QWEN_32B.kv_bytes_per_token == 262_144
    assert capacity.DEEPSEEK.kv_bytes_per_token == 70_272
    assert pods["Qwen2.5-Coder-32B on 2xH200-141GB"].kv_tokens == pytest.approx(7.0e5, rel=0.02)
    eight = capacity.Pod(capacity.DEEPSEEK, capacity.H200, 8)
    free = 141e9 * 0.9 - 2e9 - 671e9 / 8
    assert eight.kv_tokens == int(free / 70_272), "every rank holds the whole latent"
    assert capacity.Pod(capacity.QWEN_480B, capacity.H100, 1).kv_tokens == 0


def test_quantiles_and_survival() -> None:
    assert quantiles([]) is None
    told = quantiles(range(101))
    assert told is not None
    assert (told["p10"], told["p50"], told["p99"], told["count"]) == (10, 50, 99, 101)
    curve = survival([1.0, 1.0, 50.0, 200.0])
    assert curve[0] == [0.01, 1.0]
    assert [s for t, s in curve if t == 1.0] == [0.5]
    assert curve[-1][1] == 0.0


def grown(*prompts: list[int], **more: Any) -> list[Turn]:
    chain = Chain()
    return [
        Turn(10.0 * k, 64 * len(ids), 10, gap_s=1.0 if k else 0.0, api_s=2.0, idle_kind="tool",
             **chain.add(np.array(ids)), **more)
        for k, ids in enumerate(prompts)
    ]  # fmt: skip


def test_what_breaks_a_prefix_is_told_apart() -> None:
    whole = list(range(10))
    cases = {
        "tools or system prompt changed": grown(whole, list(range(100, 111))),
        "history edited": grown(whole, [*whole[:7], 101, 102, 103, 104]),
        "history shortened": grown(whole, [*whole[:6], 101]),
        "compacted or cut to under 60 %": grown(whole, [0, 1, 2, 101]),
        "went on from an older prompt": grown(whole, [0, 1, 200, 201], [*whole, 300]),
    }
    found = [
        Session(name, turns, tool_tokens=64, system_tokens=64) for name, turns in cases.items()
    ]
    told = figures(Trace(found))["prefix"]
    assert set(told["causes"]) == set(cases)
    assert told["causes"]["history edited"] == {"turns": 1, "lost_tokens": 3 * 64}
    assert (told["later_turns"], told["breaks"]) == (6, 6)
    fine = figures(Trace([Session("s", grown(whole, [*whole[:9], 50, 51, 52]))]))["prefix"]
    assert fine["breaks"] == 0, "a last block that was not full yet is another one when it is"


def test_tools_are_grouped_by_kind_and_program() -> None:
    calls = tuple(Call("shell", "Bash", "go", "test", duration_s=float(n)) for n in range(40))
    reads = tuple(Call("read", "Read", duration_s=0.1) for _ in range(40))
    found = [Session("s", [Turn(0.0, 64, 1, idle_kind="tool", calls=calls + reads)])]
    told = figures(Trace(found))["tools"]
    assert list(told["by_kind"]) == ["shell", "read"]
    assert list(told["by_program"]) == ["go test"]
    assert told["by_program"]["go test"]["duration_s"]["p50"] == 19.5


def test_the_working_set_is_what_live_sessions_need() -> None:
    found = [
        Session(f"s{n}", [Turn(0.0, 1000, 0, api_s=1.0)], started_at=start)
        for n, start in enumerate((0.0, 100.0, 1000.0))
    ]
    told = figures(Trace(found))["working_set"]
    assert told["wall_clock"]
    assert told["tokens"]["max"] == 2000
    assert told["sessions_at_once"]["max"] == 2


def test_a_trace_stands_beside_published_ones() -> None:
    assert all(other.figures.keys() <= ROWS.keys() for other in PUBLISHED)
    turns = [
        Turn(0.0, 1000, 10, cached_tokens=500, idle_kind="tool",
             calls=(Call("shell", "Bash", duration_s=2.0), Call("read", "Read", duration_s=4.0))),
        Turn(5.0, 2000, 20, cached_tokens=1000, gap_s=3.0, idle_kind="human"),
        Turn(90.0, 3000, 30, cached_tokens=2500, gap_s=80.0),
    ]  # fmt: skip
    told = figures(Trace([Session("s", turns)]))
    assert told["beside"]["here"] == own(told) == {
        "turns_per_session": 3,
        "prompt_tokens_mean": 2000,
        "output_tokens_mean": 20,
        "prompt_to_output": 100,
        "cached_share": 0.6667,
        "tool_triggered_share": 0.5,
        "tool_wait_s_p50": 3.0,
        "tool_wait_s_p90": 3.0,
        "human_wait_s_p50": 80.0,
        "human_wait_s_p90": 80.0,
        "tool_calls_per_turn": 0.6667,
        "tool_call_s_p50": 3.0,
        "tool_call_s_p90": 3.8,
    }  # fmt: skip
    assert "| wait for a person, p50 | 80 s | 2.74 min | 2.03 min | 84 s |" in markdown(told)
    less = figures(Trace([Session("s", [Turn(0.0, 64, 1)])]))
    assert "| wait for a person, p50 | – | 2.74 min | 2.03 min | 84 s |" in markdown(less)


runner = CliRunner()


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    names = {kind: tmp_path / f"r.{kind}" for kind in ("html", "json", "markdown")}
    options = [str(word) for kind, path in names.items() for word in (f"--{kind}", path)]
    done = runner.invoke(app, ["analyze", str(SAMPLE), *options])
    assert done.exit_code == 0, done.output
    page = names["html"].read_text()
    assert page.count("<svg ") >= 5
    assert not re.search(r"<script|<link|@import|src=|url\((?!#)", page)
    assert not re.search(r'href="(?!#)', page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "plots do not share names"
    assert len(page) < 500_000
    told = json.loads(names["json"].read_text())
    assert (told["schema"], told["input"]["sessions"], told["input"]["turns"]) == (1, 32, 761)
    text = names["markdown"].read_text()
    assert text == markdown(told), "JSON and Markdown say the same"
    for title in re.findall(r"^## (.+)$", text, re.M):
        assert f"<h2>{title}</h2>" in page


def test_text_of_a_trace_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    record = {"session": "s", "ctx": 640, "out": 1, "model": "<script>alert(1)</script>",
              "agent": "<b>"}  # fmt: skip
    path.write_text(json.dumps(record))
    html = tmp_path / "r.html"
    assert runner.invoke(app, ["analyze", str(path), "--html", str(html)]).exit_code == 0
    assert "<script" not in html.read_text()
    assert "<b>" not in html.read_text()


def test_names_of_a_trace_are_drawn_as_they_are() -> None:
    calls = tuple(Call(r"$\frac$", "Bash", duration_s=float(n)) for n in range(40))
    told = figures(Trace([Session("s", [Turn(0.0, 64, 1, idle_kind="tool", calls=calls)])]))
    assert r">$\frac$<" in plots.draw("tool_kinds", told)


@pytest.mark.parametrize("to", ["cachewise", "mooncake", "kv-cache-tester"])
def test_traces_are_converted(tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    done = runner.invoke(app, ["trace", "convert", str(SAMPLE), "--to", to, "--out", str(out)])
    assert done.exit_code == 0, done.output
    before, after = load([SAMPLE]), load([out])
    assert list(after.formats) == [to]
    assert {s.id: chains(s) for s in after.sessions}.keys() == {s.id for s in before.sessions}
    for a, b in zip(before.sessions, sorted(after.sessions, key=lambda s: s.id), strict=True):
        assert [t.prompt_tokens for t in a.turns] == [t.prompt_tokens for t in b.turns]
        assert [t.shared for t in a.turns] == [t.shared for t in b.turns]


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from gateway.cli import main; main()", "analyze", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_cannot_be_done_is_one_line_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    done = analyze(str(tmp_path))
    assert done.returncode == 2
    assert "no session of a known format" in done.stderr
    done = analyze(str(tmp_path / "missing"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no such file" in done.stderr


def test_without_matplotlib_only_the_page_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom gateway.cli import main\n"
        f"sys.argv = ['cachewise', 'analyze', {str(SAMPLE)!r}, *sys.argv[1:]]\nmain()"
    )
    command = [sys.executable, "-c", code]
    page = subprocess.run([*command, "--html", str(tmp_path / "r.html")], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert page.returncode == 2
    assert "cachewise-gateway[analyze]" in page.stderr
    text = subprocess.run(command, capture_output=True, text=True, check=False)
    assert text.returncode == 0
    assert "What LRU throws away" in text.stdout


@NEEDS_SHARED
def test_hundreds_of_real_sessions_are_analysed_in_a_minute_and_a_gigabyte(tmp_path: Path) -> None:
    began_s = time.process_time()
    trace = load([SHARED])
    told = figures(trace)
    (tmp_path / "r.md").write_text(markdown(told))
    assert time.process_time() - began_s < 60_000 * plain_python_s()
    code = (
        "import re, sys; from pathlib import Path;"
        " from gateway.analysis.figures import figures; from gateway.traces.load import load;"
        " figures(load([Path(sys.argv[1])]));"
        # Not `ru_maxrss`, which begins with the peak of the process that started this one.
        " print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    program = [sys.executable, "-c", code, str(SHARED)]
    peak_kb = int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    assert peak_kb < 1_000_000
    # What the data's own description says of them.
    assert told["input"]["sessions"] == 483
    assert sum(len(s.turns) for s in trace.sessions if s.parent is None) == 31_705
    gaps = told["waits"]["by_kind"]["tool"]["gap_s"]
    assert [gaps[q] for q in ("p50", "p75", "p90", "p99")] == pytest.approx(
        [1.2, 7.2, 62, 605], rel=0.06
    )
    assert told["waits"]["by_kind"]["human"]["gap_s"]["p50"] > 60
    prompts = told["prompts"]["prompt_tokens"]
    assert [prompts[q] for q in ("p10", "p50", "p90")] == pytest.approx(
        [43_000, 101_000, 205_000], rel=0.02
    )
    assert own(told) == KV_CACHE_TESTER.figures, "as the report says of them"


@NEEDS_SHARED
def test_public_transcripts_are_as_the_report_says() -> None:
    told = figures(
        load([SHARED.parent / f"tool-{what}-dev.jsonl.gz" for what in ("turns", "calls")])
    )
    assert own(told) == TRANSCRIPTS.figures
