"""The launch line of a patched pod."""

import shlex
from collections.abc import Sequence

SCHEDULER = "engine_patch.scheduler.ReuseAwareScheduler"
MIDDLEWARE = "engine_patch.middleware.KvHintsMiddleware"


def launch_command(
    model: str, *, host: str = "0.0.0.0", port: int = 8000, extra: Sequence[str] = ()
) -> list[str]:
    """`vllm serve` with the patch, as arguments.

    Cached tokens are reported per request, which the gateway learns from; `extra` is passed on
    to vLLM as it stands.
    """
    return [
        "vllm",
        "serve",
        model,
        "--host",
        host,
        "--port",
        str(port),
        "--scheduler-cls",
        SCHEDULER,
        "--middleware",
        MIDDLEWARE,
        "--enable-prompt-tokens-details",
        *extra,
    ]


def launch_line(
    model: str, *, host: str = "0.0.0.0", port: int = 8000, extra: Sequence[str] = ()
) -> str:
    """The same as one line for a shell."""
    return shlex.join(launch_command(model, host=host, port=port, extra=extra))
