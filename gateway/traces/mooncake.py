"""Mooncake traces: one request a line, ``timestamp`` (ms), ``input_length``, ``output_length``,
``hash_ids`` (a block's id stands for the whole prefix up to it; equal ids are shared by all).

The format knows no sessions. Where a line has ``session_id``, as AIPerf's reading of the format
allows and `dump` writes, that is the session, and ``delay`` (ms) the client's wait before it.
Otherwise a request goes on with the session whose last prompt it extends by all but its last block,
and a wait holds the response before it. What a session waited for is not told.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import orjson

from gateway.traces.families import starts
from gateway.traces.lines import count, number
from gateway.traces.session import Blocks, Chain, Session, Turn, with_gaps_from_times

BLOCK_TOKENS: Final = 512
"""Of the published traces."""


def is_request(record: dict[str, Any]) -> bool:
    return isinstance(record.get("hash_ids"), list) and "input_length" in record


class Reader:
    """The requests of one file, put together to sessions. Those without an id get one that no other
    file's have."""

    def __init__(self, path: str) -> None:
        self._scope = path
        self._file = hashlib.blake2s(os.path.realpath(path).encode(), digest_size=4).hexdigest()
        self._ids: dict[Any, int] = {}
        self._sessions: dict[str, Session] = {}
        self._chains: dict[str, Chain] = {}
        self._tails: dict[int, str] = {}
        self._told_gaps: set[str] = set()
        self._least = 1
        self._most = 1 << 30

    def feed(self, record: dict[str, Any]) -> None:
        """Take a request. Raises what a record of another shape raises."""
        at_s = number(record["timestamp"]) / 1000
        tokens, output = count(record["input_length"]), count(record["output_length"])
        delay_s = number(record["delay"]) / 1000 if "delay" in record else None
        ids = np.array([self._dense(h) for h in record["hash_ids"]], np.int64)
        key = str(record["session_id"]) if "session_id" in record else self._extended(ids)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(
                key, started_at=at_s, scope=self._scope, tells_waits=False
            )
            self._chains[key] = Chain()
        assert session.started_at is not None
        if delay_s is not None:
            self._told_gaps.add(key)
        session.turns.append(
            Turn(
                round(at_s - session.started_at, 6),
                tokens,
                output,
                gap_s=delay_s or 0.0 if session.turns else 0.0,
                idle_kind="tool",
                **self._chains[key].add(ids),
            )
        )
        for block in ids[-2:].tolist():
            self._tails[block] = key
        if len(ids):
            self._least = max(self._least, -(-tokens // len(ids)))
        if len(ids) > 1:
            self._most = min(self._most, (tokens - 1) // (len(ids) - 1))

    def sessions(self) -> list[Session]:
        """The sessions read."""
        block_tokens = self._block_tokens()
        for key, session in self._sessions.items():
            session.block_tokens = block_tokens
            if key not in self._told_gaps:
                session.turns = with_gaps_from_times(session.turns)
        return list(self._sessions.values())

    def _dense(self, block: Any) -> int:
        return self._ids.setdefault(block, len(self._ids))

    def _extended(self, ids: Blocks) -> str:
        for block in reversed(ids[1:].tolist()):
            key = self._tails.get(block)
            if key is not None:
                return key
        return f"request-{self._file}-{len(self._sessions)}"

    def _block_tokens(self) -> int:
        """The usual size that fits every prompt's number of blocks."""
        for size in (BLOCK_TOKENS, 64, 16, 32, 128, 256, 1024):
            if self._least <= size <= self._most:
                return size
        return self._least


def dump(sessions: Iterable[Session]) -> Iterator[bytes]:
    """The turns in order of time, a line each. Sessions whose start is not told start as
    `gateway.traces.families.starts` says.

    Times are kept to the millisecond. What the format cannot hold is left out: tool calls, idle
    kinds, models, parents, how long a response took.
    """
    everything = list(sessions)
    entries = []
    for place, (session, start_s) in enumerate(zip(everything, starts(everything), strict=True)):
        scope = session.scope or place
        for turn, chain in zip(session.turns, session.chains(), strict=True):
            ids = [f"{scope}-{block}" for block in chain.tolist()]
            entries.append((_milliseconds(start_s, turn), session.id, turn, ids))
    entries.sort(key=lambda entry: entry[0])
    dense: dict[str, int] = {}
    for timestamp, name, turn, ids in entries:
        yield _line(timestamp, name, turn, [dense.setdefault(block, len(dense)) for block in ids])


def dump_in_order(sessions: Iterable[Session]) -> Iterator[bytes]:
    """The same of sessions whose starts are told and that come in their order, a sub-agent behind
    its parent, and whose block ids mean the same in all: holds no more of them than go on at the
    same time."""
    live: list[tuple[int, int, Session, int, Iterator[Blocks]]] = []

    def due(session: Session, k: int) -> int:
        assert session.started_at is not None
        return _milliseconds(session.started_at, session.turns[k])

    def sent(until: float) -> Iterator[bytes]:
        while live and live[0][0] <= until:
            timestamp, place, session, k, chains = live[0]
            yield _line(timestamp, session.id, session.turns[k], next(chains).tolist())
            if k + 1 < len(session.turns):
                heapq.heapreplace(live, (due(session, k + 1), place, session, k + 1, chains))
            else:
                heapq.heappop(live)

    for place, session in enumerate(sessions):
        if session.parent is None:
            yield from sent(due(session, 0))
        heapq.heappush(live, (due(session, 0), place, session, 0, session.chains()))
    yield from sent(math.inf)


def _milliseconds(start_s: float, turn: Turn) -> int:
    return round((start_s + turn.at_s) * 1000)


def _line(timestamp: int, name: str, turn: Turn, ids: list[int]) -> bytes:
    line = {
        "timestamp": timestamp,
        "input_length": turn.prompt_tokens,
        "output_length": turn.output_tokens,
        "hash_ids": ids,
        "session_id": name,
        "delay": round(turn.gap_s * 1000),
    }
    return orjson.dumps(line) + b"\n"
