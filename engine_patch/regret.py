"""Evicted tokens that came back: how often an eviction was wrong, and how soon."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from operator import itemgetter
from typing import Any

WINDOWS_S = (60, 600)
_SAMPLED_BLOCKS = 16_384


class EvictionLedger:
    """Remembers evicted blocks for ten minutes and counts those that are asked for again.

    A pool larger than 16,384 blocks is sampled by some bits of the hash, always the same blocks,
    and the counts are scaled up (spatial sampling: Waldspurger et al., SHARDS, FAST
    2015). At most four samples of the pool are remembered; under a
    higher eviction rate the oldest are forgotten and the counts are a lower bound.

    Args:
        num_blocks: blocks of the pool.
        tokens_per_block: tokens of a block.
        key: what of a block's hash a request asks for (vLLM appends the KV cache group to it).
        low_bits: evenly spread bits of a hash or key, at least eight; a hash of bytes' first one.
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        key: Callable[[Any], Hashable] = lambda block_hash: block_hash,
        low_bits: Callable[[Any], int] = itemgetter(0),
    ) -> None:
        self.scale = 1
        while num_blocks > self.scale * _SAMPLED_BLOCKS and self.scale < 256:
            self.scale *= 2
        self.tokens = dict.fromkeys(WINDOWS_S, 0)
        self._capacity = 4 * max(num_blocks // self.scale, 1)
        self._tokens_per_block = tokens_per_block
        self._key = key
        self._low_bits = low_bits
        self._evicted_at: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._evicted_at)

    def record(self, hashes: Iterable[Any], now: float) -> None:
        """Note the hashes of blocks given away; None for an uncached one."""
        mask, key, evicted_at = self.scale - 1, self._key, self._evicted_at
        low_bits = self._low_bits
        for block_hash in hashes:
            if block_hash is None or (mask and low_bits(block_hash) & mask):
                continue
            evicted_at[key(block_hash)] = now
        while len(evicted_at) > self._capacity:
            evicted_at.popitem(last=False)

    def asked(self, keys: Iterable[Any], now: float) -> None:
        """Count what was evicted of a prompt's blocks (`keys`: hashes of all or of the missing)."""
        evicted_at, mask = self._evicted_at, self.scale - 1
        if not evicted_at:
            return
        if mask:
            low_bits = self._low_bits
            keys = [key for key in keys if not low_bits(key) & mask]
        for key in keys:
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
