"""What a scheduler adds to become reuse-aware: queue, sessions, hints and waiting order, joined.

A scheduler tells of four events (a request arrives, its blocks are freed, it ends, a step begins)
and asks for nothing but the order of its waiting queue. vLLM's (`scheduler`) and the embedded
pod's use this same class.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from typing import Any, Protocol

from engine_patch import metrics
from engine_patch.hints import (
    ACTION_VERSIONS,
    PROTOCOL_VERSION,
    Answer,
    Envelope,
    HintBook,
    Parsed,
    parse,
)
from engine_patch.order import MAX_WAIT_S, WaitingOrder
from engine_patch.queue import Block, ReuseAwareFreeQueue
from engine_patch.regret import EvictionLedger
from engine_patch.sessions import MAX_SESSIONS, SessionTable

# A waiting queue is arranged the less often the longer it is.
_LONG_QUEUE = 128
_TIDY_S = 5.0
# A pod whose capabilities nobody has asked for, and to whom nobody has sent a hint, for so long
# does not follow whose blocks are whose.
ATTENTIVE_S = 600.0


class Request(Protocol):
    """What is read of a request, by vLLM's names."""

    request_id: str
    session_id: str | None

    @property
    def num_tokens(self) -> int: ...
    @property
    def block_hashes(self) -> Sequence[Any]: ...


class Reuse:
    """The reuse-aware state of one scheduler.

    Args:
        queue: the pool's free queue; its `tokens_per_block` is the scheduler's block size.
        ledger: sized for the pool.
        num_blocks: blocks of the pool, with the null block.
        is_cached: whether a block of this hash is resident; None leaves the waiting order alone.
        max_sessions: see `SessionTable`.
        max_wait_s: see `WaitingOrder`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        queue: ReuseAwareFreeQueue,
        ledger: EvictionLedger,
        *,
        num_blocks: int,
        is_cached: Callable[[Any], bool] | None,
        max_sessions: int = MAX_SESSIONS,
        max_wait_s: float = MAX_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue = queue
        self.ledger = ledger
        self.clock = clock
        self.sessions = SessionTable(queue, max_sessions)
        self.hints = HintBook(self.sessions)
        self.order = WaitingOrder(max_wait_s)
        self._num_blocks = num_blocks
        self._is_cached = is_cached
        self._steps = 0
        self._tidy_at = float("-inf")
        self._attentive_until = float("-inf")
        self._ordering_s = 0.0

    # --- the scheduler's events ---

    def before_step(self, waiting: MutableSequence[Any]) -> None:
        """Set the time and, while any hint lives and the pool is short, put the waiting requests in
        order."""
        now = self.queue.now = self.clock()
        if now >= self._tidy_at:
            self._tidy_at = now + _TIDY_S
            self.sessions.sweep(now)
            self.ledger.expire(now)
        hinted = self.sessions.hinted(now)
        self.queue.ledger = self.ledger if hinted else None
        self._steps += 1
        if (
            self._is_cached is None
            or len(waiting) < 2
            or not hinted
            or not self.order.due(waiting, now)
            or self._steps % (1 + len(waiting) // _LONG_QUEUE)
            or self._all_fit(waiting)
        ):
            return
        started = time.perf_counter()
        self.order.arrange(waiting, now, self._missing_blocks, self._evictions)
        self._ordering_s += time.perf_counter() - started

    def _all_fit(self, waiting: Iterable[Request]) -> bool:
        """Whether the pool holds all that wait beside all that run: then serving one costs another
        no block, whatever the order, and it stays first come first served."""
        room_tokens = self.queue.num_free_blocks * self.queue.tokens_per_block
        for request in waiting:
            room_tokens -= request.num_tokens
            if room_tokens < 0:
                return False
        return True

    def after_step(self, request_ids: Iterable[str]) -> None:
        """Note who was admitted."""
        now = self.queue.now
        if self._is_cached is not None and self.sessions.hinted(now):
            self.order.admitted(request_ids, now)
        else:
            for request_id in request_ids:
                self.order.left(request_id)

    def arrived(self, request: Request, asked: Sequence[Any]) -> None:
        """A request waits; what it asks for again (`asked`: hashes) was evicted too early."""
        now = self.queue.now = self.clock()
        self.order.arrived(request.request_id, now)
        self.ledger.asked(asked, now)
        if request.session_id:
            self.sessions.turn_arrived(request.session_id, now)

    def freeing(self, request: Request, chains: Iterable[Sequence[Block]]) -> None:
        """Blocks are about to be freed: the request ends or is preempted.

        Whose they are is kept once hints are to be expected; before that it changes nothing.

        Args:
            request: their holder.
            chains: its blocks of each KV cache group, first to last.
        """
        now = self.clock()
        if request.session_id and (now < self._attentive_until or self.sessions.hinted(now)):
            self.queue.now = now
            for blocks in chains:
                self.sessions.blocks_freed(request.session_id, blocks, now)

    def finished(self, request: Request) -> None:
        """A request has ended: answered, aborted or failed."""
        self.order.left(request.request_id)
        if request.session_id:
            self.sessions.turn_finished(request.session_id, self.clock())

    def hinted_with(self, request: Request, envelope: Envelope, actions: Parsed) -> None:
        """Hints that came in the body of a request that has just arrived."""
        self._attentive_until = self.queue.now + ATTENTIVE_S
        self.hints.apply(envelope, actions, self.queue.now, request.session_id)

    # --- calls from the API server ---

    def call(self, operation: str, argument: str = "") -> Any:
        """Answer one operation of `endpoints`, as plain data."""
        now = self.queue.now = self.clock()
        if operation in ("hints", "capabilities"):
            self._attentive_until = now + ATTENTIVE_S
        if operation == "hints":
            envelope, actions = parse(argument.encode())
            answers = self.hints.apply(envelope, actions, now)
            return {"results": [_answer(a) for a in answers]}
        if operation == "capabilities":
            block_size = self.queue.tokens_per_block
            return {
                "active": True,
                "waiting_order": self._is_cached is not None,
                "protocol_versions": [PROTOCOL_VERSION],
                "actions": {name: [v] for name, v in ACTION_VERSIONS.items()},
                "block_size": block_size,
                "num_blocks": self._num_blocks,
                "capacity_tokens": (self._num_blocks - 1) * block_size,
                "max_sessions": self.sessions.max_sessions,
                "max_wait_s": self.order.max_wait_s,
            }
        if operation == "sessions":
            return {"sessions": metrics.session_rows(self.sessions, now)}
        if operation == "metrics":
            scoring_s = self._ordering_s + self.queue.scoring_s
            return metrics.snapshot(
                self.queue, self.sessions, self.hints, self.order, self.ledger, scoring_s
            )
        raise ValueError(f"unknown operation {operation!r}")

    # --- the waiting order's view ---

    def _missing_blocks(self, request: Request) -> int:
        """Blocks of the request that are not resident.

        Sessions shrink from their tail, so residency falls once along a chain and a binary
        search finds where, beginning at the end of the session's last turn; an estimate for the
        order alone, the scheduler looks again at admission.
        """
        hashes, is_cached = request.block_hashes, self._is_cached
        assert is_cached is not None
        block_size = self.queue.tokens_per_block
        low, high = 0, min(len(hashes), request.num_tokens // block_size)
        session = self.sessions.get(request.session_id) if request.session_id else None
        middle = min(session.chain_blocks, high) - 1 if session is not None else -1
        step = 1
        while low < high:
            if not low <= middle < high:
                middle = (low + high) // 2
            if is_cached(hashes[middle]):
                low = middle + 1
                middle += step
            else:
                high = middle
                middle -= step
            step *= 8
        return -(-request.num_tokens // block_size) - low

    def _evictions(self, request: Request) -> int:
        session = self.sessions.get(request.session_id) if request.session_id else None
        return session.evicted_blocks if session is not None else 0


def _answer(answer: Answer) -> dict[str, Any]:
    fields = {"action_id": answer.action_id, "status": answer.status}
    return fields | ({"reason": answer.reason} if answer.reason else {})
