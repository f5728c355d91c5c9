"""Codex's rollouts: ``~/.codex/sessions/**/rollout-*.jsonl``, one thread a file.

A turn is a response of the model: its items up to the ``token_usage_record`` that closes it, or, in
versions that write none, up to the next item that the client added. Rollouts do not tell when a
request was sent: it is taken to follow the last item that it adds. Blocks are made up from the
prompts' lengths (`gateway.traces.session.Growing`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import orjson

from gateway.dialects.turn import ToolCall
from gateway.idle import IdleKind, idle_after, waited_for
from gateway.traces.lines import tokens
from gateway.traces.session import Call, Growing, Session, Turn, Usage

CLIENT: Final = "codex"
_KINDS: Final = frozenset(
    ("session_meta", "response_item", "event_msg", "turn_context", "compacted", "world_state")
)
_CALLS: Final = frozenset(("function_call", "custom_tool_call", "local_shell_call"))
_OUTPUTS: Final = frozenset(("function_call_output", "custom_tool_call_output"))
_SAID: Final = frozenset(("reasoning", "web_search_call"))
_CONTEXT: Final = ("<environment_context", "<user_instructions", "# AGENTS.md", "<permissions")
"""How user messages begin that the client writes."""


def is_entry(record: dict[str, Any]) -> bool:
    return record.get("type") in _KINDS and isinstance(record.get("payload"), dict)


def _usage_of(usage: dict[str, Any]) -> Usage:
    return Usage(
        tokens(usage["input_tokens"]),
        tokens(usage.get("cached_input_tokens")),
        tokens(usage["output_tokens"]),
    )


@dataclass(slots=True)
class _Open:
    sent_at: float
    ended_at: float
    resumed: IdleKind | None
    compacted: bool
    model: str
    usage: Usage | None = None
    closed: bool = False
    calls: dict[str, tuple[ToolCall, float]] = field(default_factory=dict)


class Reader:
    """The entries of one rollout."""

    def __init__(self) -> None:
        self._meta: dict[str, Any] | None = None
        self._turns: list[_Open] = []
        self._results: dict[str, tuple[float, bool]] = {}
        self._children: dict[str, str] = {}
        self._heard_at: float | None = None
        self._resumed: IdleKind | None = None
        self._compacted = False
        self._model = ""
        self._records = False

    def feed(self, record: dict[str, Any]) -> None:
        """Take an entry. Raises what a record of another shape raises."""
        kind, payload = record["type"], record["payload"]
        at = datetime.fromisoformat(record["timestamp"]).timestamp()
        if kind == "session_meta":
            self._meta = self._meta or payload | {
                "id": str(payload["id"])
            }  # a fork repeats the one it came from
        elif kind == "turn_context":
            self._model = str(payload.get("model") or self._model)
        elif kind == "compacted":
            self._compacted = True
            self._close()
        elif kind == "response_item":
            self._item(payload, at)
        elif kind == "token_usage_record":
            usage = _usage_of(payload["usage"])
            self._records = True
            turn = self._current(at)
            turn.usage, turn.closed = usage, True
        elif kind == "event_msg" and payload.get("type") == "token_count" and not self._records:
            told = (payload.get("info") or {}).get("last_token_usage")
            if told and self._turns and self._turns[-1].usage is None:
                self._turns[-1].usage = _usage_of(told)

    def _item(self, item: dict[str, Any], at: float) -> None:
        kind = item["type"]
        if kind in _CALLS:
            turn = self._current(at)
            name = str(item.get("name") or kind)
            if namespace := item.get("namespace"):
                name = f"{namespace}.{name}"
            call_id = str(item.get("call_id") or item.get("id"))
            arguments = item.get("arguments", item.get("input"))
            if not isinstance(arguments, str):
                arguments = orjson.dumps(item.get("action", arguments)).decode()
            turn.calls.setdefault(call_id, (ToolCall.of(call_id, name, arguments), at))
        elif kind in _OUTPUTS:
            call_id = str(item["call_id"])
            output = item.get("output")
            self._results.setdefault(call_id, (at, _failed(output)))
            if child := _agent_in(output):
                self._children[call_id] = child
            self._heard(at, "tool")
        elif kind in _SAID or (kind == "message" and item.get("role") == "assistant"):
            self._current(at)
        elif kind == "message" and item.get("role") == "user":
            spoken = _spoken(item)
            self._heard(at, "human" if spoken else None)

    def _heard(self, at: float, resumed: IdleKind | None) -> None:
        self._heard_at = at
        if resumed is not None and self._resumed != "human":
            self._resumed = resumed
        if not self._records:
            self._close()

    def _close(self) -> None:
        if self._turns:
            self._turns[-1].closed = True

    def _current(self, at: float) -> _Open:
        if not self._turns or self._turns[-1].closed:
            sent_at = self._heard_at if self._heard_at is not None else at
            if self._turns:
                sent_at = max(sent_at, self._turns[-1].ended_at)
            self._turns.append(
                _Open(min(sent_at, at), at, self._resumed, self._compacted, self._model)
            )
            self._resumed, self._compacted = None, False
        turn = self._turns[-1]
        turn.ended_at = max(turn.ended_at, at)
        return turn

    def sessions(self) -> list[Session]:
        """The thread; nothing if no response of it tells its tokens.

        Raises:
            KeyError: there are such responses, but not the ``session_meta`` that names the thread.
        """
        turns = [turn for turn in self._turns if turn.usage is not None]
        if not turns:
            return []
        if self._meta is None:
            raise KeyError("session_meta")
        name = self._meta["id"]
        parent = _parent(self._meta)
        started_at = turns[0].sent_at
        session = Session(name, client=CLIENT, parent=parent, started_at=started_at)
        source = self._meta.get("source")
        if parent is not None and isinstance(source, dict):
            session.agent_type = str(_spawn(source).get("agent_role") or "")
        growing = Growing()
        before: _Open | None = None
        for turn, after in zip(turns, [*turns[1:], None], strict=True):
            assert turn.usage is not None
            kind = idle_after([call for call, _ in turn.calls.values()], False)
            if after is not None:
                kind = waited_for(kind, after.resumed)
            elif parent is not None and not turn.calls:
                kind = "ended"
            prompt, cached = turn.usage.prompt_tokens, turn.usage.cached_tokens
            session.turns.append(
                Turn(
                    round(turn.sent_at - started_at, 3),
                    prompt,
                    turn.usage.output_tokens,
                    gap_s=round(max(0.0, turn.sent_at - before.ended_at), 3) if before else 0.0,
                    api_s=round(turn.ended_at - turn.sent_at, 3),
                    idle_kind=kind,
                    cached_tokens=cached,
                    model=turn.model,
                    compacted=turn.compacted,
                    calls=tuple(self._call(call, at) for call, at in turn.calls.values()),
                    **growing.add(prompt, cached, turn.compacted),
                )
            )
            before = turn
        return [session]

    def _call(self, call: ToolCall, asked_at: float) -> Call:
        answered = self._results.get(call.id)
        return replace(
            Call.of(call),
            duration_s=round(max(0.0, answered[0] - asked_at), 3) if answered else None,
            failed=bool(answered and answered[1]),
            child=self._children.get(call.id),
        )


def _parent(meta: dict[str, Any]) -> str | None:
    if isinstance(told := meta.get("parent_thread_id"), str):
        return told
    source = meta.get("source")
    told = _spawn(source).get("parent_thread_id") if isinstance(source, dict) else None
    return told if isinstance(told, str) else None


def _spawn(source: dict[str, Any]) -> dict[str, Any]:
    agent = source.get("subagent")
    spawn = agent.get("thread_spawn") if isinstance(agent, dict) else None
    return spawn if isinstance(spawn, dict) else {}


def _spoken(item: dict[str, Any]) -> bool:
    """Whether a user message holds a person's words."""
    known = item.get("internal_chat_message_metadata_passthrough")
    kinds = known.get("content_item_kinds") if isinstance(known, dict) else None
    if isinstance(kinds, list):
        return "user.text" in kinds
    texts = [str(part.get("text") or "") for part in item.get("content") or ()]
    return any(text and not text.lstrip().startswith(_CONTEXT) for text in texts)


def _failed(output: Any) -> bool:
    return isinstance(output, dict) and output.get("success") is False


def _agent_in(output: Any) -> str | None:
    """The thread that a ``spawn_agent`` call started."""
    if isinstance(output, str) and output.startswith('{"') and '"agent_id"' in output[:200]:
        try:
            told = orjson.loads(output)
        except orjson.JSONDecodeError:
            return None
        agent = told.get("agent_id")
        return agent if isinstance(agent, str) else None
    return None
