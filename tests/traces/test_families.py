"""Whose sub-agents are whose, and when sessions start."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gateway.analysis.timeline import timeline
from gateway.traces import kv_cache_tester, mooncake
from gateway.traces.families import SEATS, starts, tree
from gateway.traces.session import Session, Turn


def session(name: str, parent: str | None = None, **more: float) -> Session:
    return Session(name, [Turn(0.0, 64, 1, fresh=(0, 1), api_s=100.0)], parent=parent, **more)


def test_a_session_whose_parents_never_end_is_a_root() -> None:
    ring = [session("a", "b"), session("b", "a"), session("c", "b"), session("d", "d")]
    family = [session("e"), session("f", "e"), session("g", "f"), session("h", "missing")]
    assert tree([*ring, *family]) == {None: [0, 1, 2, 3, 4, 7], 4: [5], 5: [6]}
    assert tree([]) == {None: []}


@given(st.lists(st.none() | st.integers(0, 9), max_size=10))
def test_every_session_is_written_and_laid_out_whoever_its_parent_is(
    parents: Sequence[int | None],
) -> None:
    found = [
        session(f"s{n}", None if parent is None else f"s{parent}")
        for n, parent in enumerate(parents)
    ]
    written = [json.loads(text) for _, text in kv_cache_tester.dump(found)]
    read = [each for record in written for each in kv_cache_tester.sessions(record, "here")]
    assert len(read) == len(found)
    assert sorted(sent.session for sent in timeline(found).sent) == list(range(len(found)))
    assert len(list(mooncake.dump(found))) == len(found)


def test_sessions_start_when_they_did_or_when_a_seat_gets_free() -> None:
    recorded = session("r", started_at=1_000.0)
    late = session("l", "s0", start_s=300.0)
    later = session("m", "l", start_s=5.0)
    others = [session(f"s{n}") for n in range(SEATS + 2)]
    found = starts([recorded, late, later, *others])
    assert found[:3] == [1_000.0, 1_300.0, 1_305.0]
    assert found[3] == 1_000.0
    assert found[-2:] == [1_100.05, 1_100.1], "the first seat holds a sub-agent still"


def test_a_sub_agent_without_a_time_is_placed_by_its_parents() -> None:
    found = [session("a", started_at=50.0), session("b", "a", start_s=3.0),
             session("c", "b", start_s=4.0)]  # fmt: skip
    line = timeline(found)
    assert line.wall_clock
    assert [sent.at_s for sent in line.sent] == [0.0, 3.0, 7.0]
    assert not timeline([*found, session("d", "missing")]).wall_clock
