"""What a pod says of its load: the few samples of vLLM's `/metrics` that routing reads.

A full Prometheus parse of vLLM's 60 KB page costs some 50 times as much, nearly all of it for
histograms nobody asks for. So the names wanted are searched for, and only their lines parsed.
Names are those of vLLM 0.32; older ones are accepted and reported.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Field -> the names it goes by, today's first. Counters may lack `_total` behind some exporters.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "running_requests": ("vllm:num_requests_running",),
    "waiting_requests": ("vllm:num_requests_waiting",),
    "kv_usage_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "prefix_cache_queries_tokens": (
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_queries",
        "vllm:gpu_prefix_cache_queries_total",
        "vllm:gpu_prefix_cache_queries",
    ),
    "prefix_cache_hits_tokens": (
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_hits",
        "vllm:gpu_prefix_cache_hits_total",
        "vllm:gpu_prefix_cache_hits",
    ),
    "prompt_tokens": ("vllm:prompt_tokens_total", "vllm:prompt_tokens"),
    "generation_tokens": ("vllm:generation_tokens_total", "vllm:generation_tokens"),
}
_CACHE_CONFIG = "vllm:cache_config_info"

# The exposition format after a metric's name: optional labels, blanks, value. Possessive, so
# that a line without an end costs no backtracking.
_SAMPLE = re.compile(r'[ \t]*+(\{(?:[^"}\n]++|"(?:[^"\\\n]|\\.)*+")*+\})?+[ \t]*+([^\s{]++)')
_LABEL = re.compile(r'([a-zA-Z_]\w*+)[ \t]*+=[ \t]*+"((?:[^"\\\n]|\\.)*+)"')


@dataclass(frozen=True, slots=True)
class PodLoad:
    """A pod's load and KV capacity at one scrape, summed over the data-parallel engines asked for.

    A value the pod did not give is `None` and named in `missing`: it is never a zero.
    Counters (queries, hits, prompt, generation) count tokens since the pod started.
    """

    engines: int
    running_requests: int | None
    waiting_requests: int | None
    kv_usage_ratio: float | None
    """Share of the KV cache that running requests hold, 0 to 1; the mean over engines."""
    block_size_tokens: int | None
    num_blocks: int | None
    capacity_tokens: int | None
    prefix_cache_queries_tokens: int | None
    prefix_cache_hits_tokens: int | None
    prompt_tokens: int | None
    generation_tokens: int | None
    missing: tuple[str, ...]
    """vLLM's names for what was not there."""
    renamed: tuple[tuple[str, str], ...]
    """(expected name, the older name found instead)."""


def parse_load(text: str, rank: int | None = None) -> PodLoad:
    """Read vLLM's `/metrics` page (Prometheus text format 0.0.4): of the data-parallel engine
    `rank`, or of all of them.

    Lines that are not well formed are passed over; no input raises.
    """
    text = "\n" + text
    values: dict[str, list[float]] = {}
    missing: list[str] = []
    renamed: list[tuple[str, str]] = []
    for field, names in _NAMES.items():
        found = [value for _, value in _samples(text, names[0], rank)]
        for older in names[1:]:
            if found:
                break
            if found := [value for _, value in _samples(text, older, rank)]:
                renamed.append((names[0], older))
        values[field] = found
        if not found:
            missing.append(names[0])

    configs = [dict(_LABEL.findall(labels)) for labels, _ in _samples(text, _CACHE_CONFIG, rank)]
    block_sizes = _of_all(_integer(config.get("block_size")) for config in configs)
    blocks = _of_all(_integer(config.get("num_gpu_blocks")) for config in configs)
    capacities = _of_all(_capacity_tokens(config) for config in configs)
    if not configs:
        missing.append(_CACHE_CONFIG)
    else:
        missing += [
            f"{_CACHE_CONFIG}{{{label}}}"
            for label, known in (
                ("block_size", block_sizes),
                ("num_gpu_blocks", blocks),
                ("kv_cache_size_tokens", capacities),
            )
            if not known
        ]

    usage = values["kv_usage_ratio"]
    return PodLoad(
        engines=max(len(values["running_requests"]), len(usage), len(configs)),
        running_requests=_sum(values["running_requests"]),
        waiting_requests=_sum(values["waiting_requests"]),
        kv_usage_ratio=math.fsum(usage) / len(usage) if usage else None,
        block_size_tokens=block_sizes[0] if block_sizes else None,
        num_blocks=sum(blocks) if blocks else None,
        capacity_tokens=sum(capacities) if capacities else None,
        prefix_cache_queries_tokens=_sum(values["prefix_cache_queries_tokens"]),
        prefix_cache_hits_tokens=_sum(values["prefix_cache_hits_tokens"]),
        prompt_tokens=_sum(values["prompt_tokens"]),
        generation_tokens=_sum(values["generation_tokens"]),
        missing=tuple(missing),
        renamed=tuple(renamed),
    )


def _samples(text: str, name: str, rank: int | None) -> Iterator[tuple[str, float]]:
    """(labels, value) of each sample of exactly `name`, and of the engine, with a finite value."""
    end = 0
    while (at := text.find("\n" + name, end)) >= 0:
        end = at + 1 + len(name)
        if text[end : end + 1] in ("{", " ", "\t") and (match := _SAMPLE.match(text, end)):
            try:
                value = float(match[2])
            except ValueError:
                continue
            if math.isfinite(value) and (rank is None or _engine(match[1] or "") == rank):
                yield match[1] or "", value


def _engine(labels: str) -> int | None:
    return _integer(dict(_LABEL.findall(labels)).get("engine"))


def _capacity_tokens(config: Mapping[str, str]) -> int | None:
    """The engine's own figure (0.32 on); else blocks x block size, right without hybrid layers."""
    if (tokens := _integer(config.get("kv_cache_size_tokens"))) is not None:
        return tokens
    size, blocks = _integer(config.get("block_size")), _integer(config.get("num_gpu_blocks"))
    return None if size is None or blocks is None else size * blocks


def _integer(label: str | None) -> int | None:
    if not label or len(label) > 18 or not (label.isascii() and label.isdigit()):
        return None
    return int(label)


def _of_all(values: Iterator[int | None]) -> list[int]:
    """The values, or none of them: a sum over some engines only would be too small."""
    known = list(values)
    return [] if None in known else [value for value in known if value is not None]


def _sum(values: list[float]) -> int | None:
    return round(math.fsum(values)) if values else None
