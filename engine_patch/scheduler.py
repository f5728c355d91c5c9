"""vLLM's scheduler with reuse-aware eviction and waiting order.

Launch vLLM with `--scheduler-cls engine_patch.scheduler.ReuseAwareScheduler`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine_patch import vllm_seam

if not vllm_seam.switched_off():
    vllm_seam.check()

from vllm.v1.core.kv_cache_utils import get_block_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from engine_patch import metrics
from engine_patch.forecast import attention_parity_tokens
from engine_patch.hints import ACTION_VERSIONS, PROTOCOL_VERSION, HintBook, HintError, parse
from engine_patch.order import MAX_WAIT_S, WaitingOrder
from engine_patch.queue import ReuseAwareFreeQueue
from engine_patch.regret import EvictionLedger
from engine_patch.sessions import MAX_SESSIONS, SessionTable

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.engine_patch")

# The waiting queue is arranged when a request arrives and every so many steps, the less often
# the longer it is.
_STEPS_APART, _LONG_QUEUE = 4, 64


class _ReuseAware:
    """What is added to a vLLM scheduler; every method calls stock's.

    Environment: `CACHEWISE_MAX_WAIT_S` (default 30) bounds how long a request waits behind
    younger ones, `CACHEWISE_MAX_SESSIONS` (default 20,000) how many sessions are remembered.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reuse: Reuse | None = None
        refusal = _unsupported(self)
        if refusal:
            logger.warning("CacheWise patch inactive, vLLM runs as stock: %s", refusal)
            return
        self._reuse = Reuse(self)
        logger.info("CacheWise patch active: %s", self._reuse.describe())

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        reuse = self._reuse
        if reuse is None:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        reuse.before_step()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        reuse.after_step(output)
        return output

    def add_request(self, request: Request) -> None:
        known = request.request_id in self.requests  # type: ignore[attr-defined]
        super().add_request(request)  # type: ignore[misc]
        if self._reuse is not None and not known:
            self._reuse.arrived(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._reuse is not None:
            self._reuse.finished(request)
        return freed

    def _free_request_blocks(self, request: Request) -> None:
        if self._reuse is not None:
            self._reuse.freeing(request)
        super()._free_request_blocks(request)  # type: ignore[misc]

    def cachewise(self, operation: str, argument: str) -> str:
        """The engine core's utility call: JSON in, JSON out (see `middleware`)."""
        if self._reuse is None:
            return json.dumps({"active": False})
        return json.dumps(self._reuse.call(operation, argument))


class Reuse:
    """The patch's state in one scheduler: queue, sessions, hints, waiting order."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.clock: Callable[[], float] = time.monotonic
        manager = scheduler.kv_cache_manager
        pool = self._pool = manager.block_pool
        self.ledger = EvictionLedger(pool.num_gpu_blocks, scheduler.block_size, get_block_hash)
        self.queue = ReuseAwareFreeQueue(
            pool.free_block_queue.get_all_free_blocks(),
            tokens_per_block=scheduler.block_size,
            parity_tokens=attention_parity_tokens(
                scheduler.vllm_config.model_config.get_hidden_size()
            ),
        )
        pool.free_block_queue = self.queue
        pool.reset_prefix_cache = _then(pool.reset_prefix_cache, self.queue.reset)
        self.sessions = SessionTable(
            self.queue, int(os.environ.get("CACHEWISE_MAX_SESSIONS", MAX_SESSIONS))
        )
        self.hints = HintBook(self.sessions)
        self.order = WaitingOrder(float(os.environ.get("CACHEWISE_MAX_WAIT_S", MAX_WAIT_S)))
        self._group = _full_attention_group(scheduler)
        self._orders = self._group is not None and scheduler.policy == SchedulingPolicy.FCFS
        self._steps = 0
        self._arrivals = False
        self._ordering_s = 0.0

    def describe(self) -> str:
        """One line for the log: what is on, and what stays stock's and why."""
        if self._orders:
            return "reuse-aware eviction and waiting order"
        why = (
            "no full-attention KV cache group of the hash block size"
            if self._group is None
            else "the scheduling policy is priority"
        )
        return f"reuse-aware eviction; the waiting order stays stock's ({why})"

    # --- the scheduler's events ---

    def before_step(self) -> None:
        """Set the time and, while any hint lives, arrange the waiting queue."""
        now = self.queue.now = self.clock()
        self.sessions.sweep(now)
        hinted = self.sessions.hinted(now)
        self.queue.ledger = self.ledger if hinted else None
        waiting = self._scheduler.waiting
        self._steps += 1
        if (
            not self._orders
            or len(waiting) < 2
            or not (self._arrivals or self._steps % _STEPS_APART == 0)
            or self._steps % (1 + len(waiting) // (2 * _LONG_QUEUE))
            or not hinted
        ):
            return
        self._arrivals = False
        started = time.perf_counter()
        present = list(waiting)
        arranged = self.order.arrange(present, now, self._missing_blocks, self._evictions, _resumed)
        if arranged != present:
            waiting.clear()
            waiting.extend(arranged)
        self._ordering_s += time.perf_counter() - started

    def after_step(self, output: SchedulerOutput) -> None:
        """Note who was admitted."""
        if len(self.order):
            self.order.admitted(output.num_scheduled_tokens, self.queue.now)

    def arrived(self, request: Request) -> None:
        """A request waits; what it asks for again was evicted too early."""
        now = self.queue.now = self.clock()
        self.order.arrived(request.request_id, now)
        self._arrivals = True
        self.ledger.asked(request.block_hashes, now)
        if request.session_id:
            self.sessions.turn_arrived(request.session_id, now)
        if request.kv_hints is not None:
            self._apply_with_request(request, now)

    def freeing(self, request: Request) -> None:
        """A request's blocks are about to be freed, at its end or because it is preempted."""
        if request.session_id:
            now = self.queue.now = self.clock()
            manager = self._scheduler.kv_cache_manager
            for blocks in manager.get_blocks(request.request_id).blocks:
                self.sessions.blocks_freed(request.session_id, blocks, now)

    def finished(self, request: Request) -> None:
        """A request has ended: answered, aborted or failed."""
        self.order.left(request.request_id)
        if request.session_id:
            self.sessions.turn_finished(request.session_id, self.clock())

    # --- calls from the API server ---

    def call(self, operation: str, argument: str) -> Any:
        """Answer one operation of `middleware`."""
        now = self.queue.now = self.clock()
        if operation == "hints":
            envelope, actions = parse(argument.encode())
            answers = self.hints.apply(envelope, actions, now)
            return {"results": [_answer(a) for a in answers]}
        if operation == "capabilities":
            return {
                "active": True,
                "waiting_order": self._orders,
                "protocol_versions": [PROTOCOL_VERSION],
                "actions": {name: [v] for name, v in ACTION_VERSIONS.items()},
                "block_size": self._scheduler.block_size,
                "num_blocks": self._pool.num_gpu_blocks,
                "capacity_tokens": (self._pool.num_gpu_blocks - 1) * self._scheduler.block_size,
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

    def _apply_with_request(self, request: Request, now: float) -> None:
        hints: Any = request.kv_hints
        try:
            envelope, actions = parse(
                {
                    "protocol_version": hints.protocol_version,
                    "message_id": hints.message_id,
                    "actions": [
                        {name: getattr(action, name) for name in action.__struct_fields__}
                        for action in hints.actions
                    ],
                }
            )
        except HintError as error:  # another front end's; ours checks before it sends
            logger.warning("kv_hints of request %s ignored: %s", request.request_id, error)
            return
        self.hints.apply(envelope, actions, now, request.session_id)

    # --- the waiting order's view ---

    def _missing_blocks(self, request: Request) -> int:
        """Blocks of the request that are not resident.

        Sessions shrink from their tail, so residency falls once along a chain and a binary
        search finds where; an estimate for the order alone, vLLM looks again at admission.
        """
        hashes = request.block_hashes
        pool, groups = self._pool, [self._group]
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if pool.get_cached_block(hashes[middle], groups) is None:
                high = middle
            else:
                low = middle + 1
        missing: int = -(-request.num_tokens // self._scheduler.block_size) - low
        return missing

    def _evictions(self, request: Request) -> int:
        session = self.sessions.get(request.session_id) if request.session_id else None
        return session.evicted_blocks if session is not None else 0


def _resumed(request: Request) -> bool:
    return bool(request.num_preemptions)


def _answer(answer: Any) -> dict[str, Any]:
    fields = {"action_id": answer.action_id, "status": answer.status}
    return fields | ({"reason": answer.reason} if answer.reason else {})


def _then(first: Callable[[], bool], then: Callable[[], None]) -> Callable[[], bool]:
    def both() -> bool:
        done = first()
        if done:
            then()
        return done

    return both


def _unsupported(scheduler: Any) -> str | None:
    """Why this configuration keeps stock's queue."""
    if not scheduler.kv_cache_manager.enable_caching:
        return "prefix caching is off, there is nothing to keep"
    connector = type(scheduler.connector).__name__
    if connector == "SimpleCPUOffloadConnector":
        return f"{connector} walks the free queue at every step, in stock's order"
    return None


def _full_attention_group(scheduler: Any) -> int | None:
    """The KV cache group whose residency the waiting order reads."""
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        if (
            type(manager).__name__ == "FullAttentionManager"
            and manager.block_size == scheduler.hash_block_size
        ):
            group: int = manager.kv_cache_group_id
            return group
    return None


if vllm_seam.switched_off():

    class ReuseAwareScheduler(AsyncScheduler):
        """Stock vLLM: `CACHEWISE_PATCH=off`."""

else:

    class SyncReuseAwareScheduler(_ReuseAware, Scheduler):
        """For `--no-async-scheduling`."""

    class ReuseAwareScheduler(_ReuseAware, AsyncScheduler):  # type: ignore[no-redef]
        """vLLM's `AsyncScheduler` that evicts by expected reuse; see the module."""

        def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
            if cls is ReuseAwareScheduler and not vllm_config.scheduler_config.async_scheduling:
                return SyncReuseAwareScheduler(vllm_config, *args, **kwargs)
            return super().__new__(cls)

    def _cachewise(self: Any, operation: str, argument: str) -> str:
        answer: str = self.scheduler.cachewise(operation, argument)
        return answer

    # A utility call of the API server names a method of the engine core.
    EngineCore.cachewise = _cachewise
