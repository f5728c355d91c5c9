"""Why prompt tokens were not in the cache: every lost token has one cause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

LossCause = Literal["first_turn", "prefix_break", "moved", "pod_restart", "evicted"]
LOSS_CAUSES: tuple[LossCause, ...] = get_args(LossCause)

ROUNDING_TOKENS = 256
"""vLLM caches whole blocks only, and prompts are estimated from bytes: fewer missing tokens than
this are no loss."""


@dataclass(slots=True, frozen=True)
class Left:
    """What a session's last turn left behind: the KV of its prompt in the cache of ``pod``, whose
    engine was in its ``epoch``-th life."""

    prompt_tokens: int
    pod: str
    epoch: int


def lost_tokens(
    prompt_tokens: int,
    same_tokens: int,
    cached_tokens: int,
    left: Left | None,
    pod: str,
    epoch: int,
) -> dict[LossCause, int]:
    """Tokens of the prompt, or of the KV left by the last turn, that had to be or were given up.

    Args:
        prompt_tokens: of the turn.
        same_tokens: of the prompt unchanged since the last turn.
        cached_tokens: what the pod says it found in its cache.
        left: of the session's last turn; None for its first.
        pod: where the turn ran.
        epoch: life of that pod's engine.

    Returns:
        Causes with a loss. ``first_turn``: prompt tokens not cached because the session is new.
        ``prefix_break``: KV of the last turn that the changed prompt cannot use. The rest are
        unchanged tokens that were not cached: the turn ran on another pod (``moved``), the engine
        began anew (``pod_restart``), or it gave them to others (``evicted``).
    """
    if left is None:
        missing = prompt_tokens - cached_tokens
        return {"first_turn": missing} if missing > 0 else {}
    losses: dict[LossCause, int] = {}
    usable_tokens = min(same_tokens, left.prompt_tokens)
    broken = left.prompt_tokens - same_tokens
    if broken >= ROUNDING_TOKENS:
        losses["prefix_break"] = broken
    missing = usable_tokens - cached_tokens
    if missing >= ROUNDING_TOKENS:
        cause: LossCause = (
            "moved" if pod != left.pod else "pod_restart" if epoch != left.epoch else "evicted"
        )
        losses[cause] = missing
    return losses
