"""What the gateway believes to be in a pod's cache."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.fleet import residency as residency_module
from gateway.fleet.residency import MAX_HEADS, Residency

HEADS = [(3, 300), (2, 200), (1, 100)]


def test_a_chain_served_is_resident_with_all_its_tokens() -> None:
    residency = Residency(1_000)
    residency.touch("a", 400, [])
    residency.touch("a", 450, [])
    assert (residency.tokens("a"), residency.total_tokens, len(residency)) == (450, 450, 1)
    assert residency.tokens("b") == 0


def test_the_oldest_chain_loses_its_tail_first() -> None:
    residency = Residency(1_000)
    residency.touch("a", 600, [])
    residency.touch("b", 300, [])
    residency.touch("c", 200, [])
    assert [residency.tokens(sid) for sid in "abc"] == [500, 300, 200]
    residency.touch("d", 700, [])
    assert [residency.tokens(sid) for sid in "abcd"] == [0, 100, 200, 700]


def test_a_chain_beyond_the_capacity_keeps_what_fits() -> None:
    residency = Residency(1_000)
    residency.touch("a", 5_000, [])
    assert residency.tokens("a") == residency.total_tokens == 1_000


def test_with_unknown_capacity_nothing_is_lost_but_the_number_of_chains_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residency_module, "MAX_CHAINS", 50)
    residency = Residency()
    for number in range(80):
        residency.touch(str(number), 10**6, [])
    assert len(residency) == 50
    assert residency.total_tokens == 50 * 10**6
    assert residency.tokens("29") == 0
    assert residency.tokens("30") == 10**6
    residency.set_capacity(1_000)
    assert residency.total_tokens == 1_000


def test_a_beginning_is_shared_as_far_as_its_owner_is_resident() -> None:
    residency = Residency(1_000)
    residency.touch("a", 900, HEADS)
    assert residency.shared_tokens(HEADS) == 300
    assert residency.shared_tokens(HEADS[1:]) == 200
    assert residency.shared_tokens([(9, 500), *HEADS[2:]]) == 100
    assert residency.shared_tokens([]) == 0
    residency.touch("b", 850, [])  # cuts a's tail, then its beginning
    assert residency.tokens("a") == 150
    assert residency.shared_tokens(HEADS) == 150
    residency.drop("a")
    assert residency.shared_tokens(HEADS) == 0


def test_the_latest_owner_of_a_beginning_is_asked() -> None:
    residency = Residency(1_000)
    residency.touch("a", 400, HEADS)
    residency.touch("b", 500, HEADS)
    residency.touch("c", 400, [])
    assert residency.tokens("a") == 100
    assert residency.shared_tokens(HEADS) == 300  # b's


def test_the_number_of_shared_beginnings_is_bounded() -> None:
    residency = Residency()
    for number in range(MAX_HEADS + 100):
        residency.touch("a", 10, [(number, 10)])
    assert len(residency._heads) == MAX_HEADS
    assert residency.shared_tokens([(0, 10)]) == 0
    assert residency.shared_tokens([(MAX_HEADS, 10)]) == 10


def test_a_restart_empties_it() -> None:
    residency = Residency(1_000)
    residency.touch("a", 400, HEADS)
    residency.clear()
    assert (len(residency), residency.total_tokens, residency.tokens("a")) == (0, 0, 0)
    assert residency.shared_tokens(HEADS) == 0
    assert residency.capacity_tokens == 1_000


def test_a_pod_that_held_less_than_believed_is_trusted_with_less() -> None:
    residency = Residency(1_000)
    for _ in range(10):
        residency.learn(1_000, 0)
    assert residency.usable_share == pytest.approx(0.97**10)
    residency.touch("a", 1_000, [])
    assert residency.total_tokens == int(1_000 * residency.usable_share)
    for _ in range(200):
        residency.learn(1_000, 100)
    assert residency.usable_share == pytest.approx(0.3)
    for _ in range(200):
        residency.learn(1_000, 950)
    assert residency.usable_share == 1.0


def test_where_nothing_was_expected_nothing_is_learned() -> None:
    residency = Residency(1_000)
    residency.learn(0, 0)
    residency.learn(-5, 0)
    assert residency.usable_share == 1.0


steps = st.one_of(
    st.tuples(st.just("touch"), st.sampled_from("abcdef"), st.integers(1, 14)),
    st.tuples(st.just("drop"), st.sampled_from("abcdef"), st.just(0)),
    st.tuples(st.just("capacity"), st.just(""), st.integers(0, 30)),
    st.tuples(st.just("clear"), st.just(""), st.just(0)),
)


@given(st.lists(steps, max_size=40))
@settings(max_examples=200, deadline=None)
def test_it_is_an_lru_of_tokens(walk: list[tuple[str, str, int]]) -> None:
    """Against the slow and obvious model: one token at a time leaves the oldest chain."""
    residency = Residency(20)
    model: OrderedDict[str, int] = OrderedDict()
    capacity = 20
    for step, sid, number in walk:
        match step:
            case "touch":
                residency.touch(sid, number, [])
                model.pop(sid, None)
                model[sid] = number
            case "drop":
                residency.drop(sid)
                model.pop(sid, None)
            case "capacity":
                capacity = number
                residency.set_capacity(number)
            case "clear":
                residency.clear()
                model.clear()
        while sum(model.values()) > capacity:
            oldest = next(iter(model))
            model[oldest] -= 1
            if not model[oldest]:
                del model[oldest]
        assert {sid: residency.tokens(sid) for sid in "abcdef" if residency.tokens(sid)} == model
        assert residency.total_tokens == sum(model.values()) <= capacity
        assert len(residency) == len(model)
