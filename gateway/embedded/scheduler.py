"""Continuous batching with chunked prefill, as vLLM's scheduler does it, without a model.

Eviction and waiting order are the engine patch's: stock vLLM's until hints tell more.

The answer of a request is known before it starts, so a step only counts tokens: it moves KV
blocks, works out how long the step would take on the modelled hardware, and says which
requests got tokens. Pure and synchronous: the caller owns the clock.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine_patch.hints import Envelope, Parsed
from engine_patch.regret import EvictionLedger
from engine_patch.reuse import Reuse
from gateway.embedded.block_pool import BlockPool, KVCacheBlock
from gateway.embedded.histogram import Histogram
from gateway.embedded.roofline import HardwareModel, step_time_s

if TYPE_CHECKING:
    from gateway.embedded.kv_events import KvEvents

# vLLM 0.32's.
_FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_QUEUE_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Size and speed of one engine. ValueError where the cache cannot hold one full request."""

    block_size_tokens: int = 16
    kv_capacity_tokens: int = 700_000
    max_model_len: int = 262_144
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    hardware: HardwareModel = field(default_factory=HardwareModel)

    def __post_init__(self) -> None:
        if self.max_model_len > self.kv_capacity_tokens:
            raise ValueError(
                f"max_model_len ({self.max_model_len}) is more than the KV cache holds "
                f"({self.kv_capacity_tokens} tokens)"
            )

    @property
    def num_gpu_blocks(self) -> int:
        return math.ceil(self.kv_capacity_tokens / self.block_size_tokens) + 1


@dataclass(slots=True, eq=False)
class Request:
    """One generation: `output_tokens` follow `prompt_tokens`; hashes cover both, block by block."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    block_hashes: Sequence[int]
    arrival_s: float
    session_id: str | None = None
    kv_hints: tuple[Envelope, Parsed] | None = None
    generated_tokens: int = 0
    computed_tokens: int = 0
    cached_blocks: int = 0
    blocks: list[KVCacheBlock] = field(default_factory=list)
    num_cached_tokens: int | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens

    @property
    def finished(self) -> bool:
        return self.generated_tokens >= self.output_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes: tokens a request, decode iterations, and seconds it takes."""

    scheduled: dict[Request, int]
    iterations: int
    duration_s: float


@dataclass(slots=True)
class Counters:
    """Totals since the start, in tokens where not said otherwise."""

    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    finished: dict[str, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0}
    )
    first_token_s: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN_BUCKETS_S))
    """From arrival."""
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(_INTER_TOKEN_BUCKETS_S))
    queue_s: Histogram = field(default_factory=lambda: Histogram(_QUEUE_BUCKETS_S))
    """From arrival to the first step, of requests that have finished."""


class Scheduler:
    """First come, first served, while no hint lives; then whoever needs fewest blocks goes first.

    The youngest running request gives way when blocks run out. `clock` (monotonic seconds, as
    requests' arrivals) tells how long sessions have been idle and requests have waited.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        size, num_blocks = config.block_size_tokens, config.num_gpu_blocks
        self.pool = BlockPool(num_blocks, size, config.hardware.width)
        self.reuse = Reuse(
            self.pool.free_queue,
            EvictionLedger(num_blocks, size),
            num_blocks=num_blocks,
            is_cached=self.pool.is_cached,
            clock=clock,
        )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.counters = Counters()
        self._free_blocks_at_refusal: int | None = None
        self._events: KvEvents | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def tell(self, events: KvEvents) -> None:
        """Let `events` know of each block that is cached or evicted from now on."""
        self._events = events
        self.pool.on_evicted = events.removed

    def add(self, request: Request) -> None:
        """Queue a request. ValueError if it could never fit the model length."""
        if request.prompt_tokens + request.output_tokens > self.config.max_model_len:
            raise ValueError(f"request {request.request_id} is longer than max_model_len")
        self.waiting.append(request)
        prompt_blocks = request.prompt_tokens // self.config.block_size_tokens
        self.reuse.arrived(request, request.block_hashes[:prompt_blocks])
        if request.kv_hints is not None:
            self.reuse.hinted_with(request, *request.kv_hints)

    def abort(self, request: Request) -> None:
        """Drop a request wherever it is and free its blocks. Unknown requests are ignored."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return
        self.reuse.finished(request)
        self._free_blocks_at_refusal = None
        self.counters.finished["abort"] += 1

    def schedule(self, horizon_s: float = 0.0) -> Step | None:
        """Plan the next step; None when there is nothing to do.

        Where only decodes run, one step stands for as many iterations as fit in `horizon_s`
        (at least one), so that a long answer costs few wake-ups.
        """
        first = self.waiting[0] if self.waiting else None
        self.reuse.before_step(self.waiting)
        if self.waiting and self.waiting[0] is not first:
            self._free_blocks_at_refusal = None
        scheduled = self._schedule_running()
        self._schedule_waiting(scheduled)
        self.reuse.after_step(request.request_id for request in scheduled)
        if not scheduled:
            return None
        prefills: list[tuple[int, int]] = []
        decodes = decode_context_tokens = 0
        for request, new_tokens in scheduled.items():
            computed = request.computed_tokens
            if new_tokens == 1 and request.generated_tokens:
                decodes += 1
                decode_context_tokens += computed
            else:
                prefills.append((computed, new_tokens))
        hardware = self.config.hardware
        step_s = step_time_s(hardware, prefills, decode_context_tokens, decodes)
        iterations = 1
        if not prefills and horizon_s > step_s:
            iterations = self._extend_decodes(scheduled, int(horizon_s / step_s))
        self.counters.steps += iterations
        return Step(scheduled, iterations, step_s * iterations)

    def complete(self, step: Step, now: float) -> list[Request]:
        """Account a step that ended at `now`; returns the requests that got tokens by it.

        Those that are `finished` have left the engine, their blocks freed.
        """
        progressed: list[Request] = []
        running = set(self.running)
        for request, new_tokens in step.scheduled.items():
            if request not in running:  # aborted while the step ran
                continue
            request.computed_tokens += new_tokens + step.iterations - 1
            if request.computed_tokens < request.num_tokens:
                continue  # the prompt's next chunk is for a later step
            if request.first_token_s is None:
                request.first_token_s = now
                self.counters.prompt_tokens += request.prompt_tokens
                self.counters.first_token_s.observe(now - request.arrival_s)
            else:
                each_s = (now - request.last_token_s) / step.iterations
                self.counters.inter_token_s.observe(each_s, step.iterations)
            request.last_token_s = now
            request.generated_tokens += step.iterations
            self.counters.generation_tokens += step.iterations
            progressed.append(request)
            if request.finished:
                assert request.scheduled_s is not None
                self.counters.queue_s.observe(request.scheduled_s - request.arrival_s)
                self.running.remove(request)
                self._release(request)
                self.reuse.finished(request)
        return progressed

    def _schedule_running(self) -> dict[Request, int]:
        scheduled: dict[Request, int] = {}
        budget = self.config.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            new_tokens = min(request.num_tokens - request.computed_tokens, budget)
            while not self._allocate(request, new_tokens):
                victim = self.running.pop()
                self._preempt(victim)
                if victim is request:
                    break
            else:
                scheduled[request] = new_tokens
                budget -= new_tokens
                index += 1
        return scheduled

    def _schedule_waiting(self, scheduled: dict[Request, int]) -> None:
        budget = self.config.max_num_batched_tokens - sum(scheduled.values())
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            refusal = self._free_blocks_at_refusal
            if refusal is not None and self.running and self.pool.num_free_blocks <= refusal:
                return  # nothing was freed since the head of the queue did not fit
            request = self.waiting[0]
            if not self._admit(request):
                self._free_blocks_at_refusal = self.pool.num_free_blocks
                return
            self._free_blocks_at_refusal = None
            self.waiting.popleft()
            if request.scheduled_s is None:
                request.scheduled_s = self._clock()
            self.running.append(request)
            new_tokens = min(request.num_tokens - request.computed_tokens, budget)
            allocated = self._allocate(request, new_tokens)
            assert allocated, "admission made sure that the whole prompt fits"
            scheduled[request] = new_tokens
            budget -= new_tokens

    def _admit(self, request: Request) -> bool:
        """Take over the cached prefix if the rest of the prompt fits in the free blocks too.

        The whole prompt must fit, not its first chunk alone (vLLM: scheduler_reserve_full_isl).
        The last token is always computed, for its logits.
        """
        size = self.config.block_size_tokens
        hit = self.pool.find_longest_hit(request.block_hashes, (request.num_tokens - 1) // size)
        taken_from_queue = sum(block.ref_cnt == 0 for block in hit)
        missing = math.ceil(request.num_tokens / size) - len(hit)
        if missing + taken_from_queue > self.pool.num_free_blocks:
            return False
        self.pool.touch(hit)
        request.blocks = hit
        request.cached_blocks = len(hit)
        request.computed_tokens = len(hit) * size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.computed_tokens
            self.counters.prefix_cache_queries += request.num_tokens
            self.counters.prefix_cache_hits += request.computed_tokens
        return True

    def _allocate(self, request: Request, new_tokens: int) -> bool:
        """Give a request the blocks for `new_tokens` more, and cache those that get full."""
        size = self.config.block_size_tokens
        tokens = request.computed_tokens + new_tokens
        missing = math.ceil(tokens / size) - len(request.blocks)
        if missing > self.pool.num_free_blocks:
            return False
        if missing > 0:
            request.blocks += self.pool.allocate(missing)
        full = tokens // size
        if full > request.cached_blocks:
            self.pool.cache(request.blocks, request.block_hashes, request.cached_blocks, full)
            if self._events is not None:
                self._events.stored(
                    request.session_id, request.block_hashes, request.cached_blocks, full
                )
            request.cached_blocks = full
        return True

    def _extend_decodes(self, scheduled: dict[Request, int], iterations: int) -> int:
        """Allocate for up to `iterations` decode steps at once; returns how many they are.

        No further than the first request's end, and only where no preemption is needed.
        """
        iterations = min(
            iterations, *(r.output_tokens - r.generated_tokens for r in scheduled), 2**31
        )
        size = self.config.block_size_tokens
        missing = sum(
            math.ceil((r.computed_tokens + iterations) / size) - len(r.blocks) for r in scheduled
        )
        if iterations < 2 or missing > self.pool.num_free_blocks:
            return 1
        for request in scheduled:
            self._allocate(request, iterations)
        return iterations

    def _preempt(self, request: Request) -> None:
        """Free a running request's blocks; it starts again, ahead of the waiting ones."""
        self._release(request)
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self.waiting.appendleft(request)
        # What it freed goes to the request that preempted it: wait for more.
        self._free_blocks_at_refusal = self.pool.num_free_blocks

    def _release(self, request: Request) -> None:
        self.reuse.freeing(request, [request.blocks])
        self.pool.free(request.blocks)
        request.blocks = []
        request.computed_tokens = request.cached_blocks = 0
