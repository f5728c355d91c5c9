"""Turns and tool calls, a line each, as `cachewise replay` takes them.

- a turn: ``session``, ``ctx`` (prompt tokens), ``out`` (tokens), ``gap_s`` (after the answer, until
  the next turn) and ``gap_kind`` (``tool``, else a person), in the session's order; optionally
  ``t`` (s, of the answer's end), ``api_s``, ``model``, ``agent``, and ``cache_read`` (tokens in
  common with the turn before, where the prompt got shorter);
- a tool call: ``session``, ``turn`` (the turn that asked for it), ``tool``, ``args`` and
  ``duration_s``. It is added to its turn where both are read.

``source`` and ``session`` together name a session.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gateway.idle import IdleKind
from gateway.predictor.records import call_of
from gateway.traces.lines import count, number, tokens
from gateway.traces.session import CLIENTS, Call, Growing, Session, Turn


def is_turn(record: dict[str, Any]) -> bool:
    return "session" in record and "ctx" in record and "out" in record


def is_call(record: dict[str, Any]) -> bool:
    return "session" in record and "tool" in record and "duration_s" in record


@dataclass(frozen=True, slots=True)
class _Record:
    agent: str
    asked_by: int | None
    ended_s: float | None
    api_s: float | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    gap_s: float
    idle_kind: IdleKind
    model: str

    @classmethod
    def of(cls, record: dict[str, Any], place: int) -> _Record:
        told = record.get
        asked_by = told("turn", place)
        return cls(
            str(told("agent") or ""),
            None if asked_by is None else int(number(asked_by)),
            None if told("t") is None else number(told("t")),
            _seconds(told("api_s")),
            count(record["ctx"]),
            count(record["out"]),
            None if told("cache_read") is None else tokens(told("cache_read")),
            _seconds(told("gap_s")) or 0.0,
            "tool" if told("gap_kind", "tool") == "tool" else "human",
            str(told("model") or ""),
        )


def _seconds(value: Any) -> float | None:
    """Measured times may be a little below zero where clocks differ."""
    return None if value is None else number(max(0.0, value))


class Reader:
    """Turns and calls of all files, put together to sessions."""

    def __init__(self) -> None:
        self._turns: dict[str, list[_Record]] = {}
        self._calls: dict[str, dict[int, list[Call]]] = {}

    def feed(self, record: dict[str, Any]) -> None:
        """Take a turn or a call. Raises what a record of another shape raises."""
        key = str(record["session"])
        if source := record.get("source"):
            key = f"{source}/{key}"
        if is_turn(record):
            turns = self._turns.get(key, [])
            turns.append(_Record.of(record, len(turns)))
            self._turns[key] = turns
            return
        call = replace(
            Call.of(call_of(record)),
            duration_s=_seconds(record["duration_s"]),
            failed=bool(record.get("is_error")),
        )
        self._calls.setdefault(key, {}).setdefault(tokens(record.get("turn")), []).append(call)

    def sessions(self) -> list[Session]:
        """The sessions whose turns were read."""
        found = sorted(self._turns.items())
        return [_session(key, turns, self._calls.get(key, {})) for key, turns in found]


def _session(key: str, records: list[_Record], calls: dict[int, list[Call]]) -> Session:
    agent = records[0].agent
    session = Session(key, client=CLIENTS.get(agent, agent))
    growing = Growing()
    gap_s = now_s = 0.0
    begun_s: float | None = None
    for record in records:
        if record.ended_s is not None:
            sent_s = record.ended_s - (record.api_s or 0.0)
            begun_s = sent_s if begun_s is None else begun_s
            now_s = max(now_s, sent_s - begun_s)
        session.turns.append(
            Turn(
                round(now_s, 3),
                record.prompt_tokens,
                record.output_tokens,
                gap_s=gap_s,
                api_s=record.api_s,
                idle_kind=record.idle_kind,
                cached_tokens=record.cached_tokens,
                model=record.model,
                calls=() if record.asked_by is None else tuple(calls.get(record.asked_by, ())),
                **growing.add(record.prompt_tokens, record.cached_tokens or 0),
            )
        )
        gap_s = record.gap_s
        now_s += (record.api_s or 0.0) + gap_s
    return session
