"""Sessions to replay: real Claude Code sessions, or anyone's turns, as chains of blocks.

Two formats, JSON lines, gzipped or not, told apart by their first line:

- sessions of `kv-cache-tester`, re-encoded: one a line, with its requests in ``req``;
- turns: one a line, ``session``, ``ctx`` (prompt tokens), ``out`` (tokens), ``gap_s`` (after the
  answer, until the next turn) and ``gap_kind`` (``tool``, else a person), in the session's order;
  optionally ``cache_read`` (tokens in common with the turn before, where the prompt got shorter).
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
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


class TraceError(ValueError):
    """A trace that cannot be read; its text is one line."""


def load(paths: Iterable[Path]) -> list[Session]:
    """The sessions of traces, cut at gaps over 300 s, those of 10 turns or more, equal ones
    dropped.

    Raises:
        TraceError: a file is not there, or not of a known format.
    """
    pieces: dict[tuple[Turn, ...], None] = {}
    for path in paths:
        for turns in _sessions(path):
            for piece in _cut(turns):
                if len(piece) >= MIN_TURNS:
                    pieces.setdefault(tuple(piece))
    return [list(piece) for piece in pieces]


def sample(pieces: list[Session], n: int, seed: int) -> list[Session]:
    """`n` sessions, at most 40 turns of each."""
    shuffled = list(pieces)
    random.Random(seed).shuffle(shuffled)
    return [piece[:MAX_TURNS] for piece in shuffled[:n]]


def _sessions(path: Path) -> Iterator[list[Turn]]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            records = map(json.loads, lines)
            first = next(records, None)
            if first is None:
                return
            if "req" in first:
                yield _requests(first)
                yield from map(_requests, records)
            else:
                everything = [first, *records]
                everything.sort(key=lambda r: str(r["session"]))  # stable: turns stay in order
                for _, turns in groupby(everything, key=lambda r: str(r["session"])):
                    yield _growing(turns)
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"{path}: no trace of a known format ({error!r})") from None


def _requests(record: dict[str, Any]) -> list[Turn]:
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


def _growing(records: Iterable[dict[str, Any]]) -> list[Turn]:
    turns: list[Turn] = []
    chain: list[int] = []
    fresh = 0
    gap_s = 0.0
    for record in records:
        blocks = max(1, record["ctx"] // BLOCK_TOKENS)
        shared = min(len(chain), blocks)
        if blocks < len(chain):
            shared = min(shared, record.get("cache_read", 0) // BLOCK_TOKENS)
        added = blocks - shared
        chain = chain[:shared] + list(range(fresh, fresh + added))
        fresh += added
        kind: IdleKind = "tool" if record.get("gap_kind", "tool") == "tool" else "human"
        turns.append(Turn(tuple(chain), max(record["out"], 1), gap_s, kind))
        after_s = record.get("gap_s")
        gap_s = max(0.0, after_s) if after_s is not None else 0.0
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
