"""KV blocks with vLLM's semantics: prefix caching by chained hashes, lazy eviction.

A block is in exactly one place: held by one or more requests (`ref_cnt` > 0), or in the free
queue. A free block keeps its hash, so it can be hit again, until the queue hands it out for
new content; only then is it evicted. The queue alone decides the order of eviction: it is the one
the engine patch gives to vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engine_patch.forecast import attention_parity_tokens
from engine_patch.queue import ReuseAwareFreeQueue


@dataclass(slots=True, eq=False)
class KVCacheBlock:
    """One block of KV, with the attribute names of vLLM's class of this name."""

    block_id: int
    ref_cnt: int = 0
    block_hash: int | None = None
    block_hash_num_tokens: int | None = None
    prev_free_block: KVCacheBlock | None = None
    next_free_block: KVCacheBlock | None = None
    is_null: bool = False

    def __repr__(self) -> str:  # the links would print the whole queue
        return f"KVCacheBlock({self.block_id}, ref_cnt={self.ref_cnt}, hash={self.block_hash})"


class BlockPool:
    """A fixed number of blocks, some held, the others free and possibly still cached.

    Block 0 is a placeholder that is never handed out, as in vLLM: `num_blocks - 1` are usable.

    Args:
        num_blocks: at least 2.
        block_size_tokens: tokens of a block.
        hidden_size: the model's width, by which the context makes a token dearer to compute again.
    """

    def __init__(
        self, num_blocks: int, block_size_tokens: int = 16, hidden_size: int = 5120
    ) -> None:
        if num_blocks < 2:
            raise ValueError("a pool needs at least 2 blocks: one is the null block")
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self.free_queue = ReuseAwareFreeQueue(
            self.blocks,
            tokens_per_block=block_size_tokens,
            parity_tokens=attention_parity_tokens(hidden_size),
        )
        self.null_block: KVCacheBlock = self.free_queue.popleft()
        self.null_block.is_null = True
        # Equal content computed twice at once gives two blocks of one hash: both are kept.
        self._cached: dict[int, dict[int, KVCacheBlock]] = {}
        self.on_evicted: Callable[[int], None] = lambda block_hash: None
        """Called with the hash of each cached block that is given away."""

    @property
    def num_usable_blocks(self) -> int:
        return len(self.blocks) - 1

    @property
    def num_free_blocks(self) -> int:
        return self.free_queue.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        return sum(map(len, self._cached.values()))

    @property
    def evicted_cached_blocks(self) -> int:
        """Cached blocks given away for new content since the start."""
        return sum(self.free_queue.evictions.values())

    @property
    def usage(self) -> float:
        """Share of the usable blocks that requests hold, 0 to 1."""
        return 1 - self.num_free_blocks / self.num_usable_blocks

    def is_cached(self, block_hash: int) -> bool:
        """Whether a block of this hash is resident."""
        return block_hash in self._cached

    def find_longest_hit(self, block_hashes: Sequence[int], max_blocks: int) -> list[KVCacheBlock]:
        """The cached blocks of the longest known prefix, at most `max_blocks` of them."""
        hit: list[KVCacheBlock] = []
        cached = self._cached
        for block_hash in block_hashes[:max_blocks]:
            same = cached.get(block_hash)
            if same is None:
                break
            hit.append(next(iter(same.values())))
        return hit

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Hold cached blocks for one more request; free ones leave the queue."""
        for block in blocks:
            if block.ref_cnt == 0:
                self.free_queue.remove(block)
            block.ref_cnt += 1

    def allocate(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take blocks for new content, evicting what they cached; ValueError if too few."""
        if num_blocks > self.num_free_blocks:
            raise ValueError(f"{num_blocks} blocks wanted, {self.num_free_blocks} are free")
        blocks: list[KVCacheBlock] = self.free_queue.popleft_n(num_blocks)
        for block in blocks:
            if block.block_hash is not None:
                self._forget(block)
            block.ref_cnt = 1
        return blocks

    def cache(
        self, blocks: Sequence[KVCacheBlock], block_hashes: Sequence[int], first: int, end: int
    ) -> None:
        """Make the full blocks `[first, end)` of a prompt findable by their hashes."""
        for i in range(first, end):
            block, block_hash = blocks[i], block_hashes[i]
            block.block_hash = block_hash
            block.block_hash_num_tokens = (i + 1) * self.free_queue.tokens_per_block
            self._cached.setdefault(block_hash, {})[block.block_id] = block

    def free(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Release one request's blocks, given in prompt order.

        The tail goes first in eviction order, for the head serves more prompts. Blocks without
        a hash can serve none and go before all others.
        """
        useless: list[KVCacheBlock] = []
        reusable: list[KVCacheBlock] = []
        for block in reversed(blocks):
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                (useless if block.block_hash is None else reusable).append(block)
        self.free_queue.prepend_n(useless)
        self.free_queue.append_n(reusable)

    def _forget(self, block: KVCacheBlock) -> None:
        assert block.block_hash is not None
        same = self._cached[block.block_hash]
        del same[block.block_id]
        if not same:
            del self._cached[block.block_hash]
        self.on_evicted(block.block_hash)
        block.block_hash = block.block_hash_num_tokens = None
