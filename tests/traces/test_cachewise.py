"""The gateway's own format: what is written is what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.traces import cachewise
from gateway.traces.lines import TraceError
from gateway.traces.load import load
from gateway.traces.session import Call, Session, Turn
from tests.traces.sessions import NEEDS_SHARED, chains, few_real, sessions

TIMES = st.floats(0, 1e9, allow_nan=False)
WORDS = st.sampled_from(["", "shell", "Bash", "go", "test", "*", "mcp__a__b"])
CALLS = st.builds(
    Call, WORDS, WORDS, WORDS, WORDS, st.none() | TIMES, st.booleans(), st.none() | WORDS
)


def read(lines: list[bytes]) -> list[Session]:
    reader = cachewise.Reader()
    reader.begin()
    for line in lines:
        reader.feed(Path("f"), json.loads(line))
    return reader.sessions()


@st.composite
def any_sessions(draw: st.DrawFn) -> list[Session]:
    """Sessions in which every field may have any value that is allowed for it."""
    found = draw(sessions(shared=draw(st.booleans())))
    first = draw(st.sampled_from([0, -(1 << 63), (1 << 63) - (1 << 23)]))
    for number, session in enumerate(found):
        session.started_at = draw(st.none() | TIMES)
        session.start_s = draw(TIMES)
        session.client = draw(st.sampled_from(["", "codex"]))
        session.parent = draw(st.sampled_from([None, *(s.id for s in found[:number])]))
        session.agent_type = draw(st.sampled_from(["", "Explore"]))
        session.block_tokens = draw(st.sampled_from([64, 512]))
        session.tool_tokens, session.system_tokens = draw(st.integers(0, 9)), 7
        session.turns = [
            Turn(
                turn.at_s,
                turn.prompt_tokens,
                turn.output_tokens,
                turn.shared,
                tuple(n if i % 2 else n + first for i, n in enumerate(turn.fresh)),
                turn.back,
                draw(TIMES),
                draw(st.booleans()),
                draw(st.none() | TIMES),
                draw(st.none() | TIMES),
                draw(st.sampled_from(["tool", "human", "background", "ended"])),
                draw(st.sampled_from([None, "", "tool_use", "end_turn"])),
                draw(st.none() | st.integers(0, 10**6)),
                draw(st.sampled_from(["", "m"])),
                draw(st.booleans()),
                tuple(draw(st.lists(CALLS, max_size=2))),
            )
            for turn in session.turns
        ]
    return found


@settings(max_examples=100)
@given(any_sessions())
def test_all_of_a_session_comes_back(found: list[Session]) -> None:
    assert read(list(cachewise.dump(found))) == found


def line(**more: Any) -> bytes:
    return json.dumps({"cachewise": 1, **more}).encode()


def session(**more: Any) -> bytes:
    told = {"type": "session", "session": "s", "started_at": 100.0, "block_bytes": 256}
    return line(**told | more)


def turn(n: int, **more: Any) -> bytes:
    told = {"type": "turn", "session": "s", "n": n, "at_s": 10.0 * n, "prompt_tokens": 128}
    return line(**told | more)


def test_a_prompt_told_by_bytes_has_the_blocks_that_its_tokens_fill() -> None:
    """Twice as many tokens a byte as expected, then more in what is added."""
    (found,) = read(
        [
            session(),
            turn(0, prompt_tokens=1000, fresh=[1000, 6, 2000, 2]),
            turn(1, prompt_tokens=3000, shared=7, fresh=[3000, 8]),
        ]
    )
    first, second = chains(found)
    assert [len(first), len(second)] == [16, 47]
    assert first == [*range(1000, 1011), *range(2000, 2005)]
    assert second[:15] == first[:15], "the last block of the first was not full"
    assert second[15:] == list(range(3000, 3032))
    assert (found.turns[1].shared, found.block_tokens) == (15, 64)


def test_sessions_that_begin_alike_have_their_beginning_in_common_whatever_follows() -> None:
    one, two = read(
        [
            session(scope="all"),
            turn(0, prompt_tokens=6400, fresh=[1, 60, 500, 40]),
            session(scope="all", session="t"),
            turn(0, session="t", prompt_tokens=9000, fresh=[1, 60, 900, 40]),
        ]
    )
    (a,), (b,) = chains(one), chains(two)
    assert a[:60] == b[:60] == list(range(1, 61))
    assert len(b) == 141
    assert set(a) & set(b) == set(range(1, 61))


def test_a_session_spread_over_files_is_put_together_in_order_of_time() -> None:
    reader = cachewise.Reader()
    files = [
        [session(), turn(0, prompt_tokens=640, fresh=[1, 10]),
         turn(1, prompt_tokens=960, shared=10, fresh=[50, 5], at_s=30.0, number=3)],
        [session(started_at=90.0), turn(0, prompt_tokens=768, fresh=[1, 10, 40, 2], at_s=25.0)],
        [session(), turn(0, prompt_tokens=1280, fresh=[1, 10, 50, 5, 70, 5], at_s=40.0)],
    ]  # fmt: skip
    for file in files:
        reader.begin()
        for each in file:
            reader.feed(Path("f"), json.loads(each))
    (found,) = reader.sessions()
    assert [t.at_s for t in found.turns] == [0.0, 15.0, 30.0, 40.0]
    assert [t.shared for t in found.turns] == [0, 10, 10, 15]
    assert chains(found)[2] == [*range(1, 11), *range(50, 55)]


def test_what_the_next_turn_tells_is_added_to_the_one_before() -> None:
    calls = [{"kind": "shell", "tool": "Bash"}, {"kind": "read", "tool": "Read"}]
    (found,) = read(
        [
            session(),
            turn(0, number=1, idle_kind="tool", calls=calls, fresh=[1, 2]),
            turn(1, number=2, shared=2, gap_kind="human", call_durations_s=[1.5, None]),
            turn(2, number=4, shared=2, gap_kind="background"),
        ]
    )
    assert [t.idle_kind for t in found.turns] == ["human", "human", "human"]
    assert [call.duration_s for call in found.turns[0].calls] == [1.5, None]


def test_turns_that_failed_are_no_turns_but_what_follows_may_build_on_them() -> None:
    (found,) = read(
        [
            session(),
            turn(0, fresh=[1, 2], outcome="client_gone"),
            turn(1, shared=2, prompt_tokens=256, fresh=[9, 2]),
        ]
    )
    assert chains(found) == [[1, 2, 9, 10]]


def test_a_record_whose_base_is_missing_is_a_problem_until_the_session_is_told_anew(
    tmp_path: Path,
) -> None:
    lines = [
        session(),
        turn(0, fresh=[1, 2]),
        turn(2, shared=2),
        turn(3, shared=2),
        session(),
        turn(0, fresh=[1, 2], at_s=50.0),
        turn(1, shared=3),
        turn(1, fresh=[1]),
        turn(7, session="unknown"),
    ]
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join(lines))
    trace = load([path])
    (found,) = trace.sessions
    assert [t.at_s for t in found.turns] == [0.0, 50.0]
    assert trace.problems.count == 5
    assert trace.formats == {"cachewise": 1}


def test_a_newer_schema_is_refused_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(session().replace(b'"cachewise": 1', b'"cachewise": 2'))
    with pytest.raises(TraceError, match=r"t\.jsonl: recorded in schema 2 .* reads schema 1"):
        load([path])


def test_fields_added_later_do_not_disturb() -> None:
    (found,) = read([session(weather="fine"), turn(0, fresh=[1, 2], mood="good")])
    assert len(found.turns) == 1


JUNK = (
    st.none()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "s", "x"])
    | st.lists(st.integers())
)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([session(), turn(0, fresh=[1, 2]), turn(1, shared=2)]),
            st.dictionaries(
                st.sampled_from([*cachewise.TurnRecord.__struct_fields__, "type"]),
                JUNK,
                max_size=2,
            ),
        ),
        max_size=6,
    )
)
def test_no_record_is_fatal(
    tmp_path_factory: pytest.TempPathFactory, told: list[tuple[bytes, dict[str, Any]]]
) -> None:
    path = tmp_path_factory.mktemp("junk") / "t.jsonl"
    records = [json.loads(line) | junk for line, junk in told]
    path.write_text("\n".join(json.dumps(r) for r in records if r["cachewise"] in (1, None)))
    for found in load([path]).sessions:
        assert len(list(found.chains())) == len(found.turns)


PAGE = Path(__file__).parents[2] / "docs" / "recording.md"


@pytest.mark.parametrize(
    "struct",
    [
        cachewise.SessionRecord,
        cachewise.TurnRecord,
        cachewise.CallRecord,
        cachewise.ForecastRecord,
    ],
    ids=lambda struct: struct.__name__,
)
def test_every_field_of_the_contract_is_on_its_page(struct: type[msgspec.Struct]) -> None:
    page = PAGE.read_text()
    assert f"## Schema {cachewise.SCHEMA}\n" in page
    for name in struct.__struct_fields__:
        assert f"`{name}`" in page


def test_the_contract_of_schema_1_is_what_it_was() -> None:
    """A recording of the first version of schema 1 is read as it was then: this file is not to be
    written anew, a change that breaks it is another schema."""
    trace = load([Path(__file__).parents[1] / "data" / "recording-1.jsonl"])
    assert trace.problems.count == 0
    (child, parent) = sorted(trace.sessions, key=lambda s: s.parent is None)
    assert child.parent == parent.id
    first, second = parent.turns
    assert (first.prompt_tokens, first.cached_tokens, first.output_tokens) == (6400, 0, 52)
    assert (first.idle_kind, first.stop, first.api_s, first.first_token_s) == (
        "tool",
        "tool_use",
        1.75,
        0.5,
    )
    assert first.calls == (Call("shell", "Bash", "pytest", duration_s=2.25),)
    assert (second.at_s, second.gap_s, second.shared, second.fresh_blocks) == (4.25, 2.5, 100, 25)
    assert parent.started_at == 1_795_975_065.5


@NEEDS_SHARED
def test_the_real_sessions_survive_an_export(tmp_path: Path) -> None:
    found = load([few_real(tmp_path)]).sessions
    assert any(session.parent for session in found)
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"".join(cachewise.dump(found)))
    trace = load([out])
    assert trace.problems.count == 0
    assert trace.sessions == found
