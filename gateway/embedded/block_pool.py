"""KV blocks with vLLM's semantics: prefix caching by chained hashes, lazy eviction.

A block is in exactly one place: held by one or more requests (`ref_cnt` > 0), or in the free
queue. A free block keeps its hash, so it can be hit again, until the queue hands it out for
new content; only then is it evicted. The queue alone decides the order of eviction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, eq=False)
class KVCacheBlock:
    """One block of KV, with the attribute names of vLLM's class of this name."""

    block_id: int
    ref_cnt: int = 0
    block_hash: int | None = None
    prev_free_block: KVCacheBlock | None = None
    next_free_block: KVCacheBlock | None = None
    is_null: bool = False

    def __repr__(self) -> str:  # the links would print the whole queue
        return f"KVCacheBlock({self.block_id}, ref_cnt={self.ref_cnt}, hash={self.block_hash})"


class FreeQueue(Protocol):
    """The interface of vLLM 0.32's `FreeKVCacheBlockQueue`: free blocks in eviction order."""

    num_free_blocks: int

    def popleft(self) -> KVCacheBlock: ...
    def popleft_n(self, n: int) -> list[KVCacheBlock]: ...
    def remove(self, block: KVCacheBlock) -> None: ...
    def append(self, block: KVCacheBlock) -> None: ...
    def append_n(self, blocks: list[KVCacheBlock]) -> None: ...
    def prepend_n(self, blocks: list[KVCacheBlock]) -> None: ...
    def get_all_free_blocks(self) -> list[KVCacheBlock]: ...


QueueFactory = Callable[[list[KVCacheBlock]], FreeQueue]


class LruFreeQueue:
    """Free blocks, least recently used first.

    A ring of the blocks' own links around a sentinel, because a cache hit takes a block out of
    the middle: every operation is O(1) a block and allocates nothing.
    """

    def __init__(self, blocks: list[KVCacheBlock]) -> None:
        self.num_free_blocks = 0
        self._ends = KVCacheBlock(block_id=-1)
        self._ends.prev_free_block = self._ends.next_free_block = self._ends
        self.append_n(blocks)

    def popleft(self) -> KVCacheBlock:
        """Take the block to evict first; ValueError when there is none."""
        if self.num_free_blocks == 0:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Take the `n` blocks to evict first, in order."""
        if n > self.num_free_blocks:
            raise ValueError(f"{n} blocks wanted, {self.num_free_blocks} are free")
        taken: list[KVCacheBlock] = []
        block = self._ends.next_free_block
        for _ in range(n):
            assert block is not None
            taken.append(block)
            following = block.next_free_block
            block.prev_free_block = block.next_free_block = None
            block = following
        assert block is not None
        self._link(self._ends, block)
        self.num_free_blocks -= n
        return taken

    def remove(self, block: KVCacheBlock) -> None:
        """Take a block from anywhere in the queue; RuntimeError if it is not in it."""
        if block.prev_free_block is None or block.next_free_block is None:
            raise RuntimeError(f"{block!r} is not in the free queue")
        self._link(block.prev_free_block, block.next_free_block)
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1

    def append(self, block: KVCacheBlock) -> None:
        """Put a block last: it is evicted after all that are here now."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks last, in the order given."""
        assert self._ends.prev_free_block is not None
        self._insert_between(self._ends.prev_free_block, blocks, self._ends)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put blocks first, in the order given."""
        assert self._ends.next_free_block is not None
        self._insert_between(self._ends, blocks, self._ends.next_free_block)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """Every free block in eviction order. O(blocks): for tests and inspection."""
        blocks: list[KVCacheBlock] = []
        block = self._ends.next_free_block
        while block is not None and block is not self._ends:
            blocks.append(block)
            block = block.next_free_block
        return blocks

    def _insert_between(
        self, before: KVCacheBlock, blocks: list[KVCacheBlock], after: KVCacheBlock
    ) -> None:
        for block in blocks:
            before.next_free_block = block
            block.prev_free_block = before
            before = block
        self._link(before, after)
        self.num_free_blocks += len(blocks)

    @staticmethod
    def _link(before: KVCacheBlock, after: KVCacheBlock) -> None:
        before.next_free_block = after
        after.prev_free_block = before


class BlockPool:
    """A fixed number of blocks, some held, the others free and possibly still cached.

    Block 0 is a placeholder that is never handed out, as in vLLM: `num_blocks - 1` are usable.
    """

    def __init__(self, num_blocks: int, queue_factory: QueueFactory = LruFreeQueue) -> None:
        if num_blocks < 2:
            raise ValueError("a pool needs at least 2 blocks: one is the null block")
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self.free_queue = queue_factory(self.blocks)
        self.null_block = self.free_queue.popleft()
        self.null_block.is_null = True
        # Equal content computed twice at once gives two blocks of one hash: both are kept.
        self._cached: dict[int, dict[int, KVCacheBlock]] = {}
        self.evicted_cached_blocks = 0

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
    def usage(self) -> float:
        """Share of the usable blocks that requests hold, 0 to 1."""
        return 1 - self.num_free_blocks / self.num_usable_blocks

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
        blocks = self.free_queue.popleft_n(num_blocks)
        for block in blocks:
            if block.block_hash is not None:
                self._forget(block)
                self.evicted_cached_blocks += 1
            block.ref_cnt = 1
        return blocks

    def cache(self, blocks: Sequence[KVCacheBlock], block_hashes: Sequence[int]) -> None:
        """Make full blocks findable by their hashes."""
        for block, block_hash in zip(blocks, block_hashes, strict=True):
            block.block_hash = block_hash
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
        block.block_hash = None
