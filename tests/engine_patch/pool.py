"""A prefix cache of blocks over a free queue, with the calls vLLM's BlockPool makes on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine_patch.queue import ReuseAwareFreeQueue, _walk
from engine_patch.sessions import SessionTable

TOKENS_PER_BLOCK = 16


@dataclass(eq=False, slots=True)
class PlainBlock:
    """The attributes of vLLM's KVCacheBlock that a free queue may use."""

    block_id: int
    ref_cnt: int = 0
    block_hash: Any = None
    block_hash_num_tokens: int | None = None
    prev_free_block: Any = None
    next_free_block: Any = None
    is_null: bool = False


class Pool:
    """Chains of blocks named by (chain, index); evicts a block's name when it is given away."""

    def __init__(self, queue: Any, num_blocks: int) -> None:
        self.queue = queue
        self.num_blocks = num_blocks
        self.cached: dict[Any, Any] = {}
        self.evicted: list[Any] = []

    def start(self, names: list[Any]) -> list[Any] | None:
        """Blocks for a chain of names, its cached prefix reused; None if they do not fit."""
        hits = []
        for name in names:
            block = self.cached.get(name)
            if block is None:
                break
            hits.append(block)
        free_hits = sum(b.ref_cnt == 0 for b in hits)
        if len(names) - len(hits) > self.queue.num_free_blocks - free_hits:
            return None
        for block in hits:
            if block.ref_cnt == 0:
                self.queue.remove(block)
            block.ref_cnt += 1
        fresh = self.queue.popleft_n(len(names) - len(hits))
        for i, (block, name) in enumerate(zip(fresh, names[len(hits) :], strict=True), len(hits)):
            assert block.ref_cnt == 0
            if block.block_hash is not None:
                self.evicted.append(block.block_hash)
                self.drop_hash(block)
            block.ref_cnt = 1
            if name is not None:
                block.block_hash = name
                block.block_hash_num_tokens = (i + 1) * TOKENS_PER_BLOCK
                self.cached[name] = block
        return hits + fresh

    def stop(self, blocks: list[Any]) -> None:
        """Give a chain back, its tail first: uncached blocks to the front, cached to the end."""
        first, last = [], []
        for block in reversed(blocks):
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                (first if block.block_hash is None else last).append(block)
        self.queue.prepend_n(first)
        self.queue.append_n(last)

    def drop_hash(self, block: Any) -> None:
        """The block's content is gone or invalid; another of the same name may remain."""
        if self.cached.get(block.block_hash) is block:
            del self.cached[block.block_hash]
        block.block_hash = block.block_hash_num_tokens = None


def check_owners(queue: ReuseAwareFreeQueue, sessions: SessionTable, free: list[Any]) -> None:
    """Groups, the blocks in them and the sessions that own them say the same."""
    group_of = [run and run.group for run in queue._run]
    owned = [g for g in group_of if g is not None and g is not queue._anonymous]
    assert set(owned) == set(queue.groups())
    for group in queue.groups():
        assert group.size == owned.count(group) > 0
        listed = {b.block_id for b in free if group_of[b.block_id] is group}
        assert listed == {b.block_id for b in _walk(group)}
        for session in group.members:
            assert group in session.groups
            assert sessions.get(session.key) is session
    for session in sessions:
        assert session.groups <= set(queue.groups())


def check_no_owners(queue: ReuseAwareFreeQueue) -> None:
    """Nothing is left of any session."""
    assert not queue._groups
    assert not queue._by_members
    assert not queue._lru
    assert not queue._scored
    assert queue._giving is None
    assert all(run is None or run.group is queue._anonymous for run in queue._run)
