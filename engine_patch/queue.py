"""The pod's free KV blocks in eviction order: stock LRU, bent by what sessions are about to need.

Same interface as vLLM's `FreeKVCacheBlockQueue` (0.32, 0.33), and the same order, block for block,
as long as no session has a live hint.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
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
# Shared by more sessions than this, a group is valued at a rescore and not at every event.
_FEW_OWNERS = 4


class Block(Protocol):
    """What the queue reads and writes of vLLM's `KVCacheBlock`."""

    block_id: int
    ref_cnt: int
    prev_free_block: Any
    next_free_block: Any

    @property
    def block_hash(self) -> Any: ...
    @property
    def block_hash_num_tokens(self) -> int | None: ...


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
        "held",
        "in_lru",
        "last",
        "members",
        "placed_at",
        "rate",
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
        self.size = 0  # blocks of a group with members, free or in use
        self.held = Run(self)
        self.first: Any = _End()
        self.last: Any = _End()
        self.first.next_free_block = self.last
        self.last.prev_free_block = self.first
        self.score: float | None = None  # None: by age, in the LRU order of the whole pod
        self.rate: float | None = None  # of the owner that is back soonest, at the first block
        self.placed_at = float("-inf")  # when it was valued
        self.cause: Cause = "lru"
        self.stepwise = False  # the score may rise from one block to the next
        self.entry: tuple[float, int, Group] | None = None
        self.in_lru = False

    @property
    def has_free(self) -> bool:
        """Whether any of its blocks is free."""
        return self.first.next_free_block is not self.last


class Run:
    """Blocks of one group given back together: when, and where in the LRU order of the pod.

    What the queue knows of a block is its run. A block in use keeps its last one, or has its
    group's `held` one if it has never been free.
    """

    __slots__ = ("freed_at", "group", "stamp")

    def __init__(self, group: Group, stamp: int = 0, freed_at: float = 0.0) -> None:
        self.group = group
        self.stamp = stamp
        self.freed_at = freed_at


class ReuseAwareFreeQueue:
    """Free blocks, taken in this order: uncached ones, then the least valuable cached one.

    A block's value is `reuse rate x recompute cost` (see `forecast`): reuses expected per second
    of waiting, times the prefill it would cost. The rate of a block shared by several sessions is
    that of the one that returns soonest. Blocks without a live hint are worth `1 / age`, the rate
    of the heavy-tailed gap an LRU order assumes, so hinted and anonymous blocks meet on one scale
    and neither starves the other; among themselves they keep stock's order exactly.

    Costs: append, remove and touch O(1); an eviction O(log groups), where groups are the distinct
    sets of owners, about one for each session and branching; a rescore O(groups), at most every
    `RESCORE_S` and only when a cached block must go. Nothing is scored per block. Until a session
    owns blocks, the queue is one list and does what stock's does.

    Args:
        blocks: the free blocks in stock's order; their ids index the queue's array.
        tokens_per_block: tokens of a block.
        parity_tokens: `forecast.recompute_cost`'s parity of the model.
        ledger: remembers evicted blocks to find those that come back; optional.

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

        # By block id; None for a block that is uncached, or was freed before any was owned.
        self._run: list[Run | None] = [None] * (max((b.block_id for b in blocks), default=-1) + 1)
        self._tracking = False
        self._next_stamp = 1

        self._groups: set[Group] = set()
        self._by_members: dict[frozenset[Session], Group] = {}
        # Heaps with lazy deletion: an entry counts if its group still says so.
        self._lru: list[tuple[int, int, Group]] = []
        self._scored: list[tuple[float, int, Group]] = []
        self._rescore_at = 0.0
        # The group that victims come from, until anything is valued anew.
        self._giving: Group | None = None

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
        if self._groups:
            taken = self._take_victims(n)
        else:
            taken = _unlink_first(self._anonymous, n)
            self._count(taken, "lru")
        if self._tracking:
            runs = self._run
            for block in taken:
                runs[block.block_id] = None
        return taken

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
        runs, now = self._run, self.now
        group = self._anonymous
        run = Run(group, self._next_stamp, now)
        end = group.last
        before = end.prev_free_block
        seen: Run | None = None
        grown: list[Group] = []
        for block in blocks:
            held = runs[block.block_id]
            if held is not seen:
                seen = held
                owner = held.group if held is not None else self._anonymous
                if owner is not group:
                    before.next_free_block = end
                    end.prev_free_block = before
                    group = owner
                    self._next_stamp += 1
                    run = Run(group, self._next_stamp, now)
                    end = group.last
                    before = end.prev_free_block
                    if before is group.first and group is not self._anonymous:
                        grown.append(group)
            runs[block.block_id] = run
            before.next_free_block = block
            block.prev_free_block = before
            before = block
        before.next_free_block = end
        end.prev_free_block = before
        self._next_stamp += 1
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
            self._giving = None
            for block in blocks:
                self._leave(block.block_id)

    def get_all_free_blocks(self) -> list[Any]:
        """Every free block in the order in which it would be taken now. O(n log n), for tests."""
        if not self._groups:
            return list(_walk(self._anonymous))
        self._rescore()
        by_age = [g for g in self._groups if g.has_free and g.score is None]
        aged = list(heapq.merge(*map(_walk, (self._anonymous, *by_age)), key=self._stamp))[::-1]
        scored = [
            (g.entry[0], g.serial, list(_walk(g))[::-1], g)
            for g in self._groups
            if g.entry and g.has_free
        ]
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
                value = self._value(group, blocks[-1])[0]
                assert value is not None
                heapq.heappush(scored, (value, serial, blocks, group))
        return order + aged[::-1]

    def iter_blocks_after(self, cursor: Any) -> Iterator[Any]:
        """Free blocks in eviction order after `cursor`, or all of them for None."""
        if not self._groups:
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

    def adopt(self, session: Session, blocks: Sequence[Any]) -> None:
        """Make `session` an owner of the cached ones of `blocks`, a chain from its first block.

        Call while the blocks are in use. From the end, to the first block that it owns already:
        those before were adopted with it. O(new blocks), once for each turn; while blocks of the
        session are set aside the chain may have hit some of them, and all of it is looked at.
        """
        self._tracking = True
        runs = self._run
        first = runs[blocks[0].block_id] if blocks else None
        if first is not None and session in first.group.members:
            session.continued = True
        own: Group | None = None
        seen: Run | None = None
        joined: Group | None = None
        for block in reversed(blocks):
            held = runs[block.block_id]
            if held is None:
                if block.block_hash is None:
                    continue
                if own is None:
                    own = self._join(None, session)
                runs[block.block_id] = own.held
                own.size += 1
                continue
            group = held.group
            if held is not seen:
                seen = held
                joined = self._join(group, session)
            assert joined is not None
            if joined is group:
                if session.superseded is None:
                    break
                continue
            runs[block.block_id] = joined.held
            joined.size += 1
            group.size -= 1
            self._drop_if_empty(group)

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
            if self._stamp(block) >= session.turn_stamp:
                break
            stale.append(block)
        if not stale:
            return
        aside = session.superseded
        if aside is None:
            aside = session.superseded = self._create(own.members, superseded=True)
        _unlink_first(own, len(stale))
        _link(stale, aside.last.prev_free_block, aside.last)
        run = aside.held
        for block in stale:
            old = self._run[block.block_id]
            assert old is not None
            if old.stamp != run.stamp:
                run = Run(aside, old.stamp, old.freed_at)
            self._run[block.block_id] = run
        own.size -= len(stale)
        aside.size += len(stale)
        self._drop_if_empty(own)
        self._place(aside)

    def reclassify(self, session: Session) -> None:
        """The session's rate has changed: give its blocks their new value. O(its groups).

        What many sessions share is only ever raised here; a rescore lowers it.
        """
        for group in session.groups:
            if (
                len(group.members) > _FEW_OWNERS
                and group.rate is not None
                and not session.retentions
                and (session.rate is None or session.rate <= group.rate)
            ):
                continue
            self._place(group)

    def reset(self) -> None:
        """The prefix cache was reset: no block is cached, so none belongs to a session."""
        order = self.get_all_free_blocks()
        for group in list(self._groups):
            group.size = 0
            self._drop_if_empty(group)
        self._run = [None] * len(self._run)
        self._tracking = False
        _link(order, self.fake_free_list_head, self.fake_free_list_tail)

    def groups(self) -> Iterator[Group]:
        """Every group that has blocks, free or in use."""
        return iter(self._groups)

    # --- order --------------------------------------------------------------------------------

    def _take_victims(self, n: int) -> list[Any]:
        taken: list[Any] = []
        front, runs = self._anonymous, self._run
        giving = self._giving
        if giving is not None and self.now < self._rescore_at and giving.has_free:
            taken = _unlink_first(giving, n)
            self._account(giving, taken, giving.cause)
        while len(taken) < n:
            head = front.first.next_free_block
            if head is not front.last and head.block_hash is None and runs[head.block_id] is None:
                taken += _unlink_first(front, 1)
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
                victims = _unlink_first(worst, 1 if worst.stepwise else n - len(taken))
                self._giving = None if worst.stepwise else worst
                self._account(worst, victims, worst.cause)
            else:
                victims = self._take_aged(oldest, n - len(taken), score)
                self._account(oldest, victims, "lru")
            taken += victims
        return taken

    def _take_aged(self, group: Group, n: int, score: float | None) -> list[Any]:
        """A run from the front of the oldest list, while it stays oldest and least valuable."""
        rivals = [entry[0] for entry in self._lru[:3] if entry[2] is not group]
        if group is not self._anonymous and self._anonymous.has_free:
            rivals.append(self._stamp(self.fake_free_list_head.next_free_block))
        limit = min(rivals, default=self._next_stamp)
        k = 0
        for block in _walk(group):
            if k == n or (k and self._stamp(block) >= limit):
                break
            if k and score is not None and self._age_score(block) > score:
                break
            k += 1
        return _unlink_first(group, k)

    def _count(self, taken: list[Any], cause: Cause) -> None:
        hashes = [block.block_hash for block in taken]
        self.evictions[cause] += len(hashes) - hashes.count(None)
        if self.ledger is not None:
            self.ledger.record(taken, self.now)

    def _account(self, group: Group, victims: list[Any], cause: Cause) -> None:
        """Keep the books for blocks just unlinked from `group`."""
        self._count(victims, cause)
        if group is self._anonymous:
            return
        group.size -= len(victims)
        for session in group.members:
            session.evicted_blocks += len(victims)
        if group.stepwise and group.score is not None:
            self._place(group)
        self._drop_if_empty(group)

    def _stamp(self, block: Any) -> int:
        run = self._run[block.block_id]
        return run.stamp if run is not None else 0

    def _oldest(self) -> Group | None:
        """The list whose front is next in stock's order."""
        heap = self._lru
        oldest: Group | None = None
        while heap:
            stamp, serial, group = heap[0]
            if group.score is not None or not group.has_free:
                heapq.heappop(heap)
                group.in_lru = False
                continue
            first = self._stamp(group.first.next_free_block)
            if first == stamp:
                oldest = group
                break
            heapq.heapreplace(heap, (first, serial, group))
        if not self._anonymous.has_free:
            return oldest
        head = self.fake_free_list_head.next_free_block
        if oldest is None or self._stamp(head) < heap[0][0]:
            return self._anonymous
        return oldest

    def _least_valuable(self) -> Group | None:
        heap = self._scored
        while heap:
            entry = heap[0]
            group = entry[2]
            if group.entry is entry and group.has_free:
                return group
            heapq.heappop(heap)
            if group.entry is entry:
                group.entry = None
        return None

    def _place(self, group: Group) -> None:
        """Value the group by its first block and file it under its order."""
        group.entry = self._giving = None
        group.placed_at = self.now
        if not group.has_free:
            group.rate = None
            return
        head = group.first.next_free_block
        group.score, group.rate, group.cause, group.stepwise = self._value(group, head)
        if group.score is None:
            if not group.in_lru:
                group.in_lru = True
                heapq.heappush(self._lru, (self._stamp(head), group.serial, group))
            return
        if len(self._scored) > 4 * len(self._groups) + 64:
            self._scored = [e for e in self._scored if e[2].entry is e]
            heapq.heapify(self._scored)
        group.entry = (group.score, group.serial, group)
        heapq.heappush(self._scored, group.entry)

    def _value(self, group: Group, block: Any) -> tuple[float | None, float | None, Cause, bool]:
        """Value of the group's `block` (None: by age), the rate behind it, why it goes, whether
        the next block's may be higher."""
        if group.superseded and group.members:
            return 0.0, None, "superseded", False
        if not group.members:
            return 0.0, None, "lru", False
        token = self._token(block)
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
            return None, None, "lru", False
        cause: Cause = "lru" if best is None else "forecast" if best else "ended"
        worth = best or 0.0
        # A prefix that several sessions had in common will find others: it only ages.
        if aged or (group.shared and not best):
            stepwise = True
            worth = max(worth, 1 / self._age_s(block))
        return worth * recompute_cost(token, self.parity_tokens), best, cause, stepwise

    def _token(self, block: Any) -> int:
        """Where in its prompt the block begins."""
        return max((block.block_hash_num_tokens or 0) - self.tokens_per_block, 0)

    def _age_s(self, block: Any) -> float:
        run = self._run[block.block_id]
        return max(self.now - (run.freed_at if run is not None else 0.0), _MIN_AGE_S)

    def _age_score(self, block: Any) -> float:
        if block.block_hash is None:
            return 0.0
        cost: float = recompute_cost(self._token(block), self.parity_tokens)
        return cost / self._age_s(block)

    def _rescore(self) -> None:
        """Let every forecast age to `now`. O(groups)."""
        started = time.perf_counter()
        now = self.now
        self._rescore_at = now + RESCORE_S
        self._giving = None
        for group in self._groups:
            stale = group.stepwise or len(group.members) > _FEW_OWNERS
            for session in group.members:
                if now >= session.refresh_at:
                    session.refresh(now)
                if session.refreshed_at >= group.placed_at:
                    stale = True
            if stale:
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
        run = self._run[block_id]
        self._run[block_id] = None
        if run is not None:
            run.group.size -= 1
            self._drop_if_empty(run.group)

    def _drop_if_empty(self, group: Group) -> None:
        if group.size > 0 or group not in self._groups:
            return
        self._groups.discard(group)
        group.entry = None
        if self._giving is group:
            self._giving = None
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
    """Take the first blocks off the group's list, at most `n`."""
    taken = []
    block, end = group.first.next_free_block, group.last
    while n and block is not end:
        n -= 1
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
