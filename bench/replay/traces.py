"""Sessions to replay, as chains of blocks, from traces of any format `gateway.traces` reads."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gateway.idle import IdleKind
from gateway.traces import load as traces
from gateway.traces.lines import TraceError
from gateway.traces.session import BLOCK_TOKENS
from gateway.traces.session import Session as Recorded

__all__ = ["BLOCK_TOKENS", "TraceError"]

MAX_GAP_S = 300.0
MIN_TURNS = 10
MAX_TURNS = 40
MAX_PROMPT_TOKENS = 120_000
SHARED = 1 << 48
"""Block ids from here on mean the same in all sessions; those below are a session's own."""


@dataclass(frozen=True)
class Turn:
    """One model call: its prompt's blocks, its answer's length, and the gap before it."""

    blocks: tuple[int, ...]
    output_tokens: int
    gap_s: float
    idle_kind: IdleKind  # of the gap after it


Session = list[Turn]


def load(paths: Iterable[Path]) -> list[Session]:
    """The main sessions of traces, without their sub-agents, cut at gaps over 300 s, those of 10
    turns or more, equal ones dropped.

    Raises:
        TraceError: a file is not there, or one that is named is of no known format.
    """
    paths = list(paths)
    trace = traces.load(paths)
    for path in trace.unknown:
        if path in paths or not trace.sessions:
            raise TraceError(f"{path}: no trace of a known format")
    pieces: dict[tuple[Turn, ...], None] = {}
    shared: dict[tuple[str, int], int] = {}
    for session in trace.sessions:
        if session.parent is None:
            for piece in _cut(_turns(session, shared)):
                if len(piece) >= MIN_TURNS:
                    pieces.setdefault(tuple(piece))
    return [list(piece) for piece in pieces]


def sample(pieces: list[Session], n: int, seed: int) -> list[Session]:
    """`n` sessions, at most 40 turns of each."""
    shuffled = list(pieces)
    random.Random(seed).shuffle(shuffled)
    return [piece[:MAX_TURNS] for piece in shuffled[:n]]


def _turns(session: Recorded, shared: dict[tuple[str, int], int]) -> list[Turn]:
    """The turns with blocks of `BLOCK_TOKENS`. ``shared`` numbers the blocks of all sessions."""
    each = max(1, session.block_tokens // BLOCK_TOKENS)
    joined = max(1, BLOCK_TOKENS // session.block_tokens)
    scope = "" if session.scope == session.id else session.scope
    turns = []
    for turn, chain in zip(session.turns, session.chains(), strict=True):
        if scope:
            numbers = [shared.setdefault((scope, b), len(shared)) for b in chain.tolist()]
            chain = SHARED + np.array(numbers, np.int64)
        if each > 1:
            chain = (chain[:, None] * each + np.arange(each)).ravel()
            chain = chain[: max(1, turn.prompt_tokens // BLOCK_TOKENS)]
        if joined > 1:  # a block's id stands for the whole prompt up to it
            chain = chain[joined - 1 :: joined] if len(chain) >= joined else chain[-1:]
        # A stop reason that was not recorded counts as an answer, as in the published figures.
        tool = turn.idle_kind == "tool" if turn.stop is None else turn.stop == "tool_use"
        kind: IdleKind = "tool" if tool else "human"
        turns.append(Turn(tuple(chain.tolist()), max(turn.output_tokens, 1), turn.gap_s, kind))
    return turns


def _cut(turns: list[Turn]) -> list[Session]:
    pieces: list[Session] = [[]]
    for turn in turns:
        too_long = len(turn.blocks) * BLOCK_TOKENS > MAX_PROMPT_TOKENS
        if turn.gap_s > MAX_GAP_S or too_long:
            pieces.append([])
        if not too_long:
            pieces[-1].append(turn)
    return pieces
