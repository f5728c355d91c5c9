"""The pod's `/metrics`: vLLM 0.32's names and labels, read from the engine when scraped."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gateway.embedded.engine import EmbeddedEngine
from gateway.embedded.histogram import Histogram


class EngineCollector(Collector):
    """Reads one engine. `model` and engine index "0" label every series."""

    def __init__(self, engine: EmbeddedEngine, model: str) -> None:
        self._engine = engine
        self._labels = (model, "0")

    def collect(self) -> Iterator[Metric]:
        scheduler = self._engine.scheduler
        pool, counters = scheduler.pool, scheduler.counters
        yield self._gauge(
            "num_requests_running",
            "Number of requests in model execution batches.",
            len(scheduler.running),
        )
        yield self._gauge(
            "num_requests_waiting",
            "Number of requests waiting to be processed.",
            len(scheduler.waiting),
        )
        yield self._gauge(
            "kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", pool.usage
        )
        yield self._cache_config()
        yield self._counter(
            "prefix_cache_queries",
            "Prefix cache queries, in terms of number of queried tokens.",
            counters.prefix_cache_queries,
        )
        yield self._counter(
            "prefix_cache_hits",
            "Prefix cache hits, in terms of number of cached tokens.",
            counters.prefix_cache_hits,
        )
        yield self._counter(
            "num_preemptions",
            "Cumulative number of preemption from the engine.",
            counters.preemptions,
        )
        yield self._counter(
            "prompt_tokens", "Number of prefill tokens processed.", counters.prompt_tokens
        )
        yield self._counter(
            "generation_tokens",
            "Number of generation tokens processed.",
            counters.generation_tokens,
        )
        success = CounterMetricFamily(
            "vllm:request_success",
            "Count of successfully processed requests.",
            labels=("model_name", "engine", "finished_reason"),
        )
        for reason, count in counters.finished.items():
            success.add_metric((*self._labels, reason), count)
        yield success
        yield self._histogram(
            "time_to_first_token_seconds",
            "Histogram of time to first token in seconds.",
            counters.first_token_s,
        )
        yield self._histogram(
            "inter_token_latency_seconds",
            "Histogram of inter-token latency in seconds.",
            counters.inter_token_s,
        )
        yield self._histogram(
            "request_queue_time_seconds",
            "Histogram of time spent in WAITING phase for request.",
            counters.queue_s,
        )

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", documentation, labels=("model_name", "engine"))
        gauge.add_metric(self._labels, value)
        return gauge

    def _counter(self, name: str, documentation: str, value: float) -> Metric:
        counter = CounterMetricFamily(
            f"vllm:{name}", documentation, labels=("model_name", "engine")
        )
        counter.add_metric(self._labels, value)
        return counter

    def _histogram(self, name: str, documentation: str, values: Histogram) -> Metric:
        histogram = HistogramMetricFamily(
            f"vllm:{name}", documentation, labels=("model_name", "engine")
        )
        buckets = [(_le(bound), float(count)) for bound, count in values.buckets()]
        histogram.add_metric(self._labels, buckets, values.sum)
        return histogram

    def _cache_config(self) -> Metric:
        config = self._engine.config
        labels = {
            "block_size": str(config.block_size_tokens),
            "cache_dtype": "auto",
            "enable_prefix_caching": "True",
            "engine": "0",
            "gpu_memory_utilization": "0.9",
            "num_cpu_blocks": "None",
            "num_gpu_blocks": str(config.num_gpu_blocks),
            "prefix_caching_hash_algo": "xxhash",
        }
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Information of the LLMEngine CacheConfig",
            labels=tuple(labels),
        )
        info.add_metric(tuple(labels.values()), 1)
        return info


def _le(bound: float) -> str:
    return "+Inf" if math.isinf(bound) else str(bound)


def create_registry(engine: EmbeddedEngine, model: str) -> CollectorRegistry:
    """A registry of this pod alone."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, model))
    return registry
