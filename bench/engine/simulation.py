"""vLLM's real scheduler and block pool, with the forward pass replaced by a roofline model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from bench.engine.roofline import Roofline

SCALE = 16  # tokens that one simulated token stands for
BATCH_TOKENS = 2048

LAYERS, WIDTH = 64, 5120

_OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": WIDTH,
    "ffn_dim": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 40,
    "vocab_size": 50_272,
    "max_position_embeddings": 2**20,
    "word_embed_proj_dim": WIDTH,
    "torch_dtype": "bfloat16",
}


def make_scheduler(
    cls: type[Any], num_blocks: int, block_size: int, batch_tokens: int, max_seqs: int = 128
) -> Any:
    """One of vLLM's schedulers over a pool of full-attention blocks."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(_OPT))
        model = ModelConfig(
            model=directory, dtype="bfloat16", max_model_len=2**18, skip_tokenizer_init=True
        )
        config = VllmConfig(
            scheduler_config=SchedulerConfig(
                max_num_seqs=max_seqs,
                max_num_batched_tokens=batch_tokens,
                max_model_len=2**18,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=False,
                watermark=0.0,
            ),
            model_config=model,
            cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=True),
        )
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    register_all_kvcache_specs(config)
    return cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        block_size=block_size,
        structured_output_manager=StructuredOutputManager(config),
        log_stats=True,
    )


def make_request(
    request_id: str, tokens: list[int], output_tokens: int, session: str | None, hasher: Any
) -> Request:
    """A request of exactly `output_tokens`."""
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    return Request(request_id, tokens, params, None, session_id=session, block_hasher=hasher)


def make_hasher(block_size: int) -> Any:
    """vLLM's block hasher."""
    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    return get_request_block_hasher(block_size, hash_fn)


def step(scheduler: Any, next_token: Callable[[Request], int]) -> tuple[Any, list[Request]]:
    """Schedule once and answer as a model would: the step's output and what it finished."""
    output = scheduler.schedule()
    return output, complete(scheduler, output, next_token)


def complete(scheduler: Any, output: Any, next_token: Callable[[Request], int]) -> list[Request]:
    """Answer a scheduled step as a model would; the requests that it finished."""
    ids = list(output.num_scheduled_tokens)
    requests = [scheduler.requests[i] for i in ids]
    sampled = [[] if r.is_prefill_chunk else [next_token(r)] for r in requests]
    model_output = ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled)
    scheduler.update_from_output(output, model_output)
    return [r for r in requests if r.is_finished()]


def step_s(scheduled: Any, contexts: dict[str, int], roofline: Roofline) -> float:
    """Time of a step; a simulated step with decoding in it is `SCALE` decode iterations."""
    new = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
    cached = scheduled.scheduled_cached_reqs
    new |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    flops = kv_tokens = 0.0
    decoding = False
    for request_id, n in scheduled.num_scheduled_tokens.items():
        c = SCALE * new.get(request_id, contexts.get(request_id, 0))
        if n == 1:
            decoding = True
            kv_tokens += c
        else:
            flops += roofline.prefill_flops(SCALE * n, c)
    return roofline.step_s(flops, SCALE * decoding, kv_tokens)


def count_evictions(scheduler: Any) -> Callable[[], int]:
    """Count cached blocks that lose their hash to an allocation, in stock and patched alike."""
    pool = scheduler.kv_cache_manager.block_pool
    evict = pool._maybe_evict_cached_block
    evicted = 0

    def counted(block: Any) -> bool:
        nonlocal evicted
        lost: bool = evict(block)
        evicted += lost
        return lost

    pool._maybe_evict_cached_block = counted
    return lambda: evicted
