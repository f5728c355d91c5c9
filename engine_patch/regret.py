"""Evicted tokens that came back: how often an eviction was wrong, and how soon."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

WINDOWS_S = (60, 600)
_SAMPLED_BLOCKS = 16_384


class EvictionLedger:
    """Remembers evicted blocks for ten minutes and counts those that are asked for again.

    Of a pool larger than 16,384 blocks every k-th block of a prompt is followed, always the same
    ones, and the counts are scaled up. At most four samples of the pool are remembered; under a
    higher eviction rate the oldest are forgotten and the counts are a lower bound.

    Args:
        num_blocks: blocks of the pool.
        tokens_per_block: tokens that one hash of a request stands for.
        key: what of a block's hash a request asks for (vLLM appends the KV cache group to it).
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        key: Callable[[Any], Hashable] = lambda block_hash: block_hash,
    ) -> None:
        self.scale = 1
        while num_blocks > self.scale * _SAMPLED_BLOCKS and self.scale < 256:
            self.scale *= 2
        self.tokens = dict.fromkeys(WINDOWS_S, 0)
        self._capacity = 4 * max(num_blocks // self.scale, 1)
        self._tokens_per_block = tokens_per_block
        self._key = key
        self._evicted_at: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._evicted_at)

    def record(self, blocks: Iterable[Any], now: float) -> None:
        """Note blocks that are given away; an uncached one has no `block_hash_num_tokens`."""
        key, evicted_at = self._key, self._evicted_at
        stride_tokens = self.scale * self._tokens_per_block
        for block in blocks:
            end = block.block_hash_num_tokens
            if end and not end % stride_tokens:
                evicted_at[key(block.block_hash)] = now
        while len(evicted_at) > self._capacity:
            evicted_at.popitem(last=False)

    def asked(self, keys: Sequence[Any], now: float) -> None:
        """Count what was evicted of a prompt's blocks (`keys`: their hashes, from its first)."""
        evicted_at = self._evicted_at
        if not evicted_at:
            return
        for key in keys[self.scale - 1 :: self.scale]:
            at = evicted_at.pop(key, None)
            if at is None:
                continue
            for window_s in WINDOWS_S:
                if now - at <= window_s:
                    self.tokens[window_s] += self.scale * self._tokens_per_block

    def expire(self, now: float) -> None:
        """Drop what is too old to count."""
        evicted_at = self._evicted_at
        while evicted_at and now - next(iter(evicted_at.values())) > WINDOWS_S[-1]:
            evicted_at.popitem(last=False)
