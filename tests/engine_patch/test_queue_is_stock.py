"""Without a hint the queue is vLLM's own, block for block: both are driven side by side."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine_patch.queue import ReuseAwareFreeQueue
from engine_patch.sessions import SessionTable
from tests.engine_patch.pool import PlainBlock, Pool

pytestmark = pytest.mark.engine
kv_cache_utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")


class SideBySide(RuleBasedStateMachine):
    """The same requests on stock's queue and on ours; sessions have ids but no hints."""

    @initialize(num_blocks=st.integers(1, 40), known=st.booleans())
    def start(self, num_blocks: int, known: bool) -> None:
        stock = [PlainBlock(i) for i in range(num_blocks)]
        ours = [PlainBlock(i) for i in range(num_blocks)]
        self.queue = ReuseAwareFreeQueue(list(ours))
        self.stock_queue = kv_cache_utils.FreeKVCacheBlockQueue(list(stock))
        self.sessions = SessionTable(self.queue, 3) if known else None
        self.stock = Pool(self.stock_queue, num_blocks)
        self.ours = Pool(self.queue, num_blocks)
        self.blocks = list(zip(stock, ours, strict=True))
        self.running: list[tuple[str, list[Any], list[Any]]] = []
        self.now = 0.0

    @rule(
        session=st.sampled_from("abcd"),
        length=st.integers(1, 10),
        fork=st.integers(0, 10),
        tail=st.booleans(),
    )
    def begin(self, session: str, length: int, fork: int, tail: bool) -> None:
        names: list[Any] = [f"sys{i}" if i < 2 else f"{session}{i}" for i in range(length)]
        names[fork:] = [f"{session}-{fork}-{i}" for i in range(fork, length)]
        if tail:
            names.append(None)
        if self.sessions:
            self.sessions.turn_arrived(session, self.now)
        theirs, mine = self.stock.start(names), self.ours.start(names)
        if theirs is None or mine is None:
            assert theirs is mine is None
            if self.sessions:
                self.sessions.turn_finished(session, self.now)
            return
        assert [b.block_id for b in theirs] == [b.block_id for b in mine]
        self.running.append((session, theirs, mine))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), seconds=st.floats(0, 100))
    def end(self, data: st.DataObject, seconds: float) -> None:
        i = data.draw(st.integers(0, len(self.running) - 1))
        session, theirs, mine = self.running.pop(i)
        self.now += seconds
        self.queue.now = self.now
        if self.sessions:
            self.sessions.blocks_freed(session, mine, self.now)
        self.stock.stop(theirs)
        self.ours.stop(mine)
        if self.sessions:
            self.sessions.turn_finished(session, self.now)
            self.sessions.sweep(self.now)

    @rule(data=st.data())
    def invalidate(self, data: st.DataObject) -> None:
        theirs, mine = data.draw(st.sampled_from(self.blocks))
        self.stock.drop_hash(theirs)
        self.ours.drop_hash(mine)

    @precondition(lambda self: not self.running)
    @rule()
    def reset(self) -> None:
        for theirs, mine in self.blocks:
            self.stock.drop_hash(theirs)
            self.ours.drop_hash(mine)
        self.queue.reset()

    @rule()
    def take_one(self) -> None:
        if self.queue.num_free_blocks:
            theirs, mine = self.stock_queue.popleft(), self.queue.popleft()
            assert theirs.block_id == mine.block_id
            self.stock_queue.append(theirs)
            self.queue.append(mine)

    @invariant()
    def the_order_is_the_same(self) -> None:
        assert self.queue.num_free_blocks == self.stock_queue.num_free_blocks
        theirs = [b.block_id for b in self.stock_queue.get_all_free_blocks()]
        assert [b.block_id for b in self.queue.get_all_free_blocks()] == theirs
        walked = [b.block_id for b in self.queue.iter_blocks_after(None)]
        assert walked == theirs


TestSideBySide = SideBySide.TestCase
TestSideBySide.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
