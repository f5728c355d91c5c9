"""Real Claude Code sessions as block chains, cut as the replay model says."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.idle import IdleKind

BLOCK_TOKENS = 64
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


def load(path: Path) -> list[Session]:
    """Parent turns of every session, cut at gaps over 300 s, equal ones dropped."""
    pieces: dict[tuple[Turn, ...], None] = {}
    with gzip.open(path, "rt") as lines:
        for line in lines:
            for piece in _cut(_turns(json.loads(line))):
                if len(piece) >= MIN_TURNS:
                    pieces.setdefault(tuple(piece))
    return [list(piece) for piece in pieces]


def sample(pieces: list[Session], n: int, seed: int) -> list[Session]:
    """`n` sessions, at most 40 turns of each."""
    shuffled = list(pieces)
    random.Random(seed).shuffle(shuffled)
    return [piece[:MAX_TURNS] for piece in shuffled[:n]]


def _turns(record: dict[str, Any]) -> list[Turn]:
    chains: list[list[int]] = []
    turns = []
    for request in record["req"]:
        if "sa" in request:
            continue
        base = chains[-request.get("b", 1)] if chains else []
        flat = request["r"]
        fresh = [b for start, n in zip(flat[::2], flat[1::2], strict=True)
                 for b in range(start, start + n)]  # fmt: skip
        chain = base[: request.get("sb", request["s"])] + fresh
        chains.append(chain)
        turns.append(
            Turn(
                tuple(chain),
                max(request["out"], 1),
                request.get("g", 0.0),
                "tool" if request["st"] == "tool_use" else "human",
            )
        )
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
