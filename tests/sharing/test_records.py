"""What stands in the store, and what replicas say: read as it was written, or not at all."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.dialects.turn import ToolCall
from gateway.prefix import advance, since, skeleton_of
from gateway.sessions import SessionStore, marks_of, sid_of
from gateway.sharing import news, records
from gateway.sharing.news import Left, News, PlaceTaken, Share
from tests.requests_made import answer, chat, outcome, result, system, user

SCOPE = 7
NOW, WALL = 1_000.0, 1_700_000_000.0


def served(store: SessionStore, named: bool = True) -> Any:
    headers = {b"x-session-id": b"s"} if named else {}
    turn = store.begin(headers, chat(system(), user("hi")), "t", SCOPE, NOW)
    call = ToolCall.of("call-1", "Bash", '{"run_in_background": true}')
    store.end(turn, outcome(call), NOW + 1)
    turn.session.pod = "pod-1"
    return turn.session


@pytest.mark.parametrize("named", [True, False])
def test_a_session_is_the_same_elsewhere(named: bool) -> None:
    before = served(SessionStore(10, 60), named)
    marks = tuple(records.digest(mark) for mark in marks_of(before))
    record = records.unpack(records.pack(before, marks, WALL - NOW))
    assert record.key == ("" if named else before.key)
    elsewhere = 5.0  # another machine's clock
    after = records.restore(
        record, before.key, sid_of(before.key), "t", SCOPE, elsewhere, WALL + 11
    )
    for name in (
        *("key", "sid", "scope", "source", "group", "parent", "client", "model", "affinity"),
        *("turns", "tool_calls", "idle_kind", "waiting_for", "has_tools", "pod", "usage"),
        *("tokens_per_byte", "answer_tokens", "request_class", "named"),
    ):
        assert getattr(after, name) == getattr(before, name), name
    assert after.idle_since == pytest.approx(elsewhere - 10)
    assert after.created_at == pytest.approx(elsewhere - 11)
    assert len(after.background) == 1
    assert after.elsewhere
    assert after.skeleton is not None
    again = records.restore(record, before.key, "sid", "t", SCOPE, elsewhere, WALL - 100)
    assert again.idle_since == elsewhere  # clocks differ: nothing is of the future


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_bytes_that_are_no_record_or_no_news_are_refused(data: bytes) -> None:
    with pytest.raises(records.RecordError):
        records.unpack(data)
    with pytest.raises(news.NewsError):
        news.unpack(data)


RECORD = list(
    msgspec.to_builtins(
        records.unpack(records.pack(served(SessionStore(10, 60)), (), 0.0)), enc_hook=bytes
    )
)


@given(
    st.integers(0, len(RECORD) - 1),
    st.none() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=3),
)
@settings(max_examples=300)
def test_a_record_with_one_odd_field_is_refused_or_makes_a_session(at: int, value: Any) -> None:
    fields = [*RECORD[:at], value, *RECORD[at + 1 :]]
    try:
        data = msgspec.msgpack.encode(fields)
    except (OverflowError, ValueError):
        return
    try:
        record = records.unpack(data)
    except records.RecordError:
        return
    session = records.restore(record, "7:s", "sid", "t", SCOPE, NOW, WALL)
    assert session.turns > 0
    assert session.idle_since is None or session.idle_since <= NOW
    SessionStore(10, 60).take_in(session)


def test_a_record_or_news_of_another_version_is_refused() -> None:
    with pytest.raises(records.RecordError, match="version 99"):
        records.unpack(msgspec.msgpack.encode([99, *RECORD[1:]]))
    with pytest.raises(news.NewsError, match="version 2"):
        news.unpack(news.pack(News(2, "me")))
    with pytest.raises(records.RecordError, match="too long"):
        records.unpack(bytes(records.MAX_RECORD_BYTES + 1))


def test_news_is_read_as_it_was_said() -> None:
    said = News(
        version=news.VERSION,
        replica="me",
        began=(("sid", 0.25),),
        left=(Left("sid", "pod", 10, 2, ((2**64 - 1, 5),), "tool", 3),),
        shares={"pod": Share(1, 2, 3, 4, 5.0, 6, 7)},
        held=8,
        whole=True,
        placed=(PlaceTaken("sid", "pod", 9),),
        dropped=("other",),
        leaves=True,
    )
    assert news.unpack(news.pack(said)) == said


# -- the skeleton of a prefix ---------------------------------------------------------------------


def history(turns: int) -> list[dict[str, Any]]:
    messages = [system(), user("hi")]
    for n in range(turns):
        messages += [answer("", f"c{n}"), result(f"c{n}", "x" * n)]
    return messages


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 81), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_skeleton_tells_what_the_whole_prefix_would_tell(
    before_turns: int, after_turns: int, broken_at: int, breaks: bool
) -> None:
    old = chat(*history(before_turns))
    messages = history(after_turns)
    if breaks and broken_at < len(messages):
        messages[broken_at] = user("something else")
    new = chat(*messages)
    before, _ = advance(None, old)
    _, whole = advance(before, new)
    prefix, _ = advance(None, new)
    known = since(skeleton_of(before), prefix)
    assert known.total_bytes == whole.total_bytes
    if whole.cause is None:
        assert (known.same, known.same_bytes, known.cause) == (whole.same, whole.same_bytes, None)
    else:
        assert known.cause is not None
        assert whole.same // 2 <= known.same <= whole.same
        assert known.lost_bytes >= whole.lost_bytes


def test_a_skeleton_is_small_and_of_one_model() -> None:
    prefix, _ = advance(None, chat(*history(2_000)))
    bones = skeleton_of(prefix)
    assert len(bones.joints) <= 26
    other = chat(*history(3))
    other.model = "another"
    changed = since(bones, advance(None, other)[0])
    assert (changed.same, changed.cause) == (0, "model")
    assert orjson.dumps(bones.joints)
