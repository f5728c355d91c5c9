"""vLLM's real scheduler and block pool, with the forward pass replaced by a roofline model."""

from __future__ import annotations

import heapq
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from bench.engine.traces import BLOCK_TOKENS, Turn

SCALE = 16  # tokens that one simulated token stands for
KV_TOKENS = 700_000
BATCH_TOKENS = 2048
STARTED_APART_S = 0.05

PARAMETERS, LAYERS, WIDTH = 32.5e9, 64, 5120
KV_BYTES = 262_144
FLOPS, BYTES_S = 2 * 990e12 * 0.5, 2 * 4.8e12 * 0.7
OVERHEAD_S = 0.002

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

Hinter = Callable[[str, list[Turn], int], dict[str, Any] | None]


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
    ids = list(output.num_scheduled_tokens)
    requests = [scheduler.requests[i] for i in ids]
    sampled = [[] if r.is_prefill_chunk else [next_token(r)] for r in requests]
    model_output = ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled)
    scheduler.update_from_output(output, model_output)
    return output, [r for r in requests if r.is_finished()]


@dataclass
class Figures:
    """What a replay measured."""

    session_s: list[float] = field(default_factory=list)
    turn_s: list[float] = field(default_factory=list)
    evicted_blocks: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    overtakes: int = 0
    longest_wait_s: float = 0.0


def replay(
    sessions: list[list[Turn]], cls: type[Any] = Scheduler, hint: Hinter | None = None
) -> Figures:
    """Closed loop: each session's next turn comes its gap after its last response."""
    block = BLOCK_TOKENS // SCALE
    scheduler = make_scheduler(cls, KV_TOKENS // BLOCK_TOKENS, block, BATCH_TOKENS // SCALE)
    hasher = make_hasher(block)
    figures = Figures(session_s=[0.0] * len(sessions))
    count_evictions(scheduler, figures)
    now = 0.0
    if hint is not None or hasattr(scheduler, "_reuse"):
        scheduler._reuse.clock = lambda: now
    arrivals = [(i * STARTED_APART_S, i, 0) for i in range(len(sessions))]
    heapq.heapify(arrivals)
    running: dict[str, tuple[int, int, float, list[int]]] = {}
    while arrivals or running:
        if not running:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            arrived, i, k = heapq.heappop(arrivals)
            turn = sessions[i][k]
            prompt = _tokens(i, turn.blocks, block)
            output = -(-turn.output_tokens // SCALE)
            request_id = f"{i}/{k}"
            running[request_id] = (i, k, arrived, _answer(sessions[i], i, k, output, block))
            scheduler.add_request(make_request(request_id, prompt, output, f"s{i}", hasher))
        contexts = {r.request_id: r.num_computed_tokens for r in scheduler.running}
        scheduled, finished = step(
            scheduler, lambda r: running[r.request_id][3][r.num_output_tokens]
        )
        for new in scheduled.scheduled_new_reqs:
            figures.prompt_tokens += SCALE * len(new.prompt_token_ids)
            figures.cached_tokens += SCALE * new.num_computed_tokens
        now += step_s(scheduled, contexts)
        for request in finished:
            i, k, arrived, _ = running.pop(request.request_id)
            figures.turn_s.append(now - arrived)
            figures.session_s[i] += now - arrived
            if hint is not None and (payload := hint(f"s{i}", sessions[i], k)) is not None:
                answer = json.loads(
                    scheduler.cachewise("hints", envelope(request.request_id, payload))
                )
                assert answer["results"][0]["status"] == "applied", answer
            if k + 1 < len(sessions[i]):
                heapq.heappush(arrivals, (now + sessions[i][k + 1].gap_s, i, k + 1))
    if reuse := getattr(scheduler, "_reuse", None):
        figures.overtakes = reuse.order.overtakes
        figures.longest_wait_s = reuse.order.longest_wait_s
    return figures


def step_s(scheduled: Any, contexts: dict[str, int]) -> float:
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
            t = SCALE * n
            flops += 2 * PARAMETERS * t + 4 * LAYERS * WIDTH * (t * c + t * t / 2)
    seconds = OVERHEAD_S + flops / FLOPS
    if decoding:
        seconds += SCALE * (2 * PARAMETERS + kv_tokens * KV_BYTES) / BYTES_S
    return seconds


def count_evictions(scheduler: Any, figures: Figures) -> None:
    """Count cached blocks that lose their hash to an allocation, in stock and patched alike."""
    pool = scheduler.kv_cache_manager.block_pool
    evict = pool._maybe_evict_cached_block

    def counted(block: Any) -> bool:
        evicted: bool = evict(block)
        figures.evicted_blocks += evicted
        return evicted

    pool._maybe_evict_cached_block = counted


def _tokens(session: int, blocks: tuple[int, ...], block: int) -> list[int]:
    base = (session + 1) << 32
    return [base + b for b in blocks for _ in range(block)]


def _answer(turns: list[Turn], session: int, k: int, output: int, block: int) -> list[int]:
    """The answer's tokens: those the next prompt has after this one, as far as it goes on."""
    prompt = turns[k].blocks
    answer: list[int] = []
    if k + 1 < len(turns) and turns[k + 1].blocks[: len(prompt)] == prompt:
        answer = _tokens(session, turns[k + 1].blocks[len(prompt) :], block)[:output]
    return answer + [-(k + 1) * 1_000_000 - n for n in range(output - len(answer))]


def envelope(message_id: str, payload: dict[str, Any]) -> str:
    """A message of one `cachewise.reuse`."""
    action = {
        "action_id": "0",
        "action_type": "cachewise.reuse",
        "action_version": "1.0",
        "payload": payload,
    }
    return json.dumps({"protocol_version": "0.1", "message_id": message_id, "actions": [action]})
