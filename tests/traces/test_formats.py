"""Reading traces of every format, and writing them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.analysis.figures import figures
from gateway.idle import IdleKind
from gateway.traces import kv_cache_tester, mooncake
from gateway.traces.families import SEATS
from gateway.traces.lines import TraceError
from gateway.traces.load import Trace, load
from gateway.traces.session import Chain, Session, Turn, expand, runs_of
from tests.traces.sessions import MILLISECONDS, NEEDS_SHARED, chains, few_real, pattern, sessions


@given(st.lists(st.integers(0, 40)))
def test_runs_hold_any_blocks(ids: list[int]) -> None:
    assert expand(runs_of(ids)).tolist() == ids


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=12))
def test_a_chain_gives_back_the_prompts_it_was_given(prompts: list[list[int]]) -> None:
    chain = Chain()
    session = Session("s")
    session.turns = [Turn(0.0, 1, 1, **chain.add(np.array(ids, np.int64))) for ids in prompts]
    assert chains(session) == prompts


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


KINDS: list[tuple[IdleKind, str]] = [
    ("tool", "tool_use"),
    ("human", "end_turn"),
    ("human", ""),
    ("tool", ""),
]
"""Idle kinds by stop reason; where there is none, the next turn's input tells."""


@settings(max_examples=50)
@given(sessions(), st.data())
def test_kv_cache_tester_gives_back_what_it_can_hold(
    found: list[Session], data: st.DataObject
) -> None:
    for session in found:
        session.tool_tokens, session.system_tokens = 11_899, 2_926
        kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=6, max_size=6))
        if kinds[len(session.turns) - 1] == ("tool", ""):
            kinds[len(session.turns) - 1] = ("human", "")
        session.turns = [
            replace(
                turn,
                api_s=data.draw(st.none() | MILLISECONDS),
                first_token_s=data.draw(st.none() | MILLISECONDS),
                idle_kind=kind,
                stop=stop,
                model=data.draw(st.sampled_from(["a", "b"])),
            )
            for turn, (kind, stop) in zip(session.turns, kinds, strict=False)
        ]
    again = [
        session
        for _, text in kv_cache_tester.dump(found)
        for session in kv_cache_tester.sessions(json.loads(text), "here")
    ]
    assert again == found


@settings(max_examples=50)
@given(sessions(shared=True))
def test_kv_cache_tester_keeps_what_sessions_share(found: list[Session]) -> None:
    again = [
        session
        for _, text in kv_cache_tester.dump(found)
        for session in kv_cache_tester.sessions(json.loads(text), "all")
    ]
    assert again == found


@settings(max_examples=50)
@given(sessions(), st.data())
def test_kv_cache_tester_nests_sub_agents(found: list[Session], data: st.DataObject) -> None:
    root, *children = found
    for child in children:
        child.id, child.parent = f"{root.id}/{child.id}", root.id
        child.start_s = data.draw(st.integers(0, 5000)) * 1.0
        child.agent_type = "Explore"
    for each in found:
        each.scope = root.id if children else ""
    ((name, text),) = kv_cache_tester.dump(found)
    again = kv_cache_tester.sessions(json.loads(text), "here")
    assert name == root.id
    assert again[0] == root
    assert sorted(again, key=lambda s: s.id) == sorted(found, key=lambda s: s.id)


@given(sessions(started_at=1_700_000_000.0) | sessions(shared=True, started_at=1_700_000_000.0))
def test_mooncake_gives_back_what_it_can_hold(found: list[Session]) -> None:
    reader = mooncake.Reader("f")
    for line in mooncake.dump(found):
        reader.feed(json.loads(line))
    again = sorted(reader.sessions(), key=lambda s: s.id)
    assert pattern(sorted(found, key=lambda s: s.id)) == pattern(again)
    for a, b in zip(found, again, strict=True):
        assert list(map(told, b.turns)) == list(map(told, a.turns))
        assert b.started_at == a.started_at


def told(turn: Turn) -> tuple[float, ...]:
    return turn.at_s, turn.prompt_tokens, turn.output_tokens, turn.gap_s, turn.shared, turn.back


def request(ms: int, tokens: int, ids: list[int], **more: Any) -> dict[str, Any]:
    return {
        "timestamp": ms, "input_length": tokens, "output_length": 5, "hash_ids": ids
    } | more  # fmt: skip


def test_mooncake_without_sessions_is_put_together_by_prefix(tmp_path: Path) -> None:
    path = written(
        tmp_path / "trace.jsonl",
        request(0, 1000, [0, 1]),
        request(500, 900, [0, 2]),
        request(2_500, 1500, [0, 1, 3]),
        request(4_000, 1200, [0, 2, 4]),
    )
    first, second = load([path]).sessions
    assert first.block_tokens == 512
    assert chains(first) == [[0, 1], [0, 1, 3]]
    assert chains(second) == [[0, 2], [0, 2, 4]]
    assert [turn.gap_s for turn in first.turns] == [0.0, 2.5]
    assert first.scope == second.scope != ""


def test_sessions_of_two_mooncake_files_are_not_taken_for_each_other(tmp_path: Path) -> None:
    files = [tmp_path / name / "trace.jsonl" for name in ("a", "b")]
    for n, file in enumerate(files):
        file.parent.mkdir()
        written(file, request(n, 1000, [0, 1]), request(500, 900, [0, 2]))
    trace = load(files)
    assert (len(trace.sessions), trace.repeated) == (4, 0)
    around = tmp_path / "b" / ".." / "a" / "trace.jsonl"
    again = load([files[0], around])
    assert (len(again.sessions), again.copies) == (2, 1), "one file by two names"


def test_a_session_that_two_mooncake_files_name_counts_once(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for n, file in enumerate(files):
        written(file, request(n, 1000, [0, 1], session_id="x"))
    trace = load(files)
    assert ([s.id for s in trace.sessions], trace.repeated) == (["x"], 1)


@pytest.mark.parametrize("more", [{}, {"session_id": "x", "delay": 2_000}])
def test_mooncake_tells_waits_but_not_what_they_were_for(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    lines = [request(0, 1000, [0, 1], **more), request(2_000, 1500, [0, 1, 2], **more)]
    trace = load([written(tmp_path / "trace.jsonl", *lines)])
    assert [turn.gap_s for turn in trace.sessions[0].turns] == [0.0, 2.0]
    told = figures(trace)
    assert told["waits"]["by_kind"] == {}
    assert "tool_triggered_share" not in told["beside"]["here"]


@settings(max_examples=30)
@given(sessions())
def test_mooncake_lays_sessions_without_a_time_beside_one_another(found: list[Session]) -> None:
    found = [replace(session, id=f"{n:02}-{session.id}") for n in range(40) for session in found]
    reader = mooncake.Reader("f")
    for line in mooncake.dump(found):
        reader.feed(json.loads(line))
    again = sorted(reader.sessions(), key=lambda s: s.id)
    assert [list(map(told, s.turns)) for s in again] == [list(map(told, s.turns)) for s in found]
    spans = [(round(1000 * (s.started_at or 0)), round(1000 * s.ends_s)) for s in again]
    for begun, _ in spans:
        assert sum(other <= begun < other + lasts for other, lasts in spans) <= SEATS


def pair(
    t: float, api_s: float, ids: list[int], think_s: float, **more: Any
) -> list[dict[str, Any]]:
    half = {"in": 64 * len(ids), "out": 7, "hash_ids": ids, "model": "m"}
    return [
        half | {"t": t, "type": "s", "input_types": ["text"], "stop": "", "api_time": api_s,
                "think_time": think_s},
        half | {"t": t + api_s, "type": "n", "input_types": [], "stop": "tool_use",
                "api_time": api_s, "think_time": 0.0},
    ]  # fmt: skip


def test_the_two_halves_of_a_turn_are_one(tmp_path: Path) -> None:
    agent = {"t": 8.0, "type": "subagent", "agent_id": "a1", "subagent_type": "Explore",
             "requests": pair(8.0, 1.0, [9, 8], 0.0)}  # fmt: skip
    requests = [*pair(0.0, 3.0, [1, 2], 0.0), *pair(7.0, 2.0, [1, 2, 3], 1.0), agent]
    record = {"id": "x", "models": ["m"], "block_size": 64, "tool_tokens": 100,
              "system_tokens": 28, "requests": requests}  # fmt: skip
    path = tmp_path / "x.json"
    path.write_text(json.dumps(record, indent=2))
    root, child = load([path]).sessions
    assert [(t.at_s, t.api_s, t.gap_s, t.idle_kind) for t in root.turns] == [
        (0.0, 6.0, 0.0, "tool"),
        (7.0, 4.0, 1.0, "tool"),
    ]
    assert (child.parent, child.agent_type, child.start_s) == ("x", "Explore", 8.0)
    assert (root.tool_tokens, root.system_tokens) == (100, 28)


def compact(**more: Any) -> dict[str, Any]:
    """A session of two turns, ``more`` of the second."""
    first = {"t": 0.0, "k": "n", "m": 0, "in": 200, "out": 0, "n": 4, "s": 0, "r": [1, 4],
             "it": "text", "ot": "text", "st": "end_turn", "a": 1.0}  # fmt: skip
    second = first | {"t": 5.0, "in": 300, "s": 4, "r": [9, 1], "g": 4.0, "tf": 0.5, "sa": None}
    return {"id": "x", "models": ["m"], "bs": 64, "tool": 100, "sys": 28, "subs": [],
            "req": [first, second | more]}  # fmt: skip


def original(**more: Any) -> dict[str, Any]:
    """Likewise."""
    first = {"t": 0.0, "type": "n", "model": "m", "in": 200, "out": 0, "hash_ids": [1, 2, 3],
             "input_types": ["text"], "stop": "end_turn", "api_time": 1.0}  # fmt: skip
    second = first | {"t": 5.0, "in": 300, "hash_ids": [1, 2, 3, 4], "think_time": 4.0, "ttft": 0.5}
    return {"id": "x", "models": ["m"], "block_size": 64, "requests": [first, second | more]}


HUGE = 1e308
TIMES = ["5", HUGE, -5.0, True]
COUNTS = ["5", HUGE, -5, 1 << 30, None]


@pytest.mark.parametrize(
    "record",
    [
        *(compact(**{name: value}) for name in ("t", "a", "tf", "g") for value in TIMES),
        *(compact(**{name: value}) for name in ("in", "out", "s", "b") for value in COUNTS),
        *(compact(r=runs) for runs in (["q", 2], [1.0, 2], [1], [1, -2], [1 << 63, 1], "ab")),
        compact(b=0),
        *(compact() | {"bs": size} for size in (0, -64, "64", HUGE)),
        *(original(**{name: value}) for name in ("t", "api_time", "ttft") for value in TIMES),
        *(original(think_time=value) for value in ("5", HUGE)),
        *(original(**{name: value}) for name in ("in", "out") for value in COUNTS),
        *(original(hash_ids=ids) for ids in (["1"], [1.5], [[1, 2]], [1 << 64], "ab")),
        *(original() | {"block_size": size} for size in (-64, "64", HUGE)),
    ],
)
def test_a_session_of_impossible_values_is_skipped(tmp_path: Path, record: dict[str, Any]) -> None:
    fine = {**record, **(compact() if "req" in record else original()), "id": "y"}
    path = written(tmp_path / "t.jsonl", record, fine)
    trace = load([path])
    assert [session.id for session in trace.sessions] == ["y"]
    assert trace.problems.named == [f"{path}:1: a field of another type or value than expected"]


@pytest.mark.parametrize("record", [compact(), original()])
def test_an_answer_of_no_tokens_has_none(tmp_path: Path, record: dict[str, Any]) -> None:
    (session,) = load([written(tmp_path / "t.jsonl", record)]).sessions
    assert [turn.output_tokens for turn in session.turns] == [0, 0]


CALL = {"session": "s", "turn": 0, "tool": "Bash", "args": "go test ./secret", "duration_s": 4.0}
TURN = {"session": "s", "turn": 0, "ctx": 6_400, "out": 5, "gap_s": 4.1, "gap_kind": "tool", "t": 9}


@pytest.mark.parametrize("order", [(TURN, CALL), (CALL, TURN)])
def test_calls_are_added_to_their_turns_without_their_arguments(
    tmp_path: Path, order: tuple[dict[str, Any], ...]
) -> None:
    files = [written(tmp_path / f"{n}.jsonl", record) for n, record in enumerate(order)]
    (session,) = load(files).sessions
    (call,) = session.turns[0].calls
    assert (call.kind, call.program, call.sub, call.duration_s) == ("shell", "go", "test", 4.0)
    assert "secret" not in repr(session)


def event(what: str, at: str) -> dict[str, Any]:
    return {"event_type": what, "timestamp": f"2026-06-01T05:{at}Z", "source": "user.message"}


def tool(name: str, wall_ms: int | None, failed: bool | None = False) -> dict[str, Any]:
    return {"tool_name": name, "tool_call_id": "toolu_5abce", "input_chars": 168,
            "tool_wall_latency_ms": wall_ms, "tool_internal_latency_ms": None,
            "is_error": failed}  # fmt: skip


def round_of(index: int, total: int, cached: int, events: list[dict[str, Any]],
             *tools: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    return {"provider": "claude", "project": "project_4c7b8a1b", "session_id": "claude:92ee5b8a",
            "round_index": index, "round_id": f"msg_{index}", "model": "claude-opus-4-8",
            "input_tokens_total": total, "prefix_tokens": cached,
            "newly_append_tokens": total - cached, "output_tokens": 931,
            "reasoning_output_tokens": None, "timing_events": events, "tools": list(tools),
            "first_input_event_type": events[0]["event_type"], "store": ".claude",
            "trace_key": f"claude:claude:92ee5b8a:msg_{index}"}  # fmt: skip


ROUNDS = [
    round_of(0, 32_272, 27_217, [
        event("user_message", "40:20.000"), event("reasoning", "40:29.000"),
        event("text", "40:29.500"), event("tool_call", "40:30.000"),
        event("tool_call", "40:31.500"),
    ], tool("Bash", 860), tool("WebSearch", 19_291, True)),
    round_of(1, 35_740, 29_380, [
        event("tool_result", "40:30.860"), event("tool_result", "40:51.500"),
        event("text", "41:04.500"), event("usage_report", "41:04.600"),
    ]),
    round_of(2, 35_800, 35_738, [
        event("user_message", "42:43.500"), event("text", "42:46.500"),
    ], tool("AskUserQuestion", None, None)),
    round_of(3, 9_000, 6_400, [
        event("tool_result", "43:02.500"), event("text", "43:04.500"),
    ]),
]  # fmt: skip


def test_rounds_of_tracelab_become_sessions(tmp_path: Path) -> None:
    codex = ROUNDS[0] | {"provider": "codex", "session_id": "codex:a611041f", "round_id": "491f:0"}
    shuffled = [ROUNDS[2], ROUNDS[0], codex, ROUNDS[3], ROUNDS[1], ROUNDS[0], {"session_id": "x"}]
    broken = ROUNDS[0] | {"round_id": "msg_9", "round_index": 9, "timing_events": []}
    trace = load([written(tmp_path / "a.jsonl", *shuffled, broken)])
    assert trace.formats == {"tracelab": 1}
    assert trace.problems.count == 2
    one, other = trace.sessions
    assert (one.id, one.client, len(one.turns)) == (
        "project_4c7b8a1b/claude:92ee5b8a",
        "claude-code",
        4,
    )
    assert (other.client, len(other.turns)) == ("codex", 1)
    assert [(t.at_s, t.gap_s, t.api_s, t.idle_kind) for t in one.turns] == [
        (0.0, 0.0, 11.5, "tool"),
        (31.5, 20.0, 13.0, "human"),
        (143.5, 99.0, 3.0, "human"),
        (162.5, 16.0, 2.0, "human"),
    ]
    assert [(t.prompt_tokens, t.cached_tokens, t.output_tokens) for t in one.turns[:2]] == [
        (32_272, 27_217, 931),
        (35_740, 29_380, 931),
    ]
    assert [(c.kind, c.tool, c.duration_s, c.failed) for c in one.turns[0].calls] == [
        ("shell", "Bash", 0.86, False),
        ("web", "WebSearch", 19.291, True),
    ]
    assert one.turns[3].shared == 100, "what was cached of a prompt that got shorter"


def test_a_person_who_interrupts_a_tool_of_tracelab_is_who_was_waited_for(tmp_path: Path) -> None:
    interrupted = round_of(1, 35_740, 29_380, [
        event("tool_result", "40:31.000"), event("user_message", "50:31.500"),
        event("text", "50:33.500"),
    ])  # fmt: skip
    (session,) = load([written(tmp_path / "a.jsonl", ROUNDS[0], interrupted)]).sessions
    assert (session.turns[0].idle_kind, session.turns[1].gap_s) == ("human", 600.0)


def test_a_wait_that_tracelab_does_not_tell_is_not_known(tmp_path: Path) -> None:
    unread = ROUNDS[1] | {"timing_events": []}
    untimed = {"event_type": "reasoning", "timestamp": None}
    late = ROUNDS[2] | {"timing_events": [untimed, *ROUNDS[2]["timing_events"]]}
    trace = load([written(tmp_path / "a.jsonl", ROUNDS[0], unread, late)])
    assert trace.problems.count == 1
    (session,) = trace.sessions
    assert [(t.at_s, t.gap_s, t.gap_known) for t in session.turns] == [
        (0.0, 0.0, True),
        (143.5, 0.0, False),
    ]


def test_what_a_fork_of_tracelab_copied_is_its_first_sessions(tmp_path: Path) -> None:
    copied = [each | {"session_id": "claude:fork"} for each in ROUNDS[:2]]
    own = ROUNDS[2] | {"session_id": "claude:fork", "round_id": "msg_y"}
    first, fork = load([written(tmp_path / "a.jsonl", *ROUNDS[:2], *copied, own)]).sessions
    assert (len(first.turns), len(fork.turns)) == (2, 1)


def test_sessions_of_tracelab_are_told_apart_by_project_and_times_are_utc(tmp_path: Path) -> None:
    naive = [e | {"timestamp": e["timestamp"].rstrip("Z")} for e in ROUNDS[0]["timing_events"]]
    other = ROUNDS[0] | {"project": "project_2", "round_id": "msg_x", "timing_events": naive}
    one, two = load(
        [written(tmp_path / f"{n}.jsonl", record) for n, record in enumerate((ROUNDS[0], other))]
    ).sessions
    assert (len(one.turns), len(two.turns)) == (1, 1)
    assert one.started_at == two.started_at == 1_780_292_420.0


HUGE: list[dict[str, Any]] = [
    {"session": "s", "ctx": 10**14, "out": 1},
    ROUNDS[0] | {"input_tokens_total": 10**14},
    {"type": "assistant", "sessionId": "s", "uuid": "u", "timestamp": "2026-06-01T05:00:00Z",
     "message": {"id": "m", "role": "assistant", "model": "m", "content": [],
                 "usage": {"input_tokens": 10**12, "output_tokens": 1}}},
]  # fmt: skip


@pytest.mark.parametrize("record", HUGE, ids=["turns", "tracelab", "claude-code"])
def test_a_prompt_of_more_tokens_than_any_is_a_problem(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    trace = load([written(tmp_path / "a.jsonl", record)])
    assert (trace.problems.count, trace.sessions) == (1, [])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_bad_lines_are_counted_and_named(tmp_path: Path, suffix: str) -> None:
    lines = [
        json.dumps(TURN),
        "{half a li",
        "[1]",
        json.dumps(TURN | {"ctx": None}),
        json.dumps(TURN),
    ]
    data = "\n".join(lines).encode()
    path = tmp_path / f"trace{suffix}"
    if suffix.endswith("gz"):
        data = gzip.compress(data)
    elif suffix.endswith("zst"):
        data = zstandard.compress(data)
    path.write_bytes(data)
    trace = load([path])
    assert [len(session.turns) for session in trace.sessions] == [2]
    assert trace.problems.count == 3
    assert trace.problems.named == [
        f"{path}:2: no JSON",
        f"{path}:3: no JSON object",
        f"{path}:4: a field of another type or value than expected",
    ]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_torn_file_gives_what_it_holds(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / ("t.jsonl.gz" if pack is gzip.compress else "t.jsonl.zst")
    noise = np.random.default_rng(1).integers(0, 1 << 60, 20_000)
    lines = [json.dumps(TURN | {"noise": int(n), "session": f"s{i}"}) for i, n in enumerate(noise)]
    data = pack("\n".join(lines).encode())
    path.write_bytes(data[: len(data) // 2])
    trace = load([path])
    assert 1_000 < len(trace.sessions) < 20_000
    assert trace.problems.count >= 1


def test_what_is_no_trace_is_told_and_a_missing_file_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "other.jsonl", {"a": 1})
    (tmp_path / "notes.txt").write_text("not looked at in a directory")
    trace = load([tmp_path])
    assert (trace.sessions, trace.unknown) == ([], [path])
    with pytest.raises(TraceError, match="no such file"):
        load([tmp_path / "missing"])


FIELDS = [
    "t",
    "type",
    "in",
    "out",
    "hash_ids",
    "requests",
    "req",
    "subs",
    "bs",
    "id",
    "block_size",
    "timestamp",
    "payload",
    "message",
    "usage",
    "sessionId",
    "uuid",
    "content",
    "model",
    "session",
    "ctx",
    "input_length",
    "output_length",
    "role",
    "turn",
    "s",
    "r",
    "b",
    "sb",
    "input_tokens",
    "output_tokens",
    "source",
    "subagent",
    "timing_events",
    "event_type",
    "tools",
    "tool_name",
    "tool_wall_latency_ms",
    "round_index",
    "input_tokens_total",
]
JUNK = st.recursive(
    st.none() | st.integers() | st.floats() | st.sampled_from(["", "user", "message"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5)
    ),
    max_leaves=8,
)
SEEDS: list[dict[str, Any]] = [
    {"req": [{}], "bs": 64},
    {"requests": [{}], "block_size": 64},
    TURN,
    {"hash_ids": [1], "input_length": 5},
    {"type": "response_item", "payload": {}},
    {"type": "user", "message": {}},
    {"session_id": "s", "prefix_tokens": 1, "timing_events": []},
]


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(st.lists(JUNK, max_size=4))
def test_nothing_in_a_file_is_fatal(
    tmp_path_factory: pytest.TempPathFactory, junk: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    for number, seed in enumerate(SEEDS):
        merged = [seed | each if isinstance(each, dict) else each for each in junk]
        written(folder / f"{number}.jsonl", seed, *merged)
    trace = load([folder])
    assert isinstance(trace, Trace)
    for session in trace.sessions:
        assert len(list(session.chains())) == len(session.turns)


EXTREMES = st.sampled_from([HUGE, -1, 0, 1 << 63, -(1 << 70), 1e-308, True, "5"])


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(st.sampled_from([compact, original]), st.data())
def test_whatever_a_field_holds_what_is_read_can_be_analysed(
    tmp_path_factory: pytest.TempPathFactory, make: Any, data: st.DataObject
) -> None:
    record = make()
    holder = data.draw(st.sampled_from([record, (record.get("req") or record["requests"])[1]]))
    holder[data.draw(st.sampled_from(sorted(holder)))] = data.draw(EXTREMES | JUNK)
    trace = load([written(tmp_path_factory.mktemp("junk") / "t.jsonl", record)])
    json.dumps(figures(trace), allow_nan=False)


@NEEDS_SHARED
def test_the_real_sessions_survive_an_export(tmp_path: Path) -> None:
    few = few_real(tmp_path)
    found = load([few]).sessions
    assert any(session.parent for session in found)
    for name, text in kv_cache_tester.dump(found):
        (tmp_path / f"{name}.json").write_bytes(text)
    few.unlink()
    trace = load([tmp_path])
    assert trace.problems.count == 0
    again = {session.id: session for session in trace.sessions}
    assert set(again) == {session.id for session in found}
    for session in found:
        assert chains(again[session.id]) == chains(session)
        for a, b in zip(again[session.id].turns, session.turns, strict=True):
            assert replace(a, at_s=b.at_s, shared=b.shared, fresh=b.fresh, back=b.back) == b
            assert a.at_s == pytest.approx(b.at_s)
