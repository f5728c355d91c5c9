"""What the gateway believes to be in a pod's KV cache, or knows where the pod tells.

A model of vLLM's prefix cache at the grain of chains: an LRU list of (chain, tokens) whose sum
never exceeds the cache. A turn served moves its chain to the young end with all its tokens; what
does not fit is cut from the oldest chains, tail first, as vLLM frees a sequence's blocks. The
belief is corrected by every response that says how many tokens were cached. Of a chain that the
pod's KV events tell of, their ledger is asked instead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import ItemsView

from gateway.fleet.ledger import Ledger

MAX_HEADS = 4096
MAX_CHAINS = 65_536


class Residency:
    """Resident tokens by chain, for one pod. All operations are O(1), `touch` amortised.

    ``capacity_tokens`` is None while unknown: then nothing is believed lost by itself.
    """

    def __init__(self, capacity_tokens: int | None = None) -> None:
        self.capacity_tokens = capacity_tokens
        self.usable_share = 1.0
        """Of the capacity, what sessions can count on: lowered when a pod held less than believed
        (running requests and traffic of others take their part), raised slowly when it held all."""
        self.total_tokens = 0
        self.ledger: Ledger | None = None
        """Kept by the pod's KV events, where it publishes them."""
        self._tokens: OrderedDict[str, int] = OrderedDict()
        self._heads: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    def chains(self) -> ItemsView[str, int]:
        """Chains and their tokens, the oldest first."""
        return self._tokens.items()

    def tokens(self, sid: str) -> int:
        """Tokens of the chain's prefix known, or else believed, to be in the cache."""
        if self.ledger is not None and (known := self.ledger.tokens(sid)) is not None:
            return known
        return self._tokens.get(sid, 0)

    def knows(self, sid: str) -> bool:
        """Whether what `tokens` says of the chain is known."""
        return self.ledger is not None and self.ledger.tokens(sid) is not None

    @property
    def resident_tokens(self) -> int:
        """Of all chains."""
        if self.ledger is not None and self.ledger.live:
            return self.ledger.total_tokens
        return self.total_tokens

    def shared_tokens(self, heads: list[tuple[int, int]]) -> int:
        """The longest beginning that another chain left here. ``heads`` are (prefix link, its
        length in tokens), longest first; a chain loses its beginning last, so it is resident as
        far as its owner is."""
        for link, length_tokens in heads:
            owner = self._heads.get(link)
            if owner is not None and (resident := self.tokens(owner)):
                return min(length_tokens, resident)
        return 0

    def touch(self, sid: str, tokens: int, heads: list[tuple[int, int]]) -> None:
        """A turn of the chain was served: its ``tokens`` (prompt and answer) are in the cache now,
        the youngest of all."""
        self.total_tokens += tokens - self._tokens.pop(sid, 0)
        self._tokens[sid] = tokens
        for link, _ in heads:
            self._heads[link] = sid
            self._heads.move_to_end(link)
        while len(self._heads) > MAX_HEADS:
            self._heads.popitem(last=False)
        self._trim()

    def learn(self, expected_tokens: int, cached_tokens: int) -> None:
        """A response said how many tokens were cached, where ``expected_tokens`` were believed."""
        if expected_tokens <= 0:
            return
        if cached_tokens < 0.9 * expected_tokens:
            self.usable_share = max(0.3, 0.97 * self.usable_share)
        else:
            self.usable_share = min(1.0, self.usable_share + 0.005)

    def drop(self, sid: str) -> None:
        """The chain is gone, or was found not to be there."""
        self._cut(sid)
        if self.ledger is not None:
            self.ledger.forget(sid)

    def _cut(self, sid: str) -> None:
        self.total_tokens -= self._tokens.pop(sid, 0)

    def set_capacity(self, capacity_tokens: int | None) -> None:
        self.capacity_tokens = capacity_tokens
        self._trim()

    def clear(self) -> None:
        """The pod restarted: its cache is empty."""
        self._tokens.clear()
        self._heads.clear()
        self.total_tokens = 0

    def _trim(self) -> None:
        while len(self._tokens) > MAX_CHAINS:
            self._cut(next(iter(self._tokens)))
        if self.capacity_tokens is None:
            return
        room_tokens = int(self.capacity_tokens * self.usable_share)
        while self.total_tokens > room_tokens and self._tokens:
            sid, tokens = next(iter(self._tokens.items()))
            surplus = self.total_tokens - room_tokens
            if tokens > surplus:
                self._tokens[sid] = tokens - surplus
                self.total_tokens -= surplus
            else:
                self._cut(sid)
