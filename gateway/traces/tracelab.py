"""Rounds of TraceLab, one model call a line (uw-syfi/TraceLab, ``syfi_coding_trace.jsonl``): token
counts, the times of its events, its tool calls without their arguments.

Fields as its README and example sessions have them. A round may be there more than once, in a
fork's copied history as well, and counts where it is first. Blocks are made up from the prompts'
lengths (`gateway.traces.session.Growing`); a call lasts until its result is there, a person's
permission included.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from operator import attrgetter
from typing import Any, Final

from gateway.dialects.turn import ToolCall
from gateway.idle import IdleKind, idle_after, waited_for
from gateway.traces.lines import count, number, tokens
from gateway.traces.session import CLIENTS, Call, Growing, Session, Turn

_RESUMES: Final[dict[str, IdleKind]] = {"user_message": "human", "tool_result": "tool"}
"""What a round answers; where it is both, a person did not wait for the tool."""
_ANSWERS: Final = frozenset({"reasoning", "text", "tool_call"})


def is_round(record: dict[str, Any]) -> bool:
    return "session_id" in record and "prefix_tokens" in record and "timing_events" in record


@dataclass(frozen=True, slots=True)
class _Round:
    index: int
    sent_at: float
    """Unix seconds of the last input before the answer began."""
    ended_at: float
    resumed: IdleKind | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    model: str
    kind: IdleKind
    """What its calls wait for."""
    calls: tuple[Call, ...]

    @classmethod
    def of(cls, record: dict[str, Any]) -> _Round:
        events = [
            (event["event_type"], _at(event["timestamp"]))
            for event in record["timing_events"]
            if event["timestamp"] is not None
        ]
        answer = [at for what, at in events if what in _ANSWERS] or [at for _, at in events[-1:]]
        begun_at = min(answer)
        heard = {what: at for what, at in events if what in _RESUMES and at <= begun_at}
        asked = [_asked(tool) for tool in record.get("tools") or ()]
        return cls(
            int(number(record["round_index"])),
            max(heard.values(), default=begun_at),
            max(answer),
            next((kind for what, kind in _RESUMES.items() if what in heard), None),
            count(record["input_tokens_total"]),
            tokens(record["prefix_tokens"]),
            tokens(record.get("output_tokens")),
            sys.intern(str(record.get("model") or "")),
            idle_after([call for call, _ in asked], False),
            tuple(call for _, call in asked),
        )


def _at(timestamp: str) -> float:
    at = datetime.fromisoformat(timestamp)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _asked(tool: dict[str, Any]) -> tuple[ToolCall, Call]:
    asked = ToolCall.of("", str(tool["tool_name"]), "{}")
    wall_ms = tool.get("tool_wall_latency_ms")
    duration_s = None if wall_ms is None else number(max(0, wall_ms)) / 1e3
    call = replace(Call.of(asked), duration_s=duration_s, failed=bool(tool.get("is_error")))
    return asked, call


class Reader:
    """Rounds of all files, put together to sessions."""

    def __init__(self) -> None:
        self._rounds: dict[str, list[_Round]] = {}
        self._clients: dict[str, str] = {}
        self._seen: set[int] = set()

    def feed(self, record: dict[str, Any]) -> None:
        """Take a round. Raises what a record of another shape raises."""
        found = _Round.of(record)
        names = (record.get("project"), record.get("session_file"), record["session_id"])
        session = "/".join(str(name) for name in names if name)
        key = hash(record.get("round_id") or (session, found.index))
        if key in self._seen:
            return
        self._seen.add(key)
        self._rounds.setdefault(session, []).append(found)
        provider = str(record.get("provider") or "")
        self._clients.setdefault(session, CLIENTS.get(provider, provider))

    def sessions(self) -> Iterator[Session]:
        """The sessions whose rounds were read, and no more of them."""
        self._seen.clear()
        for name in list(self._rounds):
            rounds = sorted(self._rounds.pop(name), key=attrgetter("index"))
            yield _session(name, self._clients.pop(name), rounds)


def _session(name: str, client: str, rounds: list[_Round]) -> Session:
    started_at = rounds[0].sent_at
    session = Session(name, client=client, started_at=started_at)
    growing = Growing()
    kinds = [waited_for(one.kind, after.resumed) for one, after in pairwise(rounds)]
    ended_at = started_at
    due = rounds[0].index
    for position, one in enumerate(rounds):
        sent_at = max(one.sent_at, ended_at)
        session.turns.append(
            Turn(
                round(sent_at - started_at, 3),
                one.prompt_tokens,
                one.output_tokens,
                gap_s=round(sent_at - ended_at, 3) if one.index <= due else 0.0,
                gap_known=one.index <= due,
                api_s=round(max(0.0, one.ended_at - sent_at), 3),
                idle_kind=kinds[position] if position < len(kinds) else one.kind,
                cached_tokens=one.cached_tokens,
                model=one.model,
                calls=one.calls,
                **growing.add(one.prompt_tokens, one.cached_tokens),
            )
        )
        ended_at = max(sent_at, one.ended_at)
        due = one.index + 1
    return session
