from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from engine_patch.order import MAX_WAIT_S, WaitingOrder


@dataclass
class Waiter:
    request_id: str
    missing: int
    evictions: int = 0
    counted: int = 0


def arrange(order: WaitingOrder, waiting: list[Waiter], now: float) -> list[Waiter]:
    def missing(waiter: Waiter) -> int:
        waiter.counted += 1
        return waiter.missing

    order.arrange(waiting, now, missing, lambda w: w.evictions)
    return waiting


def test_fewest_missing_blocks_go_first_and_preempted_before_all() -> None:
    order = WaitingOrder()
    waiting = [Waiter("a", 9), Waiter("b", 1), Waiter("c", 5), Waiter("d", 99)]
    for waiter in waiting:
        order.arrived(waiter.request_id, 0.0)
    order.admitted(["d"], 0.0)
    assert [w.request_id for w in arrange(order, waiting, 0.0)] == ["d", "b", "c", "a"]


def test_blocks_are_counted_again_only_after_an_eviction_or_five_seconds() -> None:
    order, waiter = WaitingOrder(), Waiter("a", 9)
    order.arrived("a", 0.0)
    for now in (0.0, 0.1, 0.2):
        arrange(order, [waiter], now)
    assert waiter.counted == 1
    waiter.evictions += 1
    arrange(order, [waiter], 1.0)
    assert waiter.counted == 2
    arrange(order, [waiter], 6.0)
    assert waiter.counted == 3


def test_waiting_behind_older_requests_is_not_overtaking() -> None:
    order = WaitingOrder()
    for i, name in enumerate("abc"):
        order.arrived(name, float(i))
    order.admitted(["a"], 3.0)
    order.admitted(["b"], 500.0)
    order.admitted(["c"], 1_000.0)
    assert (order.overtakes, order.longest_wait_s) == (0, 0.0)


@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0.1, 5)), min_size=20, max_size=80))
def test_none_waits_longer_than_the_bound_behind_younger_ones(
    arrivals: list[tuple[int, float]],
) -> None:
    """One server; the request that misses most would starve without the bound."""
    order = WaitingOrder()
    now = 0.0
    old = Waiter("old", 1_000)
    waiting = [old]
    order.arrived("old", now)
    behind_s = 0.0
    for i, (missing, service_s) in enumerate(arrivals * 3):
        waiter = Waiter(f"w{i}", missing)
        waiting.append(waiter)
        order.arrived(waiter.request_id, now + 0.01)
        now += 0.02
        waiting = arrange(order, waiting, now)
        first = waiting.pop(0)
        order.admitted([first.request_id], now)
        if first is old:
            break
        now += service_s
        behind_s += service_s + 0.02
    assert behind_s <= MAX_WAIT_S + 5.1
    assert order.longest_wait_s <= MAX_WAIT_S + 5.1


def test_nothing_is_kept_of_who_left() -> None:
    order = WaitingOrder()
    for name in "abc":
        order.arrived(name, 0.0)
    order.left("a")
    order.admitted(["b", "c", "unknown"], 1.0)
    assert len(order) == 0
