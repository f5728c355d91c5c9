import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.embedded.block_pool import BlockPool, KVCacheBlock

NUM_BLOCKS = 12


def make_chain(seed: int, length: int) -> list[int]:
    """Hashes of a prompt: chains of one seed share their prefixes, others share nothing."""
    return [seed * 1000 + position for position in range(length)]


class PoolMachine(RuleBasedStateMachine):
    """The pool beside a plain model: a list of free ids in order, and each block's hash."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.free_ids = list(range(1, NUM_BLOCKS))
        self.hash_of: dict[int, int] = {}
        self.held: list[list[KVCacheBlock]] = []

    @rule(seed=st.integers(0, 3), length=st.integers(1, 5), cached=st.integers(0, 5))
    def start_request(self, seed: int, length: int, cached: int) -> None:
        chain = make_chain(seed, length)
        hit = self.pool.find_longest_hit(chain, length)
        known = set(self.hash_of.values())
        expected = next(
            (i for i, block_hash in enumerate(chain) if block_hash not in known), length
        )
        assert len(hit) == expected
        assert [block.block_hash for block in hit] == chain[: len(hit)]
        missing = length - len(hit)
        if missing + sum(block.ref_cnt == 0 for block in hit) > self.pool.num_free_blocks:
            return
        self.pool.touch(hit)
        self.free_ids = [i for i in self.free_ids if i not in {block.block_id for block in hit}]
        evicted_before = self.pool.evicted_cached_blocks
        new = self.pool.allocate(missing)
        assert [block.block_id for block in new] == self.free_ids[:missing]
        evicted = [i for i in self.free_ids[:missing] if self.hash_of.pop(i, None) is not None]
        assert self.pool.evicted_cached_blocks - evicted_before == len(evicted)
        del self.free_ids[:missing]
        full = new[: max(0, min(cached, length) - len(hit))]  # the rest stays a partial block
        self.pool.cache(hit + new, chain, len(hit), len(hit) + len(full))
        self.hash_of.update((b.block_id, b.block_hash) for b in full if b.block_hash is not None)
        self.held.append(hit + new)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish_request(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        still_held = {block.block_id for other in self.held for block in other}
        freed = [b.block_id for b in reversed(blocks) if b.block_id not in still_held]
        self.pool.free(blocks)
        self.free_ids = [
            *(i for i in freed if i not in self.hash_of),
            *self.free_ids,
            *(i for i in freed if i in self.hash_of),
        ]

    @invariant()
    def every_block_is_in_exactly_one_place(self) -> None:
        free = {block.block_id for block in self.pool.free_queue.get_all_free_blocks()}
        held = {block.block_id for blocks in self.held for block in blocks}
        assert not free & held
        assert free | held == set(range(1, NUM_BLOCKS))
        assert len(free) == self.pool.num_free_blocks
        assert self.pool.usage == pytest.approx(len(held) / (NUM_BLOCKS - 1))

    @invariant()
    def free_blocks_are_in_eviction_order(self) -> None:
        queue = self.pool.free_queue.get_all_free_blocks()
        assert [block.block_id for block in queue] == self.free_ids

    @invariant()
    def reference_counts_are_the_holders(self) -> None:
        for block in self.pool.blocks:
            assert block.ref_cnt == sum(block in blocks for blocks in self.held)
        assert self.pool.num_cached_blocks == len(self.hash_of)


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_pool_refuses_what_it_does_not_have() -> None:
    pool = BlockPool(4)
    with pytest.raises(ValueError, match="4 blocks wanted, 3 are free"):
        pool.allocate(4)
    assert pool.num_free_blocks == 3
    with pytest.raises(ValueError, match="at least 2 blocks"):
        BlockPool(1)
