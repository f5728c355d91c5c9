"""Claude Code's transcripts: ``~/.claude/projects/**/*.jsonl``.

A file holds a conversation's entries as they came, its sub-agents' ones in files of their own
(``subagents/agent-*.jsonl``) or, in older versions, among them as side chains. An assistant message
is written once for every block it streams, with equal ``message.id``: these are one turn, whose
usage the last of them knows. A conversation that was forked begins with copies of another's
messages, which are left out.

The prompts' texts are not looked at but for what tells who spoke; blocks are made up from the
prompts' lengths (`gateway.traces.session.Growing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import orjson

from gateway.dialects.turn import HEAD_CHARS, Item, ToolCall, ToolResult
from gateway.idle import (
    IdleKind,
    idle_after,
    notified_calls,
    resumed_by,
    starts_background,
    waited_for,
    went_to_background,
)
from gateway.traces.lines import tokens
from gateway.traces.session import Call, Growing, Session, Turn, Usage

CLIENT: Final = "claude-code"
_SYNTHETIC: Final = "<synthetic>"
_LOCAL: Final = ("<command-name>", "<local-command-", "<bash-input>", "<bash-stdout>")
"""How entries begin that the client keeps for itself: they lead to no model call."""


def is_entry(record: dict[str, Any]) -> bool:
    kind = record.get("type")
    return (kind in ("user", "assistant") and isinstance(record.get("message"), dict)) or (
        "agentType" in record and "toolUseId" in record
    )


def _usage_of(usage: dict[str, Any]) -> Usage:
    cached = tokens(usage.get("cache_read_input_tokens"))
    written = tokens(usage.get("cache_creation_input_tokens"))
    prompt = tokens(usage["input_tokens"]) + cached + written
    return Usage(prompt, cached, tokens(usage["output_tokens"]))


@dataclass(slots=True)
class _Open:
    """A turn while its entries come in."""

    sent_at: float
    ended_at: float
    model: str
    usage: Usage
    compacted: bool
    resumed: IdleKind | None
    """What ended the wait before it."""
    calls: dict[str, tuple[ToolCall, float]] = field(default_factory=dict)


@dataclass(slots=True)
class _Stream:
    """One conversation: the main one of a session, or a sub-agent's."""

    session: str
    agent: str
    turns: list[_Open] = field(default_factory=list)
    by_message: dict[str, _Open] = field(default_factory=dict)
    heard_at: float | None = None
    begun_at: float = math.inf
    resumed: IdleKind | None = None
    compacted: bool = False
    results: dict[str, tuple[float, bool]] = field(default_factory=dict)
    background: set[str] = field(default_factory=set)
    notified: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.session}/{self.agent}" if self.agent else self.session


class Reader:
    """The entries of all transcripts, put together to sessions."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._sent_at: dict[str, float] = {}
        self._agents: dict[str, tuple[str, str]] = {}
        self._child_of_call: dict[str, str] = {}
        self._side_roots: dict[str, str] = {}

    def feed(self, record: dict[str, Any], file_agent: str = "") -> None:
        """Take an entry; ``file_agent`` is the sub-agent that its file is named after. Raises what
        a record of another shape raises."""
        if "agentType" in record and "toolUseId" in record and "type" not in record:
            self._agents[file_agent] = (str(record["agentType"]), str(record["toolUseId"]))
            self._child_of_call[str(record["toolUseId"])] = file_agent
            return
        kind = record.get("type")
        if kind == "api-request":
            self._sent_at[record["id"]] = _unix(record["timestamp"])
            return
        if kind not in ("user", "assistant", "system") or "forkedFrom" in record:
            return
        stream = self._stream(record)
        stream.begun_at = min(stream.begun_at, _unix(record["timestamp"]))
        if kind == "system":
            stream.compacted |= record.get("subtype") == "compact_boundary"
        elif kind == "user":
            self._user(stream, record)
        else:
            self._assistant(stream, record)

    def sessions(self) -> list[Session]:
        """The sessions read, sub-agents after their parents."""
        self._leave_out_copies()
        owner = {
            call_id: stream.name
            for stream in self._streams.values()
            for turn in stream.turns
            for call_id in turn.calls
        }
        children = {
            call_id: f"{stream.session}/{agent}"
            for call_id, agent in self._child_of_call.items()
            for stream in [self._stream_of_agent(agent)]
            if stream is not None
        }
        found = []
        for stream in sorted(self._streams.values(), key=lambda s: (s.session, s.agent)):
            if not stream.turns:
                continue
            session = _session(stream, children)
            if stream.agent:
                agent_type, call_id = self._agents.get(stream.agent, ("", ""))
                session.agent_type = agent_type
                session.parent = owner.get(call_id, stream.session)
            found.append(session)
        return found

    def _leave_out_copies(self) -> None:
        """A message belongs to the conversation that began first: forks begin with copies."""
        seen: set[str] = set()
        for stream in sorted(self._streams.values(), key=lambda s: s.begun_at):
            copies = seen & stream.by_message.keys()
            seen |= stream.by_message.keys()
            copied = {id(stream.by_message[name]) for name in copies}
            stream.turns = [turn for turn in stream.turns if id(turn) not in copied]

    def _stream_of_agent(self, agent: str) -> _Stream | None:
        return next((s for (_, a), s in self._streams.items() if a == agent), None)

    def _stream(self, record: dict[str, Any]) -> _Stream:
        session = str(record["sessionId"])
        agent = ""
        if record.get("isSidechain"):
            agent = str(record.get("agentId") or self._side_root(record))
        key = (session, agent)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = _Stream(session, agent)
        return stream

    def _side_root(self, record: dict[str, Any]) -> str:
        own, parent = str(record["uuid"]), record.get("parentUuid")
        root = self._side_roots.get(str(parent), own)
        self._side_roots[own] = root
        return root

    def _user(self, stream: _Stream, record: dict[str, Any]) -> None:
        at = _unix(record["timestamp"])
        content = record["message"]["content"]
        if record.get("isCompactSummary"):
            stream.compacted = True
            stream.resumed = stream.resumed or "background"
            return
        if isinstance(content, str):
            if content.startswith(_LOCAL):
                return
            content = [{"type": "text", "text": content}]
        results = [block for block in content if block.get("type") == "tool_result"]
        for block in results:
            call_id = str(block["tool_use_id"])
            stream.results.setdefault(call_id, (at, block.get("is_error") is True))
            head = _head(block.get("content"))
            if went_to_background(ToolResult(call_id, False, head)):
                stream.background.add(call_id)
            told = record.get("toolUseResult")
            if isinstance(told, dict) and isinstance(told.get("agentId"), str):
                self._child_of_call.setdefault(call_id, told["agentId"])
                kind = told.get("agentType")
                self._agents.setdefault(told["agentId"], (str(kind or ""), call_id))
        text = "" if record.get("isMeta") else _head(content)
        if not results and not text:
            return
        answers = tuple(ToolResult(str(b["tool_use_id"]), False, "") for b in results)
        item = Item(b"", "user", results=answers, text=text)
        stream.notified.update(notified_calls(item) or ())
        resumed = resumed_by(item)
        if stream.resumed is None or resumed != "tool":
            stream.resumed = resumed
        stream.heard_at = at

    def _assistant(self, stream: _Stream, record: dict[str, Any]) -> None:
        message = record["message"]
        if message.get("model") == _SYNTHETIC or record.get("isApiErrorMessage"):
            return
        at = _unix(record["timestamp"])
        name = str(message["id"])
        usage = _usage_of(message["usage"])
        turn = stream.by_message.get(name)
        if turn is None:
            sent_at = self._sent_at.get(str(record.get("requestRef")), stream.heard_at)
            turn = _Open(
                min(sent_at if sent_at is not None else at, at),
                at,
                str(message.get("model") or ""),
                usage,
                stream.compacted,
                stream.resumed,
            )
            stream.turns.append(turn)
            stream.by_message[name] = turn
            stream.resumed, stream.compacted = None, False
        turn.ended_at = max(turn.ended_at, at)
        if usage.output_tokens >= turn.usage.output_tokens:
            turn.usage = usage
        for block in message["content"]:
            if block["type"] == "tool_use":
                arguments = orjson.dumps(block.get("input")).decode()
                call = ToolCall.of(str(block["id"]), str(block["name"]), arguments)
                turn.calls.setdefault(call.id, (call, at))


def _session(stream: _Stream, children: dict[str, str]) -> Session:
    started_at = stream.turns[0].sent_at
    session = Session(
        stream.name,
        client=CLIENT,
        parent=stream.session if stream.agent else None,
        started_at=started_at,
    )
    growing = Growing()
    in_background: set[str] = set()
    before: _Open | None = None
    for turn, after in zip(stream.turns, [*stream.turns[1:], None], strict=True):
        tool_calls = [call for call, _ in turn.calls.values()]
        in_background |= {
            call.id
            for call in tool_calls
            if call.id in stream.background or starts_background(call)
        }
        kind = idle_after(tool_calls, bool(in_background - stream.notified))
        if after is not None:
            kind = waited_for(kind, after.resumed)
        elif stream.agent and not tool_calls:
            kind = "ended"
        usage = turn.usage
        session.turns.append(
            Turn(
                round(turn.sent_at - started_at, 3),
                usage.prompt_tokens,
                usage.output_tokens,
                gap_s=round(max(0.0, turn.sent_at - before.ended_at), 3) if before else 0.0,
                api_s=round(turn.ended_at - turn.sent_at, 3),
                idle_kind=kind,
                cached_tokens=usage.cached_tokens,
                model=turn.model,
                compacted=turn.compacted,
                calls=tuple(_calls(turn, stream, children)),
                **growing.add(usage.prompt_tokens, usage.cached_tokens, turn.compacted),
            )
        )
        before = turn
    return session


def _calls(turn: _Open, stream: _Stream, children: dict[str, str]) -> Iterator[Call]:
    for call, asked_at in turn.calls.values():
        answered = stream.results.get(call.id)
        yield replace(
            Call.of(call),
            duration_s=round(max(0.0, answered[0] - asked_at), 3) if answered else None,
            failed=bool(answered and answered[1]),
            child=children.get(call.id),
        )


def _head(content: Any) -> str:
    """The beginning of a text or of blocks' texts, without what the client puts before them."""
    if isinstance(content, str):
        texts = [content]
    elif isinstance(content, list):
        texts = [str(b.get("text") or "") for b in content if b.get("type") == "text"]
    else:
        return ""
    spoken = [text for text in texts if text and not text.startswith("<system-reminder>")]
    return "\n".join(spoken)[:HEAD_CHARS]


def _unix(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()
