"""The order of held turns and the shares of tenants."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.holds import (
    AGE_WEIGHT,
    MAX_DEBT_S,
    Entry,
    HoldQueue,
    Priority,
    ShareClass,
    Shares,
    precedence,
    standing_s,
)

seconds = st.floats(0, 1e5)
standing = st.tuples(seconds, seconds, seconds, st.booleans(), seconds)


def key(
    additional_s: float = 0.0,
    debt_s: float = 0.0,
    arrived_at: float = 0.0,
    person_waits: bool = False,
    due_at: float = 1e9,
    now: float = 0.0,
) -> tuple[int, float]:
    return precedence(additional_s, debt_s, arrived_at, person_waits, due_at, now)


def test_least_additional_prefill_goes_first() -> None:
    assert key(additional_s=1) < key(additional_s=5)


def test_waiting_makes_up_for_prefill() -> None:
    assert key(additional_s=5) < key(additional_s=1, arrived_at=4.1 / AGE_WEIGHT)


def test_a_person_goes_before_a_tool_loop() -> None:
    assert key(additional_s=1.5, person_waits=True) < key()


def test_a_class_beyond_its_share_goes_later() -> None:
    assert key(additional_s=5) < key(additional_s=1, debt_s=10)


@given(standing, standing, seconds)
def test_what_is_due_goes_before_all_that_is_not_the_longest_due_ahead(
    a: tuple[float, float, float, bool, float],
    b: tuple[float, float, float, bool, float],
    now: float,
) -> None:
    if a[4] <= now < b[4] or a[4] < b[4] <= now:
        assert precedence(*a, now) < precedence(*b, now)


@dataclass(eq=False)
class Turn:
    number: int
    additional_s: dict[str, float]
    arrived_at: float
    share: ShareClass
    due_from: float
    entries: tuple[Entry, ...] = ()


POD, OTHER = "pod", "other"
turns = st.builds(
    lambda home, here, elsewhere, arrived_at, tenant, due_from: (
        home,
        Turn(
            0,
            {"home": here, "away": here + elsewhere},
            arrived_at,
            (tenant, "interactive"),
            due_from,
        ),
    ),
    st.sampled_from([POD, OTHER, None]),
    seconds,
    seconds,
    seconds,
    st.sampled_from("ab"),
    seconds,
)


@given(
    st.lists(turns, max_size=20),
    st.dictionaries(st.sampled_from("ab"), seconds),
    seconds,
    st.data(),
)
def test_the_queue_keeps_the_order_of_the_rule(
    made: list[tuple[str | None, Turn]], debts: dict[str, float], now: float, data: st.DataObject
) -> None:
    queue: HoldQueue[Turn] = HoldQueue()
    owed = {(tenant, "interactive"): debt_s for tenant, debt_s in debts.items()}
    keys: dict[int, tuple[int, float]] = {}
    for number, (home, turn) in enumerate(made):
        turn.number = number
        home_s = standing_s(turn.additional_s["home"], turn.arrived_at, False)
        away_s = standing_s(turn.additional_s["away"], turn.arrived_at, False)
        queue.add(turn, turn.share, home, home_s, away_s, 1)
        additional_s = turn.additional_s["home" if home == POD else "away"]
        debt_s = owed.get(turn.share, 0.0)
        keys[number] = precedence(additional_s, debt_s, turn.arrived_at, False, inf, now)
    for _, turn in made:
        if data.draw(st.booleans()):
            queue.remove(turn)
            del keys[turn.number]
    for _ in range(2):  # looking changes nothing
        due = [turn.due_from for turn in queue.due(now)]
        assert due == sorted(t.due_from for t in queue if t.due_from <= now)
        order = [keys[turn.number] for turn in queue.next(POD, owed, now)]
        assert len(order) == len(queue) == len(keys)
        assert all(a <= b or a[1] == pytest.approx(b[1]) for a, b in pairwise(order))


def test_turns_taken_while_looking_are_gone() -> None:
    queue: HoldQueue[Turn] = HoldQueue()
    made = [Turn(i, {}, 0.0, ("a", "interactive"), 1e9) for i in range(4)]
    for turn in made:
        queue.add(turn, turn.share, POD, turn.number, turn.number, 1)
    for turn in queue.next(POD, {}, 0.0):
        queue.remove(turn)
        if turn.number == 1:
            break
    assert list(queue.next(POD, {}, 0.0)) == made[2:]


def test_the_least_need_is_known() -> None:
    queue: HoldQueue[Turn] = HoldQueue()
    made = [Turn(i, {}, 0.0, ("a", "interactive"), 1e9) for i in range(3)]
    for turn in made:
        queue.add(turn, turn.share, None, 0.0, 0.0, 10 + turn.number)
    queue.remove(made[0])
    assert queue.least_tokens == 11


def test_void_entries_do_not_pile_up() -> None:
    queue: HoldQueue[Turn] = HoldQueue()
    kept = Turn(0, {}, 0.0, ("a", "interactive"), 1e9)
    queue.add(kept, kept.share, POD, 0.0, 0.0, 1)
    for number in range(1, 5_000):
        turn = Turn(number, {}, 0.0, ("a", "interactive"), 1e9)
        queue.add(turn, turn.share, POD, 1.0, 1.0, 1)
        queue.remove(turn)
    assert queue._entries < 100
    assert list(queue.next(POD, {}, 0.0)) == [kept]


A: tuple[str, Priority] = ("a", "interactive")
B: tuple[str, Priority] = ("b", "interactive")


def test_service_makes_debt_by_weight_while_someone_waits() -> None:
    shares = Shares()
    shares.charge(A, 10, 1)
    shares.waits(A)
    shares.waits(B)
    assert shares.debts() == {A: 0, B: 0}
    shares.charge(A, 10, 1)
    shares.charge(B, 10, 4)
    assert shares.debts() == {A: 7.5, B: 0}


def test_nobody_saves_up_while_others_wait() -> None:
    shares = Shares()
    shares.waits(A)
    shares.charge(A, 100, 1)
    shares.waits(B)
    assert shares.debts() == {A: 0, B: 0}


def test_all_is_settled_when_nobody_waits() -> None:
    shares = Shares()
    shares.waits(A)
    shares.waits(B)
    shares.charge(A, 1e9, 1)
    assert shares.debts()[A] == MAX_DEBT_S
    shares.waits_no_more(A)
    shares.waits_no_more(B)
    shares.waits(A)
    shares.waits(B)
    assert shares.debts() == {A: 0, B: 0}


def test_turns_are_found_again_though_they_are_put_anew_while_one_looks() -> None:
    queue: HoldQueue[Turn] = HoldQueue()
    for number, tenant in enumerate("ab"):
        turn = Turn(number, {}, 0.0, (tenant, "interactive"), 1e9)
        queue.add(turn, turn.share, None, 0.0, 0.0, 1)
    for turn in queue.next(POD, {}, 0.0):
        for _ in range(100 * turn.number):  # so often that what is void is swept away
            queue.add(turn, turn.share, None, 0.0, 0.0, 1)
    assert len(list(queue.next(POD, {}, 0.0))) == 2
