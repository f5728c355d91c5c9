"""vLLM's real scheduler and block pool under the patch, in process, with a model that agrees."""

from __future__ import annotations

import itertools
import json
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from bench.engine.simulation import make_hasher, step
from engine_patch.scheduler import ReuseAwareScheduler
from engine_patch.sessions import MAX_LAPSE_S
from tests.engine_patch import agents
from tests.engine_patch.pool import check_no_owners, check_owners

BLOCK = 4
_OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}


def full() -> FullAttentionSpec:
    return FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)


def sliding(window_tokens: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=window_tokens
    )


def prompt(name: str, blocks: int) -> list[int]:
    """Tokens that no other name shares."""
    first = zlib.crc32(name.encode()) * 10_000
    return list(range(first, first + blocks * BLOCK))


class Engine:
    """A scheduler, a clock that moves only when told, and sessions' turns.

    Args:
        num_blocks: of the pool, with the null block.
        specs: one for each KV cache group; full attention alone by default.
        connector: vLLM's name of a KV connector, and its extra configuration.
    """

    def __init__(
        self,
        num_blocks: int = 41,
        *,
        specs: Sequence[KVCacheSpec] = (),
        async_scheduling: bool = False,
        policy: str = "fcfs",
        lora: bool = False,
        connector: tuple[str, dict[str, Any]] | None = None,
        batch_tokens: int = 256,
        max_seqs: int = 8,
    ) -> None:
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(_OPT))
            model = ModelConfig(
                model=directory, dtype="float32", max_model_len=4096, skip_tokenizer_init=True
            )
            config = VllmConfig(
                scheduler_config=SchedulerConfig(
                    max_num_seqs=max_seqs,
                    max_num_batched_tokens=batch_tokens,
                    max_model_len=4096,
                    enable_chunked_prefill=True,
                    is_encoder_decoder=False,
                    async_scheduling=async_scheduling,
                    watermark=0.0,
                    policy=policy,
                ),
                model_config=model,
                cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
                parallel_config=ParallelConfig(),
                lora_config=LoRAConfig(max_loras=2, max_lora_rank=8) if lora else None,
                kv_transfer_config=connector
                and KVTransferConfig(
                    kv_connector=connector[0],
                    kv_role="kv_both",
                    kv_connector_extra_config=connector[1],
                ),
            )
        config.cache_config.num_gpu_blocks = num_blocks
        register_all_kvcache_specs(config)
        specs = specs or (full(),)
        groups = [KVCacheGroupSpec([f"layer{i}"], s) for i, s in enumerate(specs)]
        page = specs[0].page_size_bytes
        layers = [f"layer{i}" for i in range(len(specs))]
        size = page * num_blocks * len(specs)
        memory = KVCacheTensor(size, layers, layer_stride=page * num_blocks, block_stride=page)
        self.scheduler: Any = ReuseAwareScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [memory], groups),
            block_size=BLOCK,
            structured_output_manager=StructuredOutputManager(config),
            log_stats=True,
        )
        self.now = 1_000.0
        self.reuse: Any = self.scheduler._reuse
        if self.reuse is not None:
            self.reuse.clock = lambda: self.now
            self.reuse.call("capabilities")  # as a gateway does that will send hints
        self.pool: Any = self.scheduler.kv_cache_manager.block_pool
        self.cached_tokens: dict[str, int] = {}
        self._hasher = make_hasher(BLOCK)
        self._serial = itertools.count()

    # --- requests ---

    def add(
        self, tokens: list[int], session: str | None = None, output_tokens: int = 1, **fields: Any
    ) -> Request:
        """A request begins to wait."""
        request = Request(
            f"r{next(self._serial)}",
            tokens,
            SamplingParams(max_tokens=output_tokens, ignore_eos=True),
            None,
            session_id=session,
            block_hasher=self._hasher,
            **fields,
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> list[Request]:
        """One step of the scheduler; the requests that it finished."""
        output, finished = step(self.scheduler, lambda request: 7)
        for new in output.scheduled_new_reqs:
            self.cached_tokens.setdefault(new.req_id, new.num_computed_tokens)
        return finished

    def run(self, *requests: Request, steps: int = 200) -> None:
        """Step until `requests`, or all, have finished."""
        for _ in range(steps):
            if all(r.is_finished() for r in requests or list(self.scheduler.requests.values())):
                return
            self.step()
            self.check()
        raise AssertionError(f"not finished in {steps} steps")

    def turn(self, tokens: list[int], session: str | None = None, **fields: Any) -> int:
        """A request from arrival to end; the tokens of its prompt found in the cache."""
        request = self.add(tokens, session, **fields)
        self.run(request)
        return self.cached_tokens[request.request_id]

    def abort(self, *requests: Request) -> None:
        ids = [r.request_id for r in requests]
        self.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)

    def hint(self, session: str, gap_s: float | None) -> str:
        """`session` is back in `gap_s`, never for None; the answer's status."""
        return self.tell(agents.reuse(session, gap_s))

    def retain(self, session: str, priority: int, duration_s: float = 60.0) -> str:
        directives = [{"start": 0, "end": None, "priority": priority, "duration": duration_s}]
        return self.tell(agents.envelope("kv.retain", {"scope": session, "directives": directives}))

    def tell(self, envelope: dict[str, Any]) -> str:
        answer = json.loads(self.scheduler.cachewise("hints", json.dumps(envelope)))
        status: str = answer["results"][0]["status"]
        return status

    def resident(self, session: str) -> int:
        """Blocks that the session owns."""
        rows = json.loads(self.scheduler.cachewise("sessions", ""))["sessions"]
        return sum(r["resident_blocks"] for r in rows if r["session_id"] == session)

    # --- what must hold ---

    def check(self) -> None:
        """Each block is in exactly one place, and the patch's books say so too."""
        if self.reuse is None:
            return
        pool, queue = self.pool, self.pool.free_block_queue
        free = queue.get_all_free_blocks()
        assert len(free) == len({b.block_id for b in free}) == pool.get_num_free_blocks()
        held: dict[int, int] = {}
        for manager in self.scheduler.kv_cache_manager.coordinator.single_type_managers:
            for blocks in manager.req_to_blocks.values():
                for block in blocks:
                    if not block.is_null:
                        held[block.block_id] = held.get(block.block_id, 0) + 1
        assert not held.keys() & {b.block_id for b in free}
        assert len(held) + len(free) + 1 == pool.num_gpu_blocks  # and the null block
        for block in pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == held.get(block.block_id, 0)
        check_owners(queue, self.reuse.sessions, free)
        waiting = {r.request_id for r in self.scheduler.waiting}
        waiting |= {r.request_id for r in self.scheduler.kv_holding_waiting}
        assert self.reuse.order._entries.keys() <= waiting
        assert len(self.reuse.sessions) <= self.reuse.sessions.max_sessions

    def check_nothing_outlives_its_session(self) -> None:
        """End all, let other traffic take every block, let hints lapse: no state is left."""
        self.abort(*self.scheduler.requests.values())
        self.check()
        self.now += MAX_LAPSE_S + 1
        others = [f"z{i}" for i in range(self.pool.num_gpu_blocks)]
        for name in others:
            self.turn(prompt(name, 2))
        queue = self.pool.free_block_queue
        queue.ledger = self.reuse.ledger
        self.now += MAX_LAPSE_S + 1
        self.step()
        self.reuse.ledger.expire(self.now)
        assert not self.scheduler.requests
        assert len(self.reuse.sessions) == len(self.reuse.order) == len(self.reuse.ledger) == 0
        check_no_owners(queue)
        assert queue.num_free_blocks == self.pool.num_gpu_blocks - 1
