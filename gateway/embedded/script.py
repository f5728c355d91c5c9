"""Scripted answers: what a test or a demo wants the pod to say, turn by turn.

The script is JSON, in the request header `x-embedded-script` or, for agents that cannot set
headers, in a user message as `[[embedded-script: {...}]]`:

    {"turns": [{"text": "…", "reasoning": "…",
                "tool_calls": [{"name": "bash", "arguments": {"command": "ls"}}]},
               {"text": "done"}],
     "output_tokens": 200,
     "fail": {"status": 500 | "disconnect", "after_chunks": 3, "pod": "embedded-0"}}

Turn k answers the request with k assistant turns in its history since the script's message; the
last turn repeats. `output_tokens` lengthens an answer's text to that many tokens. `fail` breaks
the answer: an HTTP error, or after some chunks an error event, or a dropped connection; `pod`
limits it to one pod. Both may also stand in a turn. A script in a message calls tools only
where the request offers some, so an agent's title requests stay text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from gateway.embedded.prompt import Call, Conversation, Message

HEADER = "x-embedded-script"
MARKER = "[[embedded-script:"
DEFAULT_TEXT = (
    "This answer comes from an embedded pod of CacheWise Gateway. It accounts for KV cache "
    "blocks and time as vLLM would, but it runs no model."
)


class ScriptError(ValueError):
    """A script that is not one; the text says where."""


class ScriptedCall(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any] = {}


class Fail(msgspec.Struct, forbid_unknown_fields=True):
    """`after_chunks` counts the stream's chunks of generated tokens; 0 is before any byte."""

    status: int | Literal["disconnect"]
    after_chunks: int = 0
    pod: str | None = None


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    text: str | None = None
    reasoning: str = ""
    tool_calls: list[ScriptedCall] = []
    output_tokens: int | None = None
    fail: Fail | None = None


class Script(msgspec.Struct, forbid_unknown_fields=True):
    turns: list[Turn] = []
    output_tokens: int | None = None
    fail: Fail | None = None


class PlannedTurn(msgspec.Struct, frozen=True):
    """One answer to give: its message, the length to fill it to, and how it breaks."""

    message: Message
    output_tokens: int | None = None
    fail: Fail | None = None


def plan_turn(conversation: Conversation, header: str | None) -> PlannedTurn:
    """The answer to this request: scripted, or the default text. Raises ScriptError."""
    messages = conversation.messages
    found = None if header is None else (_decode(header), 0)
    calls_allowed = found is not None or bool(conversation.tools)
    if found is None:
        found = _find_marker(messages)
    if found is None:
        return PlannedTurn(Message("assistant", DEFAULT_TEXT))
    script, start = found
    done = sum(message.role == "assistant" for message in messages[start:])
    turn = script.turns[min(done, len(script.turns) - 1)] if script.turns else Turn()
    calls = tuple(
        Call(call.name, msgspec.json.encode(call.arguments))
        for call in turn.tool_calls
        if calls_allowed
    )
    text = turn.text
    if text is None:
        text = "" if calls or turn.output_tokens or script.output_tokens else DEFAULT_TEXT
    return PlannedTurn(
        Message("assistant", text, turn.reasoning, calls),
        turn.output_tokens or script.output_tokens,
        turn.fail or script.fail,
    )


def _find_marker(messages: Sequence[Message]) -> tuple[Script, int] | None:
    """The script of the newest user message that has one, and that message's place."""
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if message.role == "user":
            at = message.text.rfind(MARKER)
            if at >= 0:
                return _decode(message.text[at + len(MARKER) :].lstrip(), whole=False), index
    return None


def _decode(text: str, *, whole: bool = True) -> Script:
    try:
        if whole:
            return msgspec.json.decode(text, type=Script)
        value, _end = json.JSONDecoder().raw_decode(text)
        return msgspec.convert(value, Script)
    except (msgspec.MsgspecError, json.JSONDecodeError) as error:
        raise ScriptError(f"{HEADER}: {error}") from error
