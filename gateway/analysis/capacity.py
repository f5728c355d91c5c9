"""How many tokens' KV common GPUs hold beside common models.

Bytes a token follow from the numbers of the models' published ``config.json``:
``2 x layers x KV heads x head size x bytes`` where keys and values are kept, and
``layers x (latent rank + rope size) x bytes`` with multi-head latent attention, which every rank of
a tensor-parallel group holds whole. GPUs are as their maker's data sheets have them (SXM, dense).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

UTILISATION: Final = 0.9
"""Of a GPU's memory that vLLM takes by default."""
OVERHEAD_BYTES: Final = 2e9
"""A GPU, for activations and CUDA graphs."""


@dataclass(frozen=True, slots=True)
class Model:
    """Numbers of a model's config. ``latent`` is set where attention keeps a latent vector;
    ``width`` is attention heads x head size (the mean of keys' and values');
    ``active_parameters`` are those that compute a token."""

    name: str
    layers: int
    kv_heads: int
    head_size: int
    weight_bytes: float
    active_parameters: float
    width: int
    latent: int = 0
    kv_bytes: int = 2
    fp8: bool = False

    @property
    def kv_bytes_per_token(self) -> int:
        if self.latent:
            return self.layers * self.latent * self.kv_bytes
        return 2 * self.layers * self.kv_heads * self.head_size * self.kv_bytes


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory, and what it does at most: dense arithmetic and memory traffic."""

    name: str
    memory_bytes: float
    flops_s: float
    """bf16"""
    fp8_flops_s: float
    bytes_s: float


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
        return max(0, int(free * self.gpus / self.kv_copies / self.model.kv_bytes_per_token))

    @property
    def kv_copies(self) -> float:
        """How often the GPUs together hold a token's KV."""
        return self.gpus if self.model.latent else max(1.0, self.gpus / self.model.kv_heads)


QWEN_32B: Final = Model("Qwen2.5-Coder-32B", 64, 8, 128, 32.8e9 * 2, 32.8e9, 5_120)
QWEN_30B: Final = Model("Qwen3-Coder-30B-A3B", 48, 4, 128, 30.5e9 * 2, 3.3e9, 4_096)
LLAMA_70B: Final = Model("Llama-3.3-70B FP8", 80, 8, 128, 70.6e9, 70.6e9, 8_192, fp8=True)
GLM_AIR: Final = Model("GLM-4.5-Air FP8", 46, 8, 128, 106.9e9, 12e9, 12_288, fp8=True)
QWEN_480B: Final = Model("Qwen3-Coder-480B FP8", 62, 8, 128, 480.2e9, 35e9, 12_288, fp8=True)
DEEPSEEK: Final = Model(
    "DeepSeek-V3.1 FP8", 61, 0, 0, 671e9, 37e9, 128 * 160, latent=512 + 64, fp8=True
)
MISTRAL_24B: Final = Model("Devstral-Small-24B", 40, 8, 128, 23.6e9 * 2, 23.6e9, 4_096)

A100: Final = Gpu("A100-80GB", 80e9, 312e12, 312e12, 2.04e12)
H100: Final = Gpu("H100-80GB", 80e9, 990e12, 1979e12, 3.35e12)
H200: Final = Gpu("H200-141GB", 141e9, 990e12, 1979e12, 4.8e12)
B200: Final = Gpu("B200-180GB", 180e9, 2250e12, 4500e12, 8e12)
MODELS: Final = (QWEN_30B, MISTRAL_24B, QWEN_32B, LLAMA_70B, GLM_AIR, QWEN_480B, DEEPSEEK)
GPUS: Final = (A100, H100, H200, B200)
SIZES: Final = (1, 2, 4, 8)

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
USUAL: Final = Pod(QWEN_32B, H200, 2)


def pod_of(model: str | None, gpu: str | None, gpus: int | None, least_tokens: int) -> Pod:
    """The pod that parts of names mean (``devstral``, ``h100``). What is left out is as in `PODS`,
    else the fewest GPUs that hold `least_tokens`.

    Raises:
        ValueError: no name is meant or several are, or the pod does not hold `least_tokens`; the
            text names the option.
    """
    meant = None if model is None else _named("--model", model, MODELS)
    on = None if gpu is None else _named("--gpu", gpu, GPUS)
    known = [USUAL, *PODS]
    if meant is None:
        meant = next((pod.model for pod in known if on in (None, pod.gpu)), USUAL.model)
    if on is None:
        on = next((pod.gpu for pod in known if pod.model == meant), USUAL.gpu)
    usual = [p.gpus for p in known if (p.model, p.gpu) == (meant, on)]
    found = Pod(meant, on, gpus or (usual or [SIZES[-1]])[0])
    if gpus is None and not usual:
        tried = (Pod(meant, on, size) for size in SIZES)
        found = next((pod for pod in tried if pod.kv_tokens >= least_tokens), found)
    if found.kv_tokens < least_tokens:
        raise ValueError(
            f"--gpus {found.gpus}: {found.name} leaves {found.kv_tokens:,} tokens of KV beside the"
            f" weights, and {least_tokens:,} are needed"
        )
    return found


_Part = TypeVar("_Part", Model, Gpu)


def _named(option: str, part: str, of: tuple[_Part, ...]) -> _Part:
    found = [each for each in of if part.casefold() in each.name.casefold()]
    if len(found) == 1:
        return found[0]
    names = ", ".join(each.name for each in found or of)
    raise ValueError(f"{option} {part}: {'could be' if found else 'allowed are'} {names}")
