"""The gateway's own recordings, a contract (docs/recording.md): `SessionRecord` and `TurnRecord`, a
JSON object a line.

A session's line stands before its first turn in a file, and each turn's prompt is told by what it
shares with one before it in the same file, so that a file needs no other.

A prompt is a list of blocks. Written by `dump` they are the trace's own. Written by the gateway,
which counts bytes and no tokens, they are `BLOCK_BYTES` of the request in its canonical form, and
`Reader` lays them out anew: as many blocks of `BLOCK_TOKENS` tokens as the pods' own counts say, in
every prompt the same ones for the same beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec
import numpy as np

from gateway.idle import IdleKind
from gateway.traces.lines import TraceError
from gateway.traces.session import (
    BLOCK_TOKENS,
    MAX_BLOCKS,
    Blocks,
    Call,
    Chain,
    Runs,
    Session,
    Turn,
    expand,
    is_id,
)

SCHEMA: Final = 1
BLOCK_BYTES: Final = 256
"""Of 64 tokens, about."""
CHAINS_KEPT: Final = 1_024
"""Sessions whose latest prompts are at hand while reading."""

Tokens: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, lt=1e12)]
Time: TypeAlias = Annotated[float, msgspec.Meta(gt=-1e12, lt=1e12)]


class CallRecord(msgspec.Struct, omit_defaults=True, gc=False):
    """A tool call: words and numbers that `gateway.predictor.features` makes of it."""

    kind: str
    """`shell`, `read`, `edit`, … (`gateway.predictor.kinds`)"""
    tool: str
    """Name of the tool; `*` if it may not be kept."""
    program: str = ""
    """What a shell command runs; `*` if it may not be kept."""
    sub: str = ""
    """The program's subcommand."""
    numbers: tuple[float, ...] = ()
    """Sizes, time limits and counts of the arguments, in the order of
    `gateway.predictor.features.NUMBERS` without its first."""
    duration_s: Seconds | None = None
    failed: bool = False
    child: str | None = None
    """The sub-agent's session that it started."""


class ForecastRecord(msgspec.Struct, omit_defaults=True, gc=False):
    """What was forecast of the gap after a turn, when it ended."""

    quantiles_s: tuple[float | None, ...]
    """The gap is no longer than these with probability 0.1, 0.25, 0.5, 0.75, 0.9, if the session
    returns; null beyond what is forecast."""
    p_return: float
    """Probability that it returns."""


class SessionRecord(msgspec.Struct, tag_field="type", tag="session", omit_defaults=True, gc=False):
    """A session, before its first turn in the file."""

    cachewise: int
    """Version of the schema: 1."""
    session: str
    """Its name: of the client's id for it a keyed hash."""
    started_at: float | None = None
    """Unix seconds of its start, from which its turns' `at_s` count."""
    start_s: Time = 0.0
    """Of a sub-agent without `started_at`: seconds after its parent's start."""
    client: str = ""
    """`claude-code`, `codex`, …"""
    tenant: str = ""
    """A keyed hash."""
    parent: str | None = None
    """The session that started it."""
    forked_from: str | None = None
    """The session whose history it goes on with."""
    agent_type: str = ""
    """Of a sub-agent or an aside, such as `auxiliary` (titles) and `compaction`."""
    scope: str = ""
    """Equal blocks of sessions of equal scope are equal; without one they are the session's own."""
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = BLOCK_TOKENS
    """Size of its blocks in tokens."""
    block_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    """Size of its blocks in bytes of the canonical request, where they were cut by bytes."""
    tool_tokens: Tokens = 0
    """Of its tools' definitions, about."""
    system_tokens: Tokens = 0
    """Of its system prompt, about."""


class TurnRecord(msgspec.Struct, tag_field="type", tag="turn", omit_defaults=True, gc=False):
    """One turn, written when it has ended."""

    cachewise: int
    """Version of the schema: 1."""
    session: str
    n: Annotated[int, msgspec.Meta(ge=0)]
    """Its place among the session's records since the session's line, from 0."""
    at_s: Time
    """When the request was there, seconds after the session's start."""
    prompt_tokens: Tokens
    output_tokens: Tokens = 0
    cached_tokens: Tokens | None = None
    """Of the prompt, as the pod reported it."""
    estimated: bool = False
    """The pod told no usage: `prompt_tokens` is an estimate."""
    shared: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCKS)] = 0
    """Blocks from the start in common with the prompt `back` records before it."""
    fresh: tuple[int, ...] = ()
    """The blocks behind these, as pairs of first id and number: `[7, 2, 20, 1]` is 7, 8, 20."""
    back: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Always 1 in what the gateway writes."""
    number: int = 0
    """Its place among the session's turns at the gateway, from 1."""
    gap_s: Seconds = 0.0
    """The client's wait before it, from the end of the turn before."""
    gap_known: bool = True
    """False where it is not known: after a turn that failed, or the first since a restart."""
    gap_kind: IdleKind | None = None
    """What that wait was for, as the turn showed: `tool`, `human`, `background`."""
    call_durations_s: tuple[Seconds | None, ...] = ()
    """How long each call of the turn before ran, where the client says so."""
    idle_kind: IdleKind | None = None
    """What the session waits for after it: `tool`, `human`, `background`, `ended`."""
    stop: str | None = None
    """`tool_use`, `end_turn`, `max_tokens`, `other`; null if the answer never ended."""
    held_s: Seconds = 0.0
    """Of `api_s`, how long the gateway held it."""
    first_token_s: Seconds | None = None
    """To the first byte of the answer."""
    api_s: Seconds | None = None
    """To the end of the answer."""
    model: str = ""
    compacted: bool = False
    """Its prompt follows a compaction."""
    broken_by: str | None = None
    """Why it does not extend the prompt before it: `model`, `tools`, `system`, `compaction`,
    `edit`, `truncation`."""
    lost_tokens: dict[str, int] = {}
    """Tokens that were not cached or given up, by cause (docs/admission.md)."""
    calls: tuple[CallRecord, ...] = ()
    """The tool calls that it asks for."""
    forecast: ForecastRecord | None = None
    """Of the gap after it."""
    pod: str = ""
    wire: str = ""
    """The dialect: `chat`, `completions`, `responses`, `messages`."""
    request_class: str = ""
    """`main`, `subagent`, `auxiliary`, `compaction`."""
    outcome: str = "ok"
    """As in `cachewise_turns_total`. Only turns that are `ok` become turns of a trace."""
    status: int = 200
    """HTTP status."""


Record: TypeAlias = SessionRecord | TurnRecord
lines = msgspec.json.Encoder().encode_lines
"""Records as lines of a file."""


def is_record(record: dict[str, Any]) -> bool:
    return "cachewise" in record and "session" in record


# -- reading -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Coming:
    """A session that is being read."""

    session: Session
    by_bytes: bool
    origin_s: float | None
    """Of the `at_s` of the file that is read now."""
    prompt: Runs = ()
    """Of its last record in this file, where it is told by bytes."""
    next: int = -1
    """The `n` of its next record in this file; -1 if what that builds on was not read."""
    number: int = 0
    """Of the last turn read, if that is the last in ``session``."""


class Reader:
    """The records of all recordings, put together to sessions; a session may be spread over files,
    of one gateway or of several."""

    def __init__(self) -> None:
        self._coming: dict[str, _Coming] = {}
        self._chains: OrderedDict[str, Chain] = OrderedDict()
        self._ends: dict[tuple[str, int], float] = {}
        """Tokens up to a run's end, by scope and its first block."""

    def begin(self) -> None:
        """A file begins: what its records share, they share with one another."""
        for coming in self._coming.values():
            coming.next = -1

    def feed(self, path: Path, record: dict[str, Any]) -> None:
        """Take a record.

        Raises:
            TraceError: it is of a later schema.
            ValueError: it is of another shape, or what it shares blocks with was not read.
        """
        version = record["cachewise"]
        if not isinstance(version, int) or version < 1:
            raise ValueError
        if version > SCHEMA:
            raise TraceError(
                f"{path}: recorded in schema {version} by a later version of the gateway; this one"
                f" reads schema {SCHEMA}"
            )
        try:
            told: Record = msgspec.convert(record, Record)
        except msgspec.ValidationError:
            raise ValueError from None
        if isinstance(told, SessionRecord):
            self._begin(told)
        else:
            self._turn(self._coming[told.session], told)

    def _begin(self, told: SessionRecord) -> None:
        coming = self._coming.get(told.session)
        if coming is None:
            session = Session(
                told.session,
                client=told.client,
                parent=told.parent,
                agent_type=told.agent_type,
                started_at=told.started_at,
                start_s=told.start_s,
                block_tokens=BLOCK_TOKENS if told.block_bytes else told.block_tokens,
                scope=told.scope,
                tool_tokens=told.tool_tokens,
                system_tokens=told.system_tokens,
            )
            coming = _Coming(session, told.block_bytes > 0, told.started_at)
            self._coming[told.session] = coming
        coming.origin_s = told.started_at
        coming.prompt = ()
        coming.next = 0

    def _turn(self, coming: _Coming, told: TurnRecord) -> None:
        if told.n != coming.next or told.back > max(1, told.n):
            coming.next = -1  # what follows builds on it
            raise ValueError
        if len(told.fresh) % 2 or min(told.fresh[1::2], default=1) < 1:
            raise ValueError
        runs = told.fresh
        if coming.by_bytes:
            runs = (*_first(coming.prompt, told.shared), *runs)
        if sum(runs[1::2]) > MAX_BLOCKS or not all(map(is_id, told.fresh[::2])):
            raise ValueError
        coming.next = told.n + 1
        coming.prompt = runs
        if told.outcome != "ok":
            coming.number = 0
            return
        session = coming.session
        blocks: dict[str, Any] = {"shared": told.shared, "fresh": told.fresh, "back": told.back}
        if coming.by_bytes:
            blocks = self._chain(session).add(self._laid_out(session.scope, runs, told))
        at_s = told.at_s
        if coming.origin_s is not None and session.started_at is not None:
            at_s = _rebased(at_s, coming.origin_s, session.started_at)
        gap_known = told.gap_known
        if told.number and session.turns:
            if told.number == 1:
                gap_known = False  # the gateway, but not the session, is new
            elif told.number == coming.number + 1:
                session.turns[-1] = _settled(session.turns[-1], told)
        coming.number = told.number
        session.turns.append(
            Turn(
                at_s,
                told.prompt_tokens,
                told.output_tokens,
                gap_s=told.gap_s,
                gap_known=gap_known,
                api_s=told.api_s,
                first_token_s=told.first_token_s,
                idle_kind=told.idle_kind or "human",
                stop=told.stop,
                cached_tokens=told.cached_tokens,
                model=told.model,
                compacted=told.compacted,
                calls=tuple(map(_call, told.calls)),
                **blocks,
            )
        )

    def _laid_out(self, scope: str, runs: Runs, told: TurnRecord) -> Blocks:
        """The prompt in blocks of tokens. What begins as an earlier prompt did has that one's
        blocks; the rest of the prompt's tokens go to the runs behind by their length in bytes."""
        wanted = max(1, -(-told.prompt_tokens // BLOCK_TOKENS))
        ends = self._ends
        places = [(scope, start) for start in runs[::2]]
        known = next((i for i in range(len(places), 0, -1) if places[i - 1] in ends), 0)
        end = ends[places[known - 1]] if known else 0.0
        cells = sum(runs[2 * known + 1 :: 2])
        rate = max(0.0, told.prompt_tokens - end) / cells if cells else 0.0
        for place, length in zip(places[known:], runs[2 * known + 1 :: 2], strict=True):
            end += rate * length
            ends[place] = end
        found: list[int] = []
        blocks = 0
        for place in places:
            last = min(wanted, int(ends[place] + 1e-6) // BLOCK_TOKENS)
            if last > blocks:
                found += (place[1], last - blocks)
                blocks = last
        if blocks < wanted and places:  # the last block is not full
            if found and found[-2] == places[-1][1]:
                found[-1] += wanted - blocks
            else:
                found += (places[-1][1], wanted - blocks)
        return expand(tuple(found))

    def _chain(self, session: Session) -> Chain:
        chain = self._chains.get(session.id)
        if chain is None:
            chain = self._chains[session.id] = Chain()
            for ids in session.chains():
                chain.add(ids)
            while len(self._chains) > CHAINS_KEPT:
                self._chains.popitem(last=False)
        self._chains.move_to_end(session.id)
        return chain

    def sessions(self) -> list[Session]:
        """The sessions that have turns, their turns in order of time."""
        found = [coming.session for coming in self._coming.values() if coming.session.turns]
        for session in found:
            if any(b.at_s < a.at_s for a, b in pairwise(session.turns)):
                _put_in_order(session)
        return found


def _first(runs: Runs, blocks: int) -> Runs:
    """The first blocks of a prompt. Raises `ValueError` if it has fewer."""
    kept: list[int] = []
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if blocks <= 0:
            break
        kept += (start, min(length, blocks))
        blocks -= length
    if blocks > 0:
        raise ValueError
    return tuple(kept)


def _rebased(at_s: float, origin_s: float, started_at: float) -> float:
    return at_s if origin_s == started_at else round(at_s + origin_s - started_at, 6)


def _settled(turn: Turn, after: TurnRecord) -> Turn:
    """A turn, with what the session's next one tells of it."""
    calls = turn.calls
    if len(after.call_durations_s) <= len(calls):
        told = zip(calls, after.call_durations_s, strict=False)
        timed = [replace(call, duration_s=duration_s) for call, duration_s in told]
        calls = (*timed, *calls[len(timed) :])
    return replace(turn, idle_kind=after.gap_kind or turn.idle_kind, calls=calls)


def _call(told: CallRecord) -> Call:
    return Call(
        told.kind, told.tool, told.program, told.sub, told.duration_s, told.failed, told.child
    )


def _put_in_order(session: Session) -> None:
    turns = list(zip(session.turns, [np.array(ids) for ids in session.chains()], strict=True))
    turns.sort(key=lambda turn: turn[0].at_s)
    chain = Chain()
    session.turns = [replace(turn, **chain.add(ids)) for turn, ids in turns]


# -- writing -------------------------------------------------------------------------------------


def dump(sessions: Iterable[Session]) -> Iterator[bytes]:
    """The sessions, a line each and one a turn. All of a `Session` is kept."""
    for session in sessions:
        head = SessionRecord(
            SCHEMA,
            session.id,
            started_at=session.started_at,
            start_s=session.start_s,
            client=session.client,
            parent=session.parent,
            agent_type=session.agent_type,
            scope=session.scope,
            block_tokens=session.block_tokens,
            tool_tokens=session.tool_tokens,
            system_tokens=session.system_tokens,
        )
        yield lines((head,))
        for n, turn in enumerate(session.turns):
            yield lines((_record(session.id, n, turn),))


def _record(session: str, n: int, turn: Turn) -> TurnRecord:
    return TurnRecord(
        SCHEMA,
        session,
        n,
        turn.at_s,
        turn.prompt_tokens,
        turn.output_tokens,
        turn.cached_tokens,
        shared=turn.shared,
        fresh=turn.fresh,
        back=turn.back,
        gap_s=turn.gap_s,
        gap_known=turn.gap_known,
        idle_kind=turn.idle_kind,
        stop=turn.stop,
        first_token_s=turn.first_token_s,
        api_s=turn.api_s,
        model=turn.model,
        compacted=turn.compacted,
        calls=tuple(
            CallRecord(
                call.kind,
                call.tool,
                call.program,
                call.sub,
                duration_s=call.duration_s,
                failed=call.failed,
                child=call.child,
            )
            for call in turn.calls
        ),
    )
