"""Requests for tests: conversations written out in each dialect."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.dialects import DIALECTS, parse
from gateway.dialects.turn import ToolCall, TurnOutcome, TurnRequest, Usage

BY_WIRE = {dialect.wire: dialect for dialect in DIALECTS}
BASH = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}


def request(wire: str, **body: Any) -> TurnRequest:
    return parse(BY_WIRE[wire], orjson.dumps({"model": "m", **body}))  # type: ignore[index]


def chat(*messages: dict[str, Any], tools: bool = True, **body: Any) -> TurnRequest:
    if tools:
        body["tools"] = [BASH]
    return request("chat", messages=list(messages), **body)


def system(text: str = "You are an agent.") -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str = "", *call_ids: str) -> dict[str, Any]:
    calls = [{"id": call_id, "type": "function", "function": {}} for call_id in call_ids]
    return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})


def result(call_id: str, text: str = "ok") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def outcome(*calls: str | ToolCall, **fields: Any) -> TurnOutcome:
    """A clean answer that asks for calls: of ``bash`` where only an id is given."""
    made = [ToolCall.of(c, "bash", "{}") if isinstance(c, str) else c for c in calls]
    return TurnOutcome(
        tool_calls=made,
        stop_reason="tool_calls" if made else "stop",
        usage=Usage(1000, 10, 500),
        **fields,
    )
