"""Sessions of a trace, made small enough for a model on the CPU: shorter, sooner, fewer turns.

A turn is what a client adds to its conversation, in tokens; a session ends where its prompt stops
growing, and with an answer to a person.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.replay.traces import BLOCK_TOKENS, Session

ANSWER_TOKENS = 40
"""Of an answer, with the marks around it: a tool call is this long whatever the trace says."""
MIN_ADDED_TOKENS = 8


@dataclass(frozen=True)
class ScaledTurn:
    """One model call to make."""

    added_tokens: int
    """Of the message before it: the prompt's growth beyond the last prompt and its answer."""
    gap_s: float
    """From the last answer to it."""
    calls_tool: bool


ScaledSession = list[ScaledTurn]


def scale(session: Session, tokens_by: float, gaps_by: float, turns: int) -> ScaledSession:
    """The first `turns` of a session, fewer where its prompt ceases to extend the last one.

    Tokens are divided by `tokens_by` and gaps by `gaps_by`; the last turn calls no tool.
    """
    scaled: ScaledSession = []
    prompt_tokens = 0
    before: tuple[int, ...] = ()
    for turn in session[:turns]:
        if turn.blocks[: len(before)] != before:
            break
        before = turn.blocks
        wanted_tokens = round(len(turn.blocks) * BLOCK_TOKENS / tokens_by)
        kept_tokens = prompt_tokens + ANSWER_TOKENS if scaled else 0
        added_tokens = max(MIN_ADDED_TOKENS, wanted_tokens - kept_tokens)
        prompt_tokens = kept_tokens + added_tokens
        gap_s = turn.gap_s / gaps_by if scaled else 0.0
        scaled.append(ScaledTurn(added_tokens, gap_s, turn.idle_kind == "tool"))
    last = scaled[-1]
    scaled[-1] = ScaledTurn(last.added_tokens, last.gap_s, calls_tool=False)
    return scaled


def final_tokens(session: ScaledSession) -> int:
    """KV that a session needs at its end."""
    return sum(turn.added_tokens + ANSWER_TOKENS for turn in session)


def kv_tokens(
    sessions: Sequence[ScaledSession], pods: int, working_sets: float, block_tokens: int
) -> int:
    """KV cache of each of `pods`, in whole blocks, so that all sessions together need
    `working_sets` times as much; at least one and a half times the longest session."""
    needed = sum(map(final_tokens, sessions)) / pods / working_sets
    longest = 1.5 * max(map(final_tokens, sessions))
    return round(max(needed, longest) / block_tokens) * block_tokens


def filler(words: Sequence[str], tokens: int, seed: str) -> str:
    """Text of `tokens` words, the same for the same seed."""
    return " ".join(random.Random(seed).choices(words, k=tokens))


def one_token_words(vocabulary: Iterable[str]) -> list[str]:
    """Words that the tokenizer (byte-level BPE) makes one token after a blank."""
    found = (token[1:] for token in vocabulary if token[0] == "Ġ")
    return sorted(word for word in found if word.isascii() and word.isalpha() and len(word) > 2)
