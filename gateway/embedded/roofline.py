"""How long an engine step takes: the roofline of the replay model.

A step is limited by arithmetic while it prefills and by memory traffic while it decodes:

    prefill FLOPs / (peak FLOP/s x efficiency)
    + decode iterations x (weights + KV read) / (bandwidth x efficiency)
    + a fixed overhead

for a dense transformer, where prefilling t tokens behind c computed ones costs
``2 x params x t + 4 x layers x width x (t c + t²/2)`` FLOPs (docs: "The replay model").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HardwareModel:
    """A dense bf16 model on its accelerators. Default: 32.5e9 parameters on 2xH200, TP 2."""

    parameters: float = 32.5e9
    layers: int = 64
    width: int = 5120
    bytes_per_parameter: int = 2
    kv_bytes_per_token: int = 262_144
    peak_flops_per_s: float = 2 * 990e12
    flops_efficiency: float = 0.5
    memory_bytes_per_s: float = 2 * 4.8e12
    memory_efficiency: float = 0.7
    step_overhead_s: float = 0.002


def prefill_flops(hardware: HardwareModel, computed_tokens: int, new_tokens: int) -> float:
    """FLOPs to prefill `new_tokens` behind `computed_tokens` whose KV is already there."""
    attended = new_tokens * computed_tokens + new_tokens * new_tokens / 2
    return 2 * hardware.parameters * new_tokens + 4 * hardware.layers * hardware.width * attended


def step_time_s(
    hardware: HardwareModel,
    prefills: Iterable[tuple[int, int]],
    decode_context_tokens: int,
    decodes: int,
) -> float:
    """Seconds of one engine step.

    `prefills` are (computed, new) token counts, one a prefilling request; `decodes` requests
    generate one token each, reading the KV of `decode_context_tokens` tokens between them.
    """
    flops = sum(prefill_flops(hardware, computed, new) for computed, new in prefills)
    seconds = flops / (hardware.peak_flops_per_s * hardware.flops_efficiency)
    if decodes:
        read = (
            hardware.parameters * hardware.bytes_per_parameter
            + decode_context_tokens * hardware.kv_bytes_per_token
        )
        seconds += read / (hardware.memory_bytes_per_s * hardware.memory_efficiency)
    return seconds + hardware.step_overhead_s
