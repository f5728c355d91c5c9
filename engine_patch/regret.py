"""Evicted tokens that came back: how often an eviction was wrong, and how soon."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

WINDOWS_S = (60, 600)
_SAMPLED_BLOCKS = 16_384


class EvictionLedger:
    """Remembers evicted blocks for ten minutes and counts those that are asked for again.

    A pool larger than 16,384 blocks is sampled by hash, always the same blocks, and the counts are
    scaled up (spatial sampling: Waldspurger et al., SHARDS, FAST 2015). At most four samples of
    the pool are remembered; under a higher eviction rate the oldest are forgotten and the counts
    are a lower bound.

    Args:
        num_blocks: blocks of the pool.
        tokens_per_block: tokens of a block.
        key: what of a block's hash a request asks for (vLLM appends the KV cache group to it).
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        key: Callable[[Any], Hashable] = lambda block_hash: block_hash,
    ) -> None:
        self.scale = 1
        while num_blocks > self.scale * _SAMPLED_BLOCKS:
            self.scale *= 2
        self.tokens = dict.fromkeys(WINDOWS_S, 0)
        self._capacity = 4 * max(num_blocks // self.scale, 1)
        self._tokens_per_block = tokens_per_block
        self._key = key
        self._evicted_at: dict[Hashable, float] = {}

    def __len__(self) -> int:
        return len(self._evicted_at)

    def record(self, blocks: Iterable[Any], now: float) -> None:
        """Note the cached ones of `blocks`, about to lose their hash."""
        mask, evicted_at = self.scale - 1, self._evicted_at
        for block in blocks:
            if block.block_hash is None:
                continue
            key = self._key(block.block_hash)
            if not hash(key) & mask:
                evicted_at.pop(key, None)
                evicted_at[key] = now
        if len(evicted_at) > self._capacity:
            self._forget(now)

    def asked(self, keys: Iterable[Hashable], now: float) -> None:
        """Count what was evicted of a prompt's blocks (`keys`: hashes of all or of the missing)."""
        if not self._evicted_at:
            return
        mask = self.scale - 1
        for key in keys:
            if hash(key) & mask:
                continue
            evicted_at = self._evicted_at.pop(key, None)
            if evicted_at is None:
                continue
            for window_s in WINDOWS_S:
                if now - evicted_at <= window_s:
                    self.tokens[window_s] += self.scale * self._tokens_per_block

    def _forget(self, now: float) -> None:
        for key, evicted_at in list(self._evicted_at.items()):
            if len(self._evicted_at) <= self._capacity and now - evicted_at <= WINDOWS_S[-1]:
                break
            del self._evicted_at[key]

    def expire(self, now: float) -> None:
        """Drop what is too old to count."""
        for key, evicted_at in list(self._evicted_at.items()):
            if now - evicted_at <= WINDOWS_S[-1]:
                break
            del self._evicted_at[key]
