"""The one form of a recorded session, whatever format it came in.

No text is kept: of a tool call its kind, name, program and subcommand
(`gateway.predictor.features`), of a prompt its length and the identities of its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.dialects.turn import ToolCall
from gateway.idle import IdleKind
from gateway.predictor.features import features_of
from gateway.predictor.shell import well_known

BLOCK_TOKENS = 64
"""Tokens a block of formats that do not say otherwise."""

MAX_BLOCKS: Final = 1 << 22
"""Of one prompt; a record that tells of more is taken as broken."""
CLIENTS: Final = {"claude": "claude-code", "codex": "codex"}
"""Clients, by the words with which traces name their agents."""

Runs: TypeAlias = tuple[int, ...]
"""Block ids as flat (start, length) pairs: ``(7, 2, 20, 1)`` is 7, 8, 20."""
Blocks: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call: what its duration can be told from, and its duration where it is known."""

    kind: str
    tool: str
    program: str = ""
    sub: str = ""
    duration_s: float | None = None
    failed: bool = False
    child: str | None = None
    """The sub-agent's session that it started."""

    @classmethod
    def of(cls, call: ToolCall) -> Call:
        words, _ = features_of(call)
        return cls(words.kind, words.tool, *well_known(words.program, words.sub))


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a model call, as a transcript tells them. ``prompt_tokens`` has the cached ones."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One model call.

    The prompt's blocks are the first ``shared`` of the prompt ``back`` turns before it (none for
    the first turn), then ``fresh``.
    """

    at_s: float
    """When the request was sent, seconds after the session's start."""
    prompt_tokens: int
    output_tokens: int
    shared: int = 0
    fresh: Runs = ()
    back: int = 1
    gap_s: float = 0.0
    """The client's wait before it, since the end of the turn before."""
    gap_known: bool = True
    """False where the trace does not tell the wait; it then counts as none."""
    api_s: float | None = None
    """From the request to the end of the response."""
    first_token_s: float | None = None
    idle_kind: IdleKind = "human"
    """What the session waited for after it."""
    stop: str | None = None
    """The response's stop reason, where the trace has one: ``tool_use``, ``end_turn``, or empty."""
    cached_tokens: int | None = None
    """Of the prompt, as the server reported it."""
    model: str = ""
    compacted: bool = False
    """Its prompt follows a compaction."""
    calls: tuple[Call, ...] = ()

    @property
    def fresh_blocks(self) -> int:
        return sum(self.fresh[1::2])


@dataclass(slots=True)
class Session:
    """One conversation; a sub-agent is a session with a parent.

    Block ids mean the same in all sessions of equal ``scope``; an empty scope is the session's own.
    """

    id: str
    turns: list[Turn] = field(default_factory=list)
    client: str = ""
    parent: str | None = None
    agent_type: str = ""
    started_at: float | None = None
    """Unix seconds; None where the trace has only times within the session."""
    start_s: float = 0.0
    """Of a sub-agent without `started_at`: seconds after its parent's start."""
    block_tokens: int = BLOCK_TOKENS
    scope: str = ""
    tool_tokens: int = 0
    system_tokens: int = 0
    tells_waits: bool = True
    """False where the trace does not tell what its waits were for: its turns' `idle_kind` then only
    stands in, and `gap_s` may hold the response before the wait."""

    @property
    def ends_s(self) -> float:
        """Seconds from its start to its last response."""
        last = self.turns[-1]
        return last.at_s + (last.api_s or 0.0)

    def chains(self) -> Iterator[Blocks]:
        """Each turn's prompt as block ids. The arrays are not copies: leave them as they are."""
        chains: list[Blocks] = []
        longest_back = max((turn.back for turn in self.turns), default=1)
        for turn in self.turns:
            base = chains[-turn.back] if len(chains) >= turn.back else _NONE
            chain = np.concatenate((base[: turn.shared], expand(turn.fresh)))
            chains.append(chain)
            del chains[:-longest_back]
            yield chain


def is_id(start: int) -> bool:
    """Whether it and the blocks behind it are numbers of 64 bits."""
    return -(1 << 63) <= start < (1 << 63) - MAX_BLOCKS


_NONE: Blocks = np.empty(0, np.int64)


def expand(runs: Runs) -> Blocks:
    """The block ids of runs."""
    if len(runs) == 2:
        return np.arange(runs[0], runs[0] + runs[1], dtype=np.int64)
    pieces = [
        np.arange(s, s + n, dtype=np.int64) for s, n in zip(runs[::2], runs[1::2], strict=True)
    ]
    return np.concatenate(pieces) if pieces else _NONE


def runs_of(ids: Sequence[int] | Blocks) -> Runs:
    """Block ids as runs."""
    if len(ids) == 0:
        return ()
    array = np.asarray(ids, np.int64)
    starts = np.flatnonzero(np.diff(array, prepend=array[0] - 2) != 1)
    lengths = np.diff(starts, append=len(array))
    flat = np.stack((array[starts], lengths), axis=1).ravel()
    return tuple(flat.tolist())


class Chain:
    """Turns the whole prompts of a session, one after another, into what each shares with the
    longest matching of the last `LOOK_BACK` ones."""

    LOOK_BACK = 8

    def __init__(self) -> None:
        self._chains: list[Blocks] = []

    def add(self, ids: Blocks) -> dict[str, Any]:
        """``shared``, ``fresh`` and ``back`` of the turn with these blocks."""
        best, back = 0, 1
        for n, chain in enumerate(reversed(self._chains), 1):
            shared = common_prefix(chain, ids)
            if shared > best:
                best, back = shared, n
            if n == 1 and shared == min(len(chain), len(ids)):
                break
        self._chains.append(ids)
        del self._chains[: -self.LOOK_BACK]
        return {"shared": best, "fresh": runs_of(ids[best:]), "back": back}


def common_prefix(a: Blocks, b: Blocks) -> int:
    """How many blocks two prompts have in common from their start."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n


class Growing:
    """Makes up a session's blocks from its prompts' lengths: every prompt extends the one before,
    unless it got shorter or follows a compaction; then it keeps what the server had cached."""

    def __init__(self) -> None:
        self._blocks = 0
        self._next = 0

    def add(
        self, prompt_tokens: int, cached_tokens: int, compacted: bool = False
    ) -> dict[str, Any]:
        """``shared`` and ``fresh`` of the turn with this prompt."""
        blocks = max(1, prompt_tokens // BLOCK_TOKENS)
        shared = min(self._blocks, blocks)
        if compacted or blocks < self._blocks:
            shared = min(shared, cached_tokens // BLOCK_TOKENS)
        added = blocks - shared
        start, self._next, self._blocks = self._next, self._next + added, blocks
        return {"shared": shared, "fresh": (start, added) if added else ()}


def with_gaps_from_times(turns: list[Turn]) -> list[Turn]:
    """The turns with the gaps that their times tell."""
    out = turns[:1]
    for before, turn in pairwise(turns):
        gap_s = max(0.0, turn.at_s - before.at_s - (before.api_s or 0.0))
        out.append(replace(turn, gap_s=gap_s))
    return out
