"""Time of an engine's step by a roofline: arithmetic of prefill, memory traffic of decoding.

Prefill of t tokens behind c cached ones costs 2 x parameters x t + 4 x layers x width x
(t c + t²/2) FLOPs; a decode iteration reads the weights once and the KV of every sequence. Of a
mixture of experts prefill computes with a token's active parameters, and an iteration reads them
all, as a batch of many sequences does. Interconnects are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gateway.analysis.capacity import Pod

REACHED_FLOPS: Final = 0.5
REACHED_BYTES: Final = 0.7
"""Of what the GPU could do at most."""
OVERHEAD_S: Final = 0.002
"""A step's, whatever is in it."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model on a pod's GPUs. ``width`` is heads x head size; ``flops_s`` and ``bytes_s`` are what
    the GPUs reach together."""

    parameters: float
    layers: int
    width: int
    weight_bytes: float
    kv_bytes_per_token: float
    flops_s: float
    bytes_s: float

    @classmethod
    def of(cls, pod: Pod) -> Roofline:
        model, gpu = pod.model, pod.gpu
        return cls(
            model.active_parameters,
            model.layers,
            model.width,
            model.weight_bytes,
            model.kv_bytes_per_token * pod.kv_copies,
            pod.gpus * (gpu.fp8_flops_s if model.fp8 else gpu.flops_s) * REACHED_FLOPS,
            pod.gpus * gpu.bytes_s * REACHED_BYTES,
        )

    def prefill_flops(self, tokens: int, cached_tokens: int) -> float:
        attention = tokens * cached_tokens + tokens * tokens / 2
        return 2 * self.parameters * tokens + 4 * self.layers * self.width * attention

    def step_s(self, prefill_flops: float, iterations: int, kv_tokens: float) -> float:
        """Of a step that prefills and makes ``iterations`` tokens of sequences of ``kv_tokens``."""
        read_bytes = self.weight_bytes + kv_tokens * self.kv_bytes_per_token
        return OVERHEAD_S + prefill_flops / self.flops_s + iterations * read_bytes / self.bytes_s


DENSE_32B: Final = Roofline(
    32.5e9, 64, 5120, 2 * 32.5e9, 262_144, 2 * 990e12 * REACHED_FLOPS, 2 * 4.8e12 * REACHED_BYTES
)
"""A dense 32B model on 2xH200: that of all published figures."""
