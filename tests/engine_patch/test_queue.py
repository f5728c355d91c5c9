from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine_patch.forecast import Forecast
from engine_patch.queue import ReuseAwareFreeQueue
from engine_patch.regret import EvictionLedger
from engine_patch.sessions import MAX_LAPSE_S, Retention, SessionTable
from tests.engine_patch.pool import PlainBlock, Pool, check_no_owners, check_owners

SOON = Forecast(((2.0, 1.0), (2.1, 0.0)), 1.0)
LATE = Forecast(((500.0, 1.0), (501.0, 0.0)), 1.0)
NEVER = Forecast(((1.0, 1.0),), 0.0)


class Pod:
    """A pool, its queue and its sessions, driven as the scheduler drives them."""

    def __init__(self, num_blocks: int, max_sessions: int = 100) -> None:
        blocks = [PlainBlock(i) for i in range(num_blocks)]
        self.ledger = EvictionLedger(num_blocks, 16)
        self.queue = ReuseAwareFreeQueue(list(blocks), tokens_per_block=16, ledger=self.ledger)
        self.sessions = SessionTable(self.queue, max_sessions)
        self.pool = Pool(self.queue, num_blocks)
        self.blocks = blocks
        self.now = 1_000.0
        self.queue.now = self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.queue.now = self.now

    def begin(self, session: str | None, names: list[Any]) -> list[Any] | None:
        if session is not None:
            self.sessions.turn_arrived(session, self.now)
        return self.pool.start(names)

    def end(self, session: str | None, blocks: list[Any]) -> None:
        if session is not None:
            self.sessions.blocks_freed(session, blocks, self.now)
        self.pool.stop(blocks)
        if session is not None:
            self.sessions.turn_finished(session, self.now)

    def turn(self, session: str | None, names: list[Any]) -> None:
        blocks = self.begin(session, names)
        assert blocks is not None
        self.end(session, blocks)

    def hint(self, session: str, forecast: Forecast, kind: Any = "tool") -> None:
        self.sessions.forecast(session, kind, forecast, 0.0, self.now)


def chain(name: str, n: int, shared: int = 0) -> list[str]:
    return [f"sys{i}" if i < shared else f"{name}{i}" for i in range(n)]


def test_the_session_that_returns_later_goes_first() -> None:
    pod = Pod(20)
    pod.turn("late", chain("late", 8))
    pod.wait(1)
    pod.turn("soon", chain("soon", 8))
    pod.hint("late", LATE)
    pod.hint("soon", SOON)
    pod.turn(None, chain("x", 10))
    assert all(name.startswith("late") for name in pod.pool.evicted)
    pod2 = Pod(20)
    pod2.turn("soon", chain("soon", 8))  # now the order of use is the other way round
    pod2.wait(1)
    pod2.turn("late", chain("late", 8))
    pod2.hint("late", LATE)
    pod2.hint("soon", SOON)
    pod2.turn(None, chain("x", 10))
    assert pod2.pool.evicted == [f"late{i}" for i in (7, 6, 5, 4, 3, 2)]
    assert pod2.queue.evictions["forecast"] == 6


def test_a_session_leaves_tail_first() -> None:
    pod = Pod(10)
    pod.turn("a", chain("a", 8))
    pod.hint("a", LATE)
    pod.turn(None, chain("x", 6))
    assert pod.pool.evicted == ["a7", "a6", "a5", "a4"]


def test_a_session_with_an_open_turn_goes_last() -> None:
    pod = Pod(20)
    pod.turn("waiting", chain("w", 8))
    pod.wait(50)
    pod.turn("soon", chain("s", 8))
    for name in ("waiting", "soon"):
        pod.hint(name, SOON)
    pod.sessions.turn_arrived("waiting", pod.now)
    pod.turn(None, chain("x", 12))
    assert all(name.startswith("s") for name in pod.pool.evicted)


def test_an_ended_session_goes_before_all_others() -> None:
    pod = Pod(20)
    pod.turn("old", chain("o", 8))
    pod.wait(500)
    pod.turn("ended", chain("e", 8))
    pod.hint("ended", NEVER, "ended")
    pod.turn(None, chain("x", 12))
    assert pod.queue.evictions["ended"] == 8
    assert all(name.startswith("e") for name in pod.pool.evicted)


def test_a_shared_prefix_counts_for_the_owner_that_returns_soonest() -> None:
    pod = Pod(24)
    pod.turn("late", chain("l", 10, shared=4))
    pod.turn("soon", chain("s", 10, shared=4))
    pod.hint("late", LATE)
    pod.hint("soon", SOON)
    pod.turn(None, chain("x", 14))
    assert set(pod.pool.evicted) == {f"l{i}" for i in range(4, 10)}


def test_a_prefix_that_only_ended_sessions_shared_is_kept_by_its_age() -> None:
    pod = Pod(24)
    pod.turn("old", chain("o", 4))
    pod.wait(100)
    for name in ("p", "q"):
        pod.turn(name, chain(name, 8, shared=4))
        pod.hint(name, NEVER, "ended")
    pod.turn(None, chain("x", 12 + 4))
    assert not any(name.startswith("sys") for name in pod.pool.evicted)


def test_at_equal_reuse_time_the_cheaper_tokens_go_first() -> None:
    pod = Pod(4_000)
    for name, n in (("long", 3_000), ("short", 500)):
        pod.turn(name, chain(name, n))
        pod.hint(name, LATE)
    pod.turn(None, chain("x", 600))
    assert all(name.startswith("short") for name in pod.pool.evicted)


def test_anonymous_blocks_and_forecasts_meet_on_one_scale() -> None:
    pod = Pod(30)
    pod.turn(None, chain("old", 8))
    pod.wait(100)
    pod.turn("s", chain("s", 8))
    pod.hint("s", Forecast(((20.0, 1.0), (20.1, 0.0)), 1.0))
    pod.turn(None, chain("young", 8))
    pod.wait(5)
    pod.turn(None, chain("x", 6 + 8 + 4))
    assert pod.pool.evicted[:8] == [f"old{i}" for i in range(7, -1, -1)]
    assert all(name.startswith("s") is False for name in pod.pool.evicted[:8])
    assert len(pod.pool.evicted) == 12


def test_a_forecast_lapses_by_itself() -> None:
    pod = Pod(20)
    pod.turn("a", chain("a", 8))
    pod.hint("a", SOON)
    pod.wait(MAX_LAPSE_S)
    pod.turn(None, chain("y", 8))
    pod.turn(None, chain("x", 8))
    assert pod.queue.evictions == {"lru": 4, "forecast": 0, "ended": 0, "superseded": 0}


def test_edited_history_is_superseded() -> None:
    pod = Pod(30)
    pod.turn("other", chain("o", 4))
    pod.turn("a", chain("a", 12))
    pod.hint("a", SOON)
    pod.wait(1)
    pod.turn("a", [*chain("a", 4), *chain("b", 4)])
    pod.hint("a", SOON)
    pod.turn(None, chain("x", 18))
    assert set(pod.pool.evicted) == {f"a{i}" for i in range(4, 12)}
    assert pod.queue.evictions["superseded"] == 8


def test_a_side_request_under_the_same_id_supersedes_nothing() -> None:
    pod = Pod(30)
    pod.turn("a", chain("main", 10))
    pod.hint("a", SOON)
    pod.turn("a", chain("title", 3))
    pod.hint("a", Forecast(((20.0, 1.0), (20.1, 0.0)), 1.0))
    pod.turn(None, chain("x", 10))
    pod.wait(15)
    pod.turn(None, chain("y", 10))
    assert pod.queue.evictions["superseded"] == 0
    assert not any(name.startswith("main") for name in pod.pool.evicted)


def test_superseded_blocks_that_are_asked_for_again_are_kept_again() -> None:
    pod = Pod(30)
    pod.turn("a", chain("a", 8))
    pod.hint("a", SOON)
    pod.turn("a", [*chain("a", 4), "b"])
    pod.hint("a", SOON)
    pod.turn("a", chain("a", 8))
    pod.hint("a", SOON)
    pod.turn(None, chain("x", 25))
    assert "b" in pod.pool.evicted
    assert pod.queue.evictions["superseded"] == 1


def test_an_older_copy_that_a_turn_hits_is_kept_though_the_turns_end_is_known() -> None:
    """A hole in a chain makes copies of what follows it; the next turn hits the older ones, which
    were set aside, in front of a block that the session owns already."""
    pod = Pod(31)
    names = chain("a", 8)
    blocks = pod.begin("a", names)
    assert blocks is not None
    pod.end("a", blocks)
    pod.hint("a", SOON)
    pod.pool.drop_hash(blocks[3])
    pod.turn("a", names)
    pod.hint("a", SOON)
    pod.pool.cached |= dict(zip(names[4:7], blocks[4:7], strict=True))
    pod.turn("a", names)
    pod.hint("a", SOON)
    pod.turn(None, chain("x", 23))
    assert pod.queue.evictions["superseded"] == 4
    assert [block.block_hash for block in blocks[4:7]] == names[4:7]


def test_a_retention_protects_and_a_release_gives_up() -> None:
    pod = Pod(20)
    pod.turn("kept", chain("k", 6))
    pod.wait(200)
    pod.turn("given", chain("g", 6))
    pod.sessions.retain("kept", (Retention(0, None, 100, pod.now + 60),), pod.now)
    pod.sessions.retain("given", (Retention(32, None, 0, pod.now + 60),), pod.now)
    pod.turn(None, chain("x", 12))
    assert pod.pool.evicted == ["g5", "g4", "g3", "g2"]
    assert pod.queue.evictions["ended"] == 4


def test_a_retention_lapses() -> None:
    pod = Pod(20)
    pod.turn("kept", chain("k", 6))
    pod.sessions.retain("kept", (Retention(0, None, 100, pod.now + 60),), pod.now)
    pod.wait(61)
    pod.turn(None, chain("y", 6))
    pod.turn(None, chain("x", 10))
    assert pod.pool.evicted[:2] == ["k5", "k4"]


def test_a_hint_about_a_gap_that_a_new_turn_has_closed_is_refused() -> None:
    pod = Pod(10)
    pod.turn("a", chain("a", 2))
    pod.wait(3)
    pod.sessions.turn_arrived("a", pod.now)
    pod.wait(1)
    assert pod.sessions.forecast("a", "tool", SOON, elapsed_s=4.0, now=pod.now)
    assert pod.sessions.forecast("a", "tool", SOON, elapsed_s=0.5, now=pod.now) is None


def test_the_oldest_sessions_are_forgotten_beyond_the_limit() -> None:
    pod = Pod(100, max_sessions=4)
    for i in range(20):
        pod.turn(f"s{i}", chain(f"s{i}-", 3))
        pod.hint(f"s{i}", SOON)
    assert len(pod.sessions) == 4
    pod.turn(None, chain("x", 60))
    assert not any(b.startswith(("s16", "s17", "s18", "s19")) for b in pod.pool.evicted)


def test_regret_counts_evicted_tokens_that_come_back() -> None:
    pod = Pod(10)
    pod.turn("a", chain("a", 8))
    pod.turn(None, chain("x", 6))
    pod.wait(100)
    pod.ledger.asked(chain("a", 8), pod.now)
    assert pod.ledger.tokens == {60: 0, 600: 4 * 16}


def test_taking_from_an_empty_queue_is_an_error() -> None:
    queue = ReuseAwareFreeQueue([PlainBlock(0)])
    block = queue.popleft()
    with pytest.raises(ValueError, match="No free blocks"):
        queue.popleft()
    with pytest.raises(RuntimeError, match="invalid block"):
        queue.remove(block)


sessions = st.sampled_from([None, "a", "b", "c", "d"])
hinted = st.sampled_from(["a", "b", "c", "d"])


class Accounting(RuleBasedStateMachine):
    """Random sessions, hints, forks, aborts and resets on a small pool, checked at every step."""

    @initialize(num_blocks=st.integers(4, 40), max_sessions=st.integers(1, 5))
    def start(self, num_blocks: int, max_sessions: int) -> None:
        self.pod = Pod(num_blocks, max_sessions)
        self.running: list[tuple[str | None, list[Any]]] = []

    @rule(session=sessions, length=st.integers(1, 10), fork=st.integers(0, 10), tail=st.booleans())
    def begin(self, session: str | None, length: int, fork: int, tail: bool) -> None:
        names: list[Any] = [f"sys{i}" if i < 2 else f"{session}{i}" for i in range(length)]
        names[fork:] = [f"{session}-{fork}-{i}" for i in range(fork, length)]
        if tail:
            names.append(None)
        blocks = self.pod.begin(session, names)
        if blocks is None:
            if session is not None:
                self.pod.sessions.turn_finished(session, self.pod.now)  # aborted while waiting
        else:
            self.running.append((session, blocks))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.running) - 1))
        self.pod.end(*self.running.pop(i))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        session, blocks = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if session is not None:
            self.pod.sessions.blocks_freed(session, blocks, self.pod.now)
        self.pod.pool.stop(blocks)
        if session is not None:
            self.pod.sessions.turn_finished(session, self.pod.now)

    @rule(session=hinted, forecast=st.sampled_from([SOON, LATE, NEVER]), elapsed=st.floats(0, 9))
    def hint(self, session: str, forecast: Forecast, elapsed: float) -> None:
        kind: Any = "ended" if forecast is NEVER else "tool"
        self.pod.sessions.forecast(session, kind, forecast, elapsed, self.pod.now)

    @rule(session=hinted, start=st.integers(0, 100), priority=st.integers(0, 100))
    def retain(self, session: str, start: int, priority: int) -> None:
        self.pod.sessions.retain(
            session, (Retention(start, None, priority, self.pod.now + 5),), self.pod.now
        )

    @rule(seconds=st.floats(0, 2_000))
    def wait(self, seconds: float) -> None:
        self.pod.wait(seconds)
        self.pod.sessions.sweep(self.pod.now)

    @rule(data=st.data())
    def invalidate(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.pod.blocks) - 1))
        self.pod.pool.drop_hash(self.pod.blocks[i])

    @precondition(lambda self: not self.running)
    @rule()
    def reset(self) -> None:
        for block in self.pod.blocks:
            self.pod.pool.drop_hash(block)
        self.pod.queue.reset()

    @rule()
    def look(self) -> None:
        """What is listed is what is taken."""
        queue = self.pod.queue
        listed = queue.get_all_free_blocks()
        assert list(queue.iter_blocks_after(None)) == listed
        if listed:
            assert list(queue.iter_blocks_after(listed[0])) == listed[1:]

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        pod = self.pod
        queue = pod.queue
        in_use = {id(b) for _, blocks in self.running for b in blocks}
        free = queue.get_all_free_blocks()
        assert len(free) == len({id(b) for b in free}) == queue.num_free_blocks
        assert not in_use & {id(b) for b in free}
        assert len(free) + len(in_use) == len(pod.blocks)
        for block in pod.blocks:
            linked = block.prev_free_block is not None and block.next_free_block is not None
            assert linked == (id(block) not in in_use)
        check_owners(queue, pod.sessions, free)

    def teardown(self) -> None:
        """Nothing outlives its session."""
        if not hasattr(self, "pod"):
            return
        pod = self.pod
        while self.running:
            pod.end(*self.running.pop())
        listed = pod.queue.get_all_free_blocks()
        taken = [pod.queue.popleft() for _ in range(len(pod.blocks))]
        assert taken == listed
        pod.wait(MAX_LAPSE_S + 1)
        pod.sessions.sweep(pod.now)
        pod.ledger.expire(pod.now)
        assert len(pod.sessions) == len(pod.ledger) == 0
        check_no_owners(pod.queue)


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


@given(st.lists(st.integers(0, 3), max_size=12), st.data())
@settings(deadline=None)
def test_a_listed_order_is_the_order_taken_in_any_portions(
    kinds: list[int], data: st.DataObject
) -> None:
    pod = Pod(60)
    for i, kind in enumerate(kinds):
        name = f"s{i}"
        pod.turn(name, chain(name, 5, shared=i % 3))
        if kind:
            pod.hint(name, (SOON, LATE, NEVER)[kind - 1])
        pod.wait(1)
    listed = pod.queue.get_all_free_blocks()
    taken: list[Any] = []
    while pod.queue.num_free_blocks:
        n = data.draw(st.integers(1, pod.queue.num_free_blocks))
        taken += pod.queue.popleft_n(n)
    assert taken == listed
