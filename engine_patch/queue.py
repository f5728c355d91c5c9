"""The pod's free KV blocks in eviction order: stock LRU, bent by what sessions are about to need.

Same interface as vLLM's `FreeKVCacheBlockQueue` (0.32, 0.33), and the same order, block for block,
as long as no session has a live hint.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from engine_patch.forecast import recompute_cost

if TYPE_CHECKING:
    from engine_patch.regret import EvictionLedger
    from engine_patch.sessions import Session

Cause = Literal["lru", "forecast", "ended", "superseded"]
CAUSES: tuple[Cause, ...] = get_args(Cause)

RESCORE_S = 0.5
# The youngest age that counts; below it everything is "just freed".
_MIN_AGE_S = 1e-3


class Block(Protocol):
    """What the queue reads and writes of vLLM's `KVCacheBlock`."""

    block_id: int
    ref_cnt: int
    prev_free_block: Any
    next_free_block: Any
    is_null: bool

    @property
    def block_hash(self) -> Any: ...


class _End:
    """Sentinel at either end of a list."""

    __slots__ = ("block_hash", "block_id", "next_free_block", "prev_free_block")

    def __init__(self) -> None:
        self.block_id = -1
        self.block_hash = None
        self.prev_free_block: Any = None
        self.next_free_block: Any = None


class Group:
    """Cached blocks owned by exactly the same sessions, and the free ones among them in a list.

    The list is in eviction order: freed first, goes first; a request frees its tail first, so a
    chain shrinks from its end. Blocks of no session form the group without members.
    """

    __slots__ = (
        "cause",
        "entry",
        "first",
        "free",
        "in_lru",
        "last",
        "members",
        "score",
        "serial",
        "shared",
        "size",
        "stepwise",
        "superseded",
    )  # fmt: skip

    def __init__(self, serial: int, members: frozenset[Session], superseded: bool = False) -> None:
        self.serial = serial
        self.members = members
        self.superseded = superseded
        self.shared = len(members) > 1
        self.size = 0  # blocks of the group, free or in use
        self.free = 0  # of which in this list
        self.first: Any = _End()
        self.last: Any = _End()
        self.first.next_free_block = self.last
        self.last.prev_free_block = self.first
        self.score: float | None = None  # None: by age, in the LRU order of the whole pod
        self.cause: Cause = "lru"
        self.stepwise = False  # the score may rise from one block to the next
        self.entry: tuple[float, int, Group] | None = None
        self.in_lru = False


class ReuseAwareFreeQueue:
    """Free blocks, taken in this order: uncached ones, then the least valuable cached one.

    A block's value is `reuse rate x recompute cost` (see `forecast`): reuses expected per second
    of waiting, times the prefill it would cost. The rate of a block shared by several sessions is
    that of the one that returns soonest. Blocks without a live hint are worth `1 / age`, the rate
    of the heavy-tailed gap an LRU order assumes, so hinted and anonymous blocks meet on one scale
    and neither starves the other; among themselves they keep stock's order exactly.

    Costs: append, remove and touch O(1); an eviction O(log groups), where groups are the distinct
    sets of owners, about one for each session and branching; a rescore O(sessions), at most every
    `RESCORE_S` and only when a cached block must go. Nothing is scored per block.

    Args:
        blocks: the free blocks in stock's order; their ids index the queue's arrays.
        tokens_per_block: tokens of a block.
        parity_tokens: `forecast.recompute_cost`'s parity of the model.
        ledger: remembers evicted hashes to find those that come back; optional.

    `now` is set by the driver before each step (any monotonic seconds).
    """

    def __init__(
        self,
        blocks: list[Any],
        *,
        tokens_per_block: int = 16,
        parity_tokens: float = 30_000.0,
        ledger: EvictionLedger | None = None,
    ) -> None:
        self.now = 0.0
        self.num_free_blocks = len(blocks)
        self.tokens_per_block = tokens_per_block
        self.parity_tokens = parity_tokens
        self.ledger = ledger
        self.evictions: dict[Cause, int] = dict.fromkeys(CAUSES, 0)
        self.scoring_s = 0.0

        self._serials = count(1)
        self._anonymous = Group(0, frozenset())
        self.fake_free_list_head = self._anonymous.first
        self.fake_free_list_tail = self._anonymous.last
        _link(blocks, self.fake_free_list_head, self.fake_free_list_tail)

        # By block id. Only written once a session is known: before, every block is anonymous.
        capacity = max((b.block_id for b in blocks), default=-1) + 1
        self._group: list[Group | None] = [None] * capacity
        self._position = [0] * capacity  # index in its chain
        self._stamp = [0] * capacity  # place in the LRU order of the pod
        self._freed_at = [0.0] * capacity
        self._tracking = False
        self._next_stamp = 1

        self._groups: set[Group] = set()
        self._by_members: dict[frozenset[Session], Group] = {}
        self._grouped_free = 0
        # Heaps with lazy deletion: an entry counts if its group still says so.
        self._lru: list[tuple[int, int, Group]] = []
        self._scored: list[tuple[float, int, Group]] = []
        self._rescore_at = 0.0

    # --- vLLM's interface ---------------------------------------------------------------------

    def popleft(self) -> Any:
        """Take the next block to be given away.

        Raises:
            ValueError: no block is free.
        """
        if not self.num_free_blocks:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Any]:
        """Take the next `n` blocks to be given away, in order."""
        assert self.num_free_blocks >= n, f"{n} blocks asked, {self.num_free_blocks} free"
        self.num_free_blocks -= n
        if not self._grouped_free:
            return self._take_anonymous(n)
        return self._take_victims(n)

    def remove(self, block: Any) -> None:
        """Take one block out of the middle: a request hit it in the cache.

        Raises:
            RuntimeError: the block is not free.
        """
        before, after = block.prev_free_block, block.next_free_block
        if before is None or after is None:
            raise RuntimeError(f"remove() called on an invalid block: {block}")
        before.next_free_block = after
        after.prev_free_block = before
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1
        if self._tracking:
            group = self._group[block.block_id]
            if group is not None:
                group.free -= 1
                self._grouped_free -= 1

    def append(self, block: Any) -> None:
        """Free one block as the last to be evicted of its kind."""
        self.append_n([block])

    def append_n(self, blocks: list[Any]) -> None:
        """Free blocks in eviction order, after all of their kind that are free already."""
        if not blocks:
            return
        tail = self.fake_free_list_tail
        assert tail.prev_free_block is not None
        self.num_free_blocks += len(blocks)
        if not self._tracking:
            _link(blocks, tail.prev_free_block, tail)
            return
        groups, stamps, freed_at = self._group, self._stamp, self._freed_at
        stamp, now = self._next_stamp, self.now
        grown: list[Group] = []
        for block in blocks:
            i = block.block_id
            stamps[i] = stamp
            stamp += 1
            freed_at[i] = now
            group = groups[i]
            if group is None:
                end = tail
            else:
                end = group.last
                if not group.free:
                    grown.append(group)
                group.free += 1
                self._grouped_free += 1
            before = end.prev_free_block
            before.next_free_block = block
            block.prev_free_block = before
            block.next_free_block = end
            end.prev_free_block = block
        self._next_stamp = stamp
        for group in grown:
            self._place(group)

    def prepend_n(self, blocks: list[Any]) -> None:
        """Free uncached blocks, to be given away before all others."""
        if not blocks:
            return
        self.num_free_blocks += len(blocks)
        head = self.fake_free_list_head
        _link(blocks, head, head.next_free_block)
        if self._tracking:
            for block in blocks:
                self._stamp[block.block_id] = 0
                self._leave(block.block_id)

    def get_all_free_blocks(self) -> list[Any]:
        """Every free block in the order in which it would be taken now. O(n log n), for tests."""
        if not self._grouped_free:
            return list(_walk(self._anonymous))
        self._rescore()
        by_age = [g for g in self._groups if g.free and g.score is None]
        aged = list(
            heapq.merge(
                *(_walk(g) for g in (self._anonymous, *by_age)),
                key=lambda b: self._stamp[b.block_id],
            )
        )[::-1]
        scored = [(g.entry[0], g.serial, list(_walk(g))[::-1], g) for g in self._groups if g.entry]
        heapq.heapify(scored)
        order = []
        while scored:
            score, serial, blocks, group = heapq.heappop(scored)
            while aged and self._age_score(aged[-1]) <= score:
                order.append(aged.pop())
            if not group.stepwise:
                order.extend(reversed(blocks))
                continue
            order.append(blocks.pop())
            if blocks:
                value, _, _ = self._value(group, blocks[-1])
                assert value is not None
                heapq.heappush(scored, (value, serial, blocks, group))
        return order + aged[::-1]

    def iter_blocks_after(self, cursor: Any) -> Iterator[Any]:
        """Free blocks in eviction order after `cursor`, or all of them for None."""
        if not self._grouped_free:
            block = (cursor or self.fake_free_list_head).next_free_block
            while block is not None and block is not self.fake_free_list_tail:
                yield block
                block = block.next_free_block
            return
        order = iter(self.get_all_free_blocks())
        if cursor is not None:
            for block in order:
                if block is cursor:
                    break
        yield from order

    # --- sessions -----------------------------------------------------------------------------

    def adopt(self, session: Session, blocks: Iterable[Any]) -> None:
        """Make `session` an owner of the cached ones of `blocks`, a chain from its first block.

        Call while the blocks are in use. O(blocks), once for each turn.
        """
        self._tracking = True
        groups, positions = self._group, self._position
        seen: Group | None = None
        joined: Group | None = None
        for position, block in enumerate(blocks):
            if block.block_hash is None or block.is_null:
                continue
            i = block.block_id
            group = groups[i]
            if not position and group is not None and session in group.members:
                session.continued = True
            if joined is None or group is not seen:
                seen, joined = group, self._join(group, session)
            if group is joined:
                continue
            groups[i] = joined
            joined.size += 1
            positions[i] = position
            if group is not None:
                group.size -= 1
                self._drop_if_empty(group)
        if joined is not None:
            self._drop_if_empty(joined)

    def disown(self, session: Session) -> None:
        """Forget `session`: what only it owned becomes the first to go, the rest stays shared."""
        for group in list(session.groups):
            if self._by_members.get(group.members) is group:
                del self._by_members[group.members]
            group.members -= {session}
            if group.members and not group.superseded:
                self._by_members.setdefault(group.members, group)
            self._place(group)
        session.groups.clear()
        session.superseded = None

    def turn_begins(self, session: Session) -> None:
        """Blocks of the session that are free from before now on are not of its present turn."""
        session.turn_stamp = self._next_stamp
        session.continued = False

    def supersede(self, session: Session) -> None:
        """Set aside the session's own blocks that its last turn, though it began alike, left out.

        History edited or compacted is not asked for again. A turn that shares nothing with the
        chain (a side request under the same id) supersedes nothing. O(1) amortised: a block is
        set aside at most once for each time it is freed.
        """
        own = self._by_members.get(frozenset((session,)))
        if own is None or not session.continued:
            return
        stale = []
        for block in _walk(own):
            if self._stamp[block.block_id] >= session.turn_stamp:
                break
            stale.append(block)
        if not stale:
            return
        aside = session.superseded
        if aside is None:
            aside = session.superseded = self._create(own.members, superseded=True)
        _unlink_first(own, len(stale))
        _link(stale, aside.last.prev_free_block, aside.last)
        for block in stale:
            self._group[block.block_id] = aside
        for group, n in ((own, -len(stale)), (aside, len(stale))):
            group.size += n
            group.free += n
        self._drop_if_empty(own)
        self._place(aside)

    def reclassify(self, session: Session) -> None:
        """The session's rate has changed: give its blocks their new value. O(its groups)."""
        for group in session.groups:
            self._place(group)

    def reset(self) -> None:
        """The prefix cache was reset: no block is cached, so none belongs to a session."""
        order = self.get_all_free_blocks()
        for group in list(self._groups):
            group.size = 0
            self._drop_if_empty(group)
        self._group = [None] * len(self._group)
        self._stamp = [0] * len(self._stamp)
        self._grouped_free = 0
        self._tracking = False
        _link(order, self.fake_free_list_head, self.fake_free_list_tail)

    def groups(self) -> Iterator[Group]:
        """Every group that has blocks, free or in use."""
        return iter(self._groups)

    # --- order --------------------------------------------------------------------------------

    def _take_anonymous(self, n: int) -> list[Any]:
        """Stock's order: from the front of the one list."""
        taken = _unlink_first(self._anonymous, n)
        self._count(taken, "lru")
        if self._tracking:
            for block in taken:
                self._stamp[block.block_id] = 0
        return taken

    def _count(self, taken: list[Any], cause: Cause) -> None:
        hashes = [block.block_hash for block in taken]
        self.evictions[cause] += len(hashes) - hashes.count(None)
        if self.ledger is not None:
            self.ledger.record(hashes, self.now)

    def _take_victims(self, n: int) -> list[Any]:
        taken: list[Any] = []
        front = self._anonymous
        while len(taken) < n:
            head = front.first.next_free_block
            if (
                head is not front.last
                and head.block_hash is None
                and not self._stamp[head.block_id]
            ):
                _unlink_first(front, 1)
                taken.append(head)
                continue
            if self.now >= self._rescore_at:
                self._rescore()
            worst = self._least_valuable()
            oldest = self._oldest()
            score = worst.score if worst is not None else None
            if oldest is None or (
                score is not None and self._age_score(oldest.first.next_free_block) > score
            ):
                assert worst is not None, "fewer blocks linked than counted free"
                k = 1 if worst.stepwise else min(n - len(taken), worst.free)
                victims = _unlink_first(worst, k)
                cause = worst.cause
            else:
                victims = self._take_aged(oldest, n - len(taken), score)
                worst, cause = oldest, "lru"
            self._account(worst, victims, cause)
            taken.extend(victims)
        return taken

    def _take_aged(self, group: Group, n: int, score: float | None) -> list[Any]:
        """A run from the front of the oldest list, while it stays oldest and least valuable."""
        rivals = [entry[0] for entry in self._lru[:3] if entry[2] is not group]
        if group is not self._anonymous:
            head = self.fake_free_list_head.next_free_block
            if head is not self.fake_free_list_tail:
                rivals.append(self._stamp[head.block_id])
        limit = min(rivals, default=self._next_stamp)
        k = 0
        for block in _walk(group):
            if k == n or (k and self._stamp[block.block_id] >= limit):
                break
            if k and score is not None and self._age_score(block) > score:
                break
            k += 1
        return _unlink_first(group, k)

    def _account(self, group: Group, victims: list[Any], cause: Cause) -> None:
        """Keep the books for blocks just unlinked from `group`."""
        self._count(victims, cause)
        for block in victims:
            self._group[block.block_id] = None
        if group is self._anonymous:
            return
        group.free -= len(victims)
        group.size -= len(victims)
        self._grouped_free -= len(victims)
        for session in group.members:
            session.evicted_blocks += len(victims)
        if group.free and group.score is not None:
            self._place(group)
        self._drop_if_empty(group)

    def _oldest(self) -> Group | None:
        """The list whose front is next in stock's order."""
        heap = self._lru
        oldest: Group | None = None
        while heap:
            stamp, serial, group = heap[0]
            if not group.free or group.score is not None:
                heapq.heappop(heap)
                group.in_lru = False
                continue
            first = self._stamp[group.first.next_free_block.block_id]
            if first == stamp:
                oldest = group
                break
            heapq.heapreplace(heap, (first, serial, group))
        head = self.fake_free_list_head.next_free_block
        if head is self.fake_free_list_tail:
            return oldest
        if oldest is None or self._stamp[head.block_id] < heap[0][0]:
            return self._anonymous
        return oldest

    def _least_valuable(self) -> Group | None:
        heap = self._scored
        while heap:
            entry = heap[0]
            group = entry[2]
            if group.entry is entry and group.free:
                return group
            heapq.heappop(heap)
            if group.entry is entry:
                group.entry = None
        return None

    def _place(self, group: Group) -> None:
        """Value the group by its first block and file it under its order."""
        group.entry = None
        if not group.free:
            return
        head = group.first.next_free_block
        group.score, group.cause, group.stepwise = self._value(group, head)
        if group.score is None:
            if not group.in_lru:
                group.in_lru = True
                heapq.heappush(self._lru, (self._stamp[head.block_id], group.serial, group))
            return
        if len(self._scored) > 4 * len(self._groups) + 64:
            self._scored = [e for e in self._scored if e[2].entry is e]
            heapq.heapify(self._scored)
        group.entry = (group.score, group.serial, group)
        heapq.heappush(self._scored, group.entry)

    def _value(self, group: Group, block: Any) -> tuple[float | None, Cause, bool]:
        """Value of the group's `block` (None: by age), why it goes, whether the next may differ."""
        if group.superseded and group.members:
            return 0.0, "superseded", False
        if not group.members:
            return 0.0, "lru", False
        i = block.block_id
        token = self._position[i] * self.tokens_per_block
        best: float | None = None
        aged = stepwise = False
        for session in group.members:
            rate = session.rate
            if session.retentions:
                stepwise = True
                rate = session.rate_at(token, self.now)
            if rate is None:
                aged = True
            elif best is None or rate > best:
                best = rate
        if best is None and not stepwise:
            return None, "lru", False
        cause: Cause = "lru" if best is None else "forecast" if best else "ended"
        # A prefix that several sessions had in common will find others: it only ages.
        if aged or (group.shared and not best):
            stepwise = True
            best = max(best or 0.0, 1 / max(self.now - self._freed_at[i], _MIN_AGE_S))
        assert best is not None
        value: float = best * recompute_cost(token, self.parity_tokens)
        return value, cause, stepwise

    def _age_score(self, block: Any) -> float:
        if block.block_hash is None:
            return 0.0
        i = block.block_id
        if self._group[i] is None:  # its place in a chain was never learned; vLLM knows the end
            token: int = getattr(block, "block_hash_num_tokens", None) or 0
        else:
            token = self._position[i] * self.tokens_per_block
        age = max(self.now - self._freed_at[i], _MIN_AGE_S)
        score: float = recompute_cost(token, self.parity_tokens) / age
        return score

    def _rescore(self) -> None:
        """Let every forecast age to `now`. O(sessions)."""
        started = time.perf_counter()
        self._rescore_at = self.now + RESCORE_S
        self._scored.clear()
        refreshed: set[Session] = set()
        for group in self._groups:
            for session in group.members:
                if session not in refreshed:
                    refreshed.add(session)
                    session.refresh(self.now)
        for group in self._groups:
            self._place(group)
        self.scoring_s += time.perf_counter() - started

    # --- ownership ----------------------------------------------------------------------------

    def _join(self, group: Group | None, session: Session) -> Group:
        """The group of `group`'s owners and `session`."""
        if group is not None and session in group.members and not group.superseded:
            return group
        members = frozenset((session,)) | (group.members if group is not None else frozenset())
        joined = self._by_members.get(members)
        if joined is None:
            joined = self._by_members[members] = self._create(members)
        return joined

    def _create(self, members: frozenset[Session], superseded: bool = False) -> Group:
        group = Group(next(self._serials), members, superseded)
        self._groups.add(group)
        for session in members:
            session.groups.add(group)
        return group

    def _leave(self, block_id: int) -> None:
        group = self._group[block_id]
        if group is not None:
            self._group[block_id] = None
            group.size -= 1
            self._drop_if_empty(group)

    def _drop_if_empty(self, group: Group) -> None:
        if group.size or group not in self._groups:
            return
        self._groups.discard(group)
        group.entry = None
        if self._by_members.get(group.members) is group:
            del self._by_members[group.members]
        for session in group.members:
            session.groups.discard(group)
            if session.superseded is group:
                session.superseded = None
        if not self._groups:
            self._lru.clear()
            self._scored.clear()
        elif len(self._lru) > 2 * len(self._groups) + 64:
            self._lru = [e for e in self._lru if e[2].size]
            heapq.heapify(self._lru)


def _link(blocks: list[Any], before: Any, after: Any) -> None:
    """Chain `blocks` between two neighbours."""
    for block in blocks:
        before.next_free_block = block
        block.prev_free_block = before
        before = block
    before.next_free_block = after
    after.prev_free_block = before


def _unlink_first(group: Group, n: int) -> list[Any]:
    """Take the first `n` blocks off the group's list."""
    taken = []
    block = group.first.next_free_block
    for _ in range(n):
        taken.append(block)
        following = block.next_free_block
        block.prev_free_block = block.next_free_block = None
        block = following
    group.first.next_free_block = block
    block.prev_free_block = group.first
    return taken


def _walk(group: Group) -> Iterator[Any]:
    block, last = group.first.next_free_block, group.last
    while block is not last:
        yield block
        block = block.next_free_block
