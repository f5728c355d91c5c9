"""What a pod says is in its KV cache: the blocks it has stored and removed, and whose they are.

vLLM chains its blocks: each is stored after its parent, by a request that carries its session's id.
So a session is known by its *tip*, the last block of its prefix that is in the cache, and the depth
of that block. vLLM frees a request's blocks from the end, and a hit touches all of a prefix, so a
block leaves the cache only after all that come after it: where a tip is removed, its parent is the
tip now.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Literal

MAX_BLOCKS: Final = 2_000_000
MAX_SESSIONS: Final = 65_536
ROOT: Final = -1
"""The parent of a first block."""
Trouble = Literal["replayed", "lost", "restarted", "malformed", "overflow"]
"""What came of events that were missed, or that it has no use for."""


class Ledger:
    """The blocks of one pod's cache, about 150 bytes each. Storing and removing are O(1) a block,
    or O(depth) where a session goes on from another one's block.

    It speaks only of sessions whose prefix it has seen from the first block on, and only while it
    is ``live``: no event was missed.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.max_blocks = max_blocks
        self.live = False
        self.on_emptied: Callable[[], None] = lambda: None
        """Called when the cache is empty."""
        self.block_tokens = 0
        self._parents: dict[int, int] = {}
        """Of each block in the cache."""
        self._copies: dict[int, int] = {}
        """Of blocks that are there more than once."""
        self._sessions: OrderedDict[str, tuple[int, int]] = OrderedDict()
        """Tip and its depth, in blocks; least recently stored first."""
        self._tips: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return len(self._parents)

    @property
    def knows_any(self) -> bool:
        return bool(self._parents or self._sessions)

    @property
    def total_tokens(self) -> int:
        return len(self._parents) * self.block_tokens

    def tokens(self, sid: str) -> int | None:
        """Tokens of the session's prefix that are in the cache; None if that is not known."""
        found = self._sessions.get(sid) if self.live else None
        return None if found is None else found[1] * self.block_tokens

    def store(
        self, sid: str | None, parent: int | None, blocks: Sequence[int], block_tokens: int
    ) -> bool:
        """Blocks came into the cache, one after another, after ``parent`` (None for the first of a
        prompt). False, and nothing is known any more, where they are too many."""
        if block_tokens < self.block_tokens or not blocks:
            return True  # the beginning of a block, to be stored again as a whole
        if block_tokens > self.block_tokens:
            self.clear()
            self.block_tokens = block_tokens
        depth = 0 if parent is None else self._depth(sid, parent)
        before = ROOT if parent is None else parent
        parents = self._parents
        for block in blocks:
            if block in parents:
                self._copies[block] = self._copies.get(block, 1) + 1
            parents[block] = before
            before = block
        if len(parents) > self.max_blocks:
            self.clear()
            return False
        if sid is not None and depth is not None:
            self._move(sid, before, depth + len(blocks))
        return True

    def _depth(self, sid: str | None, block: int) -> int | None:
        """How many blocks a prefix up to this one has; None if its beginning is not known."""
        known = self._sessions.get(sid) if sid is not None else None
        if known is not None and known[0] == block:
            return known[1]
        depth = 0
        while block != ROOT:
            above = self._parents.get(block)
            if above is None or depth >= len(self._parents):
                return None  # not known, or a ring that no engine would tell of
            depth += 1
            block = above
        return depth

    def remove(self, blocks: Sequence[int]) -> None:
        """Blocks left the cache."""
        for block in blocks:
            copies = self._copies.get(block)
            if copies is not None:
                if copies > 2:
                    self._copies[block] = copies - 1
                else:
                    del self._copies[block]
                continue
            parent = self._parents.pop(block, None)
            for sid in self._tips.pop(block, ()):
                depth = max(0, self._sessions[sid][1] - 1)
                tip = ROOT if parent is None else parent
                self._sessions[sid] = tip, depth
                if tip != ROOT:
                    self._tips.setdefault(tip, set()).add(sid)

    def _move(self, sid: str, tip: int, depth: int) -> None:
        self._leave_tip(sid)
        self._sessions[sid] = tip, depth
        self._sessions.move_to_end(sid)
        self._tips.setdefault(tip, set()).add(sid)
        while len(self._sessions) > MAX_SESSIONS:
            self._leave_tip(next(iter(self._sessions)))
            self._sessions.popitem(last=False)

    def _leave_tip(self, sid: str) -> None:
        known = self._sessions.get(sid)
        at_tip = self._tips.get(known[0]) if known is not None else None
        if at_tip is not None:
            at_tip.discard(sid)
            if not at_tip and known is not None:
                del self._tips[known[0]]

    def forget(self, sid: str) -> None:
        """The session is over; its blocks stay until the pod removes them."""
        self._leave_tip(sid)
        self._sessions.pop(sid, None)

    def emptied(self) -> None:
        """The pod has nothing in its cache any more."""
        self._parents.clear()
        self._copies.clear()
        self._tips.clear()
        for sid in self._sessions:
            self._sessions[sid] = ROOT, 0
        self.on_emptied()

    def clear(self) -> None:
        """What is in the cache is not known any more."""
        self._parents.clear()
        self._copies.clear()
        self._sessions.clear()
        self._tips.clear()
