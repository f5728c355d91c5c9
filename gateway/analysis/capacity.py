"""How many tokens' KV common GPUs hold beside common models.

Bytes a token follow from the numbers of the models' published ``config.json``:
``2 x layers x KV heads x head size x bytes`` where keys and values are kept, and
``layers x (latent rank + rope size) x bytes`` with multi-head latent attention, which every rank of
a tensor-parallel group holds whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

UTILISATION: Final = 0.9
"""Of a GPU's memory that vLLM takes by default."""
OVERHEAD_BYTES: Final = 2e9
"""A GPU, for activations and CUDA graphs."""


@dataclass(frozen=True, slots=True)
class Model:
    """Numbers of a model's config. ``latent`` is set where attention keeps a latent vector."""

    name: str
    layers: int
    kv_heads: int
    head_size: int
    weight_bytes: float
    latent: int = 0
    kv_bytes: int = 2

    @property
    def kv_bytes_per_token(self) -> int:
        if self.latent:
            return self.layers * self.latent * self.kv_bytes
        return 2 * self.layers * self.kv_heads * self.head_size * self.kv_bytes


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class Pod:
    """A model on some GPUs of one kind, tensor-parallel."""

    model: Model
    gpu: Gpu
    gpus: int

    @property
    def name(self) -> str:
        return f"{self.model.name} on {self.gpus}x{self.gpu.name}"

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV fits beside the weights; 0 if the weights do not fit."""
        free = self.gpu.memory_bytes * UTILISATION - OVERHEAD_BYTES
        free -= self.model.weight_bytes / self.gpus
        copies = self.gpus if self.model.latent else max(1.0, self.gpus / self.model.kv_heads)
        return max(0, int(free * self.gpus / copies / self.model.kv_bytes_per_token))


QWEN_32B: Final = Model("Qwen2.5-Coder-32B", 64, 8, 128, 32.8e9 * 2)
QWEN_30B: Final = Model("Qwen3-Coder-30B-A3B", 48, 4, 128, 30.5e9 * 2)
LLAMA_70B: Final = Model("Llama-3.3-70B FP8", 80, 8, 128, 70.6e9)
GLM_AIR: Final = Model("GLM-4.5-Air FP8", 46, 8, 128, 106.9e9)
QWEN_480B: Final = Model("Qwen3-Coder-480B FP8", 62, 8, 128, 480.2e9)
DEEPSEEK: Final = Model("DeepSeek-V3.1 FP8", 61, 0, 0, 671e9, latent=512 + 64)
MISTRAL_24B: Final = Model("Devstral-Small-24B", 40, 8, 128, 23.6e9 * 2)

A100: Final = Gpu("A100-80GB", 80e9)
H100: Final = Gpu("H100-80GB", 80e9)
H200: Final = Gpu("H200-141GB", 141e9)
B200: Final = Gpu("B200-180GB", 180e9)

PODS: Final = (
    Pod(QWEN_30B, H100, 1),
    Pod(MISTRAL_24B, A100, 1),
    Pod(QWEN_32B, H100, 2),
    Pod(QWEN_32B, H200, 2),
    Pod(LLAMA_70B, H100, 4),
    Pod(GLM_AIR, H200, 2),
    Pod(QWEN_480B, H200, 8),
    Pod(DEEPSEEK, H200, 8),
    Pod(DEEPSEEK, B200, 8),
)
