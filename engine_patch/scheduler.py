"""vLLM's scheduler with reuse-aware eviction and waiting order.

Launch vLLM with `--scheduler-cls engine_patch.scheduler.ReuseAwareScheduler`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from engine_patch import vllm_seam

if not vllm_seam.switched_off():
    vllm_seam.check()

from vllm.v1.core.kv_cache_utils import get_block_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from engine_patch.forecast import attention_parity_tokens
from engine_patch.hints import HintError, parse
from engine_patch.order import MAX_WAIT_S
from engine_patch.queue import ReuseAwareFreeQueue
from engine_patch.regret import EvictionLedger
from engine_patch.reuse import Reuse
from engine_patch.sessions import MAX_SESSIONS

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.engine_patch")


class _ReuseAware:
    """What is added to a vLLM scheduler; every method calls stock's.

    Environment: `CACHEWISE_MAX_WAIT_S` (default 30) bounds how long a request waits behind
    younger ones, `CACHEWISE_MAX_SESSIONS` (default 20,000) how many sessions are remembered.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reuse: VllmReuse | None = None
        refusal = _unsupported(self)
        if refusal:
            logger.warning("CacheWise patch inactive, vLLM runs as stock: %s", refusal)
            return
        self._reuse = VllmReuse(self)
        logger.info("CacheWise patch active: %s", self._reuse.describe())

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        reuse = self._reuse
        if reuse is None:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        reuse.before_step(self.waiting)  # type: ignore[attr-defined]
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if output.scheduled_new_reqs:
            reuse.after_step([request.req_id for request in output.scheduled_new_reqs])
        return output

    def add_request(self, request: Request) -> None:
        known = request.request_id in self.requests  # type: ignore[attr-defined]
        super().add_request(request)  # type: ignore[misc]
        if self._reuse is not None and not known:
            self._reuse.add(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._reuse is not None:
            self._reuse.finished(request)
        return freed

    def _free_request_blocks(self, request: Request) -> None:
        if self._reuse is not None:
            self._reuse.free(request)
        super()._free_request_blocks(request)  # type: ignore[misc]

    def cachewise(self, operation: str, argument: str) -> str:
        """The engine core's utility call: JSON in, JSON out (see `endpoints`)."""
        if self._reuse is None:
            return _json({"active": False})
        return _json(self._reuse.call(operation, argument))


class VllmReuse(Reuse):
    """The patch's state in one of vLLM's schedulers."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        pool = scheduler.kv_cache_manager.block_pool
        queue = ReuseAwareFreeQueue(
            pool.free_block_queue.get_all_free_blocks(),
            tokens_per_block=scheduler.block_size,
            parity_tokens=attention_parity_tokens(
                scheduler.vllm_config.model_config.get_hidden_size()
            ),
        )
        pool.free_block_queue = queue
        pool.reset_prefix_cache = _then(pool.reset_prefix_cache, queue.reset)
        group = _full_attention_group(scheduler)
        first_come = scheduler.policy == SchedulingPolicy.FCFS
        self._stock_order = (
            "no full-attention KV cache group of the hash block size"
            if group is None
            else None
            if first_come
            else "the scheduling policy is priority"
        )

        def is_cached(block_hash: Any) -> bool:
            return pool.get_cached_block(block_hash, [group]) is not None

        super().__init__(
            queue,
            EvictionLedger(pool.num_gpu_blocks, scheduler.hash_block_size, get_block_hash),
            num_blocks=pool.num_gpu_blocks,
            is_cached=is_cached if self._stock_order is None else None,
            max_sessions=int(os.environ.get("CACHEWISE_MAX_SESSIONS", MAX_SESSIONS)),
            max_wait_s=float(os.environ.get("CACHEWISE_MAX_WAIT_S", MAX_WAIT_S)),
        )

    def describe(self) -> str:
        """One line for the log: what is on, and what stays stock's and why."""
        if self._stock_order is None:
            return "reuse-aware eviction and waiting order"
        return f"reuse-aware eviction; the waiting order stays stock's ({self._stock_order})"

    def free(self, request: Request) -> None:
        """A request's blocks are about to be freed, at its end or because it is preempted."""
        if request.session_id:
            manager = self._scheduler.kv_cache_manager
            self.freeing(request, manager.get_blocks(request.request_id).blocks)

    def add(self, request: Request) -> None:
        """A request waits, perhaps with hints."""
        self.arrived(request, request.block_hashes)
        hints: Any = request.kv_hints
        if hints is None:
            return
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
        self.hinted_with(request, envelope, actions)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


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
