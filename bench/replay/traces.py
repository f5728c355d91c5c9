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
        TraceError: a file is not there, or not of a known format.
    """
    trace = traces.load(paths)
    if trace.unknown:
        raise TraceError(f"{trace.unknown[0]}: no trace of a known format")
    pieces: dict[tuple[Turn, ...], None] = {}
    for session in trace.sessions:
        if session.parent is None:
            for piece in _cut(_turns(session)):
                if len(piece) >= MIN_TURNS:
                    pieces.setdefault(tuple(piece))
    return [list(piece) for piece in pieces]


def sample(pieces: list[Session], n: int, seed: int) -> list[Session]:
    """`n` sessions, at most 40 turns of each."""
    shuffled = list(pieces)
    random.Random(seed).shuffle(shuffled)
    return [piece[:MAX_TURNS] for piece in shuffled[:n]]


def _turns(session: Recorded) -> list[Turn]:
    """The turns with blocks of `BLOCK_TOKENS`."""
    each = max(1, session.block_tokens // BLOCK_TOKENS)
    turns = []
    for turn, chain in zip(session.turns, session.chains(), strict=True):
        if each > 1:
            chain = (chain[:, None] * each + np.arange(each)).ravel()
            chain = chain[: max(1, turn.prompt_tokens // BLOCK_TOKENS)]
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
