"""What a ledger of a pod's KV events says is in its cache, against a block pool that really has
it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.embedded.block_pool import BlockPool, KVCacheBlock
from gateway.fleet.ledger import Ledger
from gateway.fleet.residency import Residency

TOKENS = 16


def ledger(max_blocks: int = 1_000) -> Ledger:
    made = Ledger(max_blocks)
    made.live = True
    return made


def test_a_session_is_resident_as_far_as_its_blocks_are() -> None:
    made = ledger()
    made.store("s", None, [1, 2, 3], TOKENS)
    made.store("s", 3, [4, 5], TOKENS)
    assert made.tokens("s") == 5 * TOKENS
    made.remove([5])
    made.remove([4, 3])
    assert made.tokens("s") == 2 * TOKENS
    made.store("s", 2, [3], TOKENS)
    assert made.tokens("s") == 3 * TOKENS
    made.remove([3, 2, 1])
    assert made.tokens("s") == 0
    assert made.total_tokens == 0


def test_sessions_that_share_a_beginning_each_have_it() -> None:
    made = ledger()
    made.store("a", None, [1, 2, 3], TOKENS)
    made.store("b", 2, [13, 14], TOKENS)
    assert (made.tokens("a"), made.tokens("b")) == (3 * TOKENS, 4 * TOKENS)
    made.remove([14, 13])
    assert (made.tokens("a"), made.tokens("b")) == (3 * TOKENS, 2 * TOKENS)
    made.remove([3, 2])
    assert (made.tokens("a"), made.tokens("b")) == (TOKENS, TOKENS)


def test_a_prompt_that_breaks_leaves_the_old_end_behind() -> None:
    made = ledger()
    made.store("s", None, [1, 2, 3, 4], TOKENS)
    made.store("s", 1, [12], TOKENS)
    assert made.tokens("s") == 2 * TOKENS
    made.remove([4, 3])
    assert made.tokens("s") == 2 * TOKENS


def test_a_block_that_is_there_twice_leaves_twice() -> None:
    made = ledger()
    for sid in "ab":
        made.store(sid, None, [1, 2], TOKENS)
    made.remove([2, 1])
    assert (made.tokens("a"), made.tokens("b")) == (2 * TOKENS, 2 * TOKENS)
    made.remove([2, 1])
    assert (made.tokens("a"), made.tokens("b")) == (0, 0)


def test_of_what_began_before_it_listened_it_says_nothing() -> None:
    made = ledger()
    made.store("s", 99, [1, 2], TOKENS)
    made.store(None, None, [7, 8], TOKENS)
    assert made.tokens("s") is None
    assert made.tokens("t") is None
    made.store("t", 8, [9], TOKENS)
    assert made.tokens("t") == 3 * TOKENS
    made.live = False
    assert made.tokens("t") is None


def test_the_beginning_of_a_block_does_not_count() -> None:
    made = ledger()
    made.store("s", None, [1, 2], TOKENS)
    made.store("s", 2, [77], TOKENS // 4)
    assert made.tokens("s") == 2 * TOKENS


def test_too_many_blocks_are_given_up() -> None:
    made = ledger(max_blocks=10)
    assert made.store("s", None, range(10), TOKENS)
    assert not made.store("s", 9, [10], TOKENS)
    assert len(made) == 0
    assert made.tokens("s") is None


@pytest.mark.parametrize("live", [True, False])
def test_what_is_known_goes_before_what_is_believed(live: bool) -> None:
    residency = Residency(10_000)
    residency.ledger = ledger()
    residency.touch("s", 5_000, [(11, 4_000)])
    residency.touch("t", 3_000, [])
    residency.ledger.store("s", None, range(100), TOKENS)
    residency.ledger.live = live
    assert residency.tokens("s") == (1_600 if live else 5_000)
    assert residency.shared_tokens([(11, 4_000)]) == (1_600 if live else 4_000)
    assert residency.tokens("t") == 3_000
    assert residency.knows("s") is live
    assert not residency.knows("t")
    assert residency.resident_tokens == (1_600 if live else 8_000)
    residency.drop("s")
    assert residency.tokens("s") == 0


class Pool(BlockPool):
    """Tells the ledger what vLLM would tell."""

    def __init__(self, num_blocks: int, told: Ledger, after_removal: Callable[[], None]) -> None:
        super().__init__(num_blocks, TOKENS)
        self.told = told
        self.after_removal = after_removal

    def _forget(self, block: KVCacheBlock) -> None:
        assert block.block_hash is not None
        self.told.remove([block.block_hash])
        super()._forget(block)
        self.after_removal()

    def stored(
        self, sid: str, blocks: Sequence[KVCacheBlock], hashes: Sequence[int], first: int
    ) -> None:
        self.cache(blocks, hashes, first, len(hashes))
        self.told.store(sid, hashes[first - 1] if first else None, hashes[first:], TOKENS)


class Engine(RuleBasedStateMachine):
    """Sessions that grow, break and fork, several requests at once, in a pool too small for all.

    What of a session is there is what the pool has of its prompt; but what others bring back after
    it was evicted, the ledger leaves to them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.told = ledger()
        self.pool = Pool(40, self.told, self.note_residents)
        self.prompts: dict[str, list[int]] = {}
        self.running: list[tuple[str, list[int], list[KVCacheBlock]]] = []
        self.resident: dict[str, int] = {}
        """Least blocks of each session since its last request that stored any."""
        self.fresh = 1

    def hashes(self, count: int) -> list[int]:
        self.fresh += count
        return list(range(self.fresh - count, self.fresh))

    @rule(sid=st.sampled_from("abcdef"), grows=st.integers(0, 6), keeps=st.integers(0, 30))
    def request(self, sid: str, grows: int, keeps: int) -> None:
        """A turn: the prompt is the old one as far as it is kept, and something new."""
        prompt = self.prompts.get(sid, [])[: max(keeps, 1)] + self.hashes(grows)
        self._run(sid, prompt[:30])

    @precondition(lambda self: self.prompts)
    @rule(sid=st.sampled_from("abcdef"), origin=st.integers(0, 5), shares=st.integers(1, 20))
    def fork(self, sid: str, origin: int, shares: int) -> None:
        prompts = list(self.prompts.values())
        prompt = prompts[origin % len(prompts)]
        self._run(sid, (prompt[:shares] + self.hashes(2))[:30])

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 20))
    def twice(self, number: int) -> None:
        """Another request computes the same at the same time."""
        sid, prompt, _ = self.running[number % len(self.running)]
        self._run(sid, prompt, hit_blocks=0)

    def _run(self, sid: str, prompt: list[int], hit_blocks: int | None = None) -> None:
        hit = self.pool.find_longest_hit(prompt, len(prompt) if hit_blocks is None else hit_blocks)
        free = self.pool.num_free_blocks - sum(block.ref_cnt == 0 for block in hit)
        if not prompt or len(prompt) - len(hit) > free:
            return
        self.pool.touch(hit)
        blocks = hit + self.pool.allocate(len(prompt) - len(hit))
        if len(hit) < len(prompt):
            self.pool.stored(sid, blocks, prompt, len(hit))
            self.prompts[sid] = prompt
            self.resident[sid] = len(prompt)
        self.running.append((sid, prompt, blocks))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 20))
    def finish(self, number: int) -> None:
        _, _, blocks = self.running.pop(number % len(self.running))
        self.pool.free(blocks)

    def note_residents(self) -> None:
        for sid, before in self.resident.items():
            found = len(self.pool.find_longest_hit(self.prompts[sid], before))
            self.resident[sid] = found

    @invariant()
    def the_ledger_says_what_the_pool_has(self) -> None:
        for sid, blocks in self.resident.items():
            assert self.told.tokens(sid) == blocks * TOKENS, sid

    @invariant()
    def it_keeps_no_more_than_the_pool(self) -> None:
        assert len(self.told) <= self.pool.num_cached_blocks
        assert sum(map(len, self.told._tips.values())) <= len(self.resident)


Engine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestEngine = Engine.TestCase
