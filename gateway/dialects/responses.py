"""OpenAI responses (``/v1/responses``)."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson

from gateway.dialects.chat import look_tools
from gateway.dialects.sse import JsonObserver, SseObserver
from gateway.dialects.turn import (
    EMPTY,
    BodyIds,
    Item,
    Role,
    ToolCall,
    ToolResult,
    TurnOutcome,
    TurnRequest,
    Usage,
    as_count,
    as_str,
    dumps,
    given,
    head_of,
    human_head_of,
    loads,
    text_blocks,
)


class ResponsesBody(msgspec.Struct):
    """The fields of a responses request that the gateway looks at, as raw slices."""

    model: str
    input: list[msgspec.Raw] | str = ""
    stream: bool | None = False
    instructions: msgspec.Raw = EMPTY
    tools: msgspec.Raw = EMPTY
    metadata: msgspec.Raw = EMPTY
    conversation: msgspec.Raw = EMPTY
    client_metadata: msgspec.Raw = EMPTY
    session_id: msgspec.Raw = EMPTY
    kv_hints: msgspec.Raw = EMPTY
    prompt_cache_key: msgspec.Raw = EMPTY
    previous_response_id: msgspec.Raw = EMPTY


_decode = msgspec.json.Decoder(ResponsesBody).decode


def parse_responses(body: bytes) -> TurnRequest:
    """Read a responses request. Raises `msgspec.DecodeError` where it is none."""
    request = _decode(body)
    items = (
        [msgspec.Raw(orjson.dumps({"role": "user", "content": request.input}))]
        if isinstance(request.input, str)
        else request.input
    )
    return TurnRequest(
        wire="responses",
        model=request.model,
        stream=bool(request.stream),
        segments=[given(request.tools), given(request.instructions), *items],
        look=look_responses,
        ids=BodyIds(
            metadata=request.metadata,
            conversation=request.conversation,
            client_metadata=request.client_metadata,
            session_id=request.session_id,
            prompt_cache_key=request.prompt_cache_key,
            previous_response_id=request.previous_response_id,
        ),
        hinted=len(request.kv_hints) > 0,
    )


_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_CALLS = frozenset({"function_call", "custom_tool_call", "local_shell_call", "mcp_call"})


def look_responses(index: int, raw: msgspec.Raw) -> Item:
    """A segment of a responses request."""
    if index == 0:
        return look_tools(raw)
    if index == 1:
        text = loads(raw) if len(raw) else None
        return Item(dumps(text) if text else b"", "system", text=head_of(text))
    item = loads(raw)
    item.pop("id", None)
    item.pop("status", None)
    kind = as_str(item.get("type")) or "message"
    call_id = as_str(item.get("call_id"))
    if kind in _CALLS:
        return Item(dumps(item), "assistant", call_ids=(call_id,) if call_id else ())
    if kind.endswith("_output"):
        results = (ToolResult(call_id, False, head_of(item.get("output"))),) if call_id else ()
        return Item(dumps(item), "tool", results=results)
    if kind != "message":  # reasoning, hosted tools' calls
        return Item(dumps(item), "assistant")
    item["type"] = "message"
    role = _ROLES.get(as_str(item.get("role")), "other")
    blocks = text_blocks(item.get("content"))
    for block in blocks:
        if isinstance(block, dict):
            block.pop("annotations", None)
            if block.get("type") in ("input_text", "output_text"):
                block["type"] = "text"
    item["content"] = blocks
    text = human_head_of(blocks, ("text",)) if role == "user" else head_of(blocks)
    return Item(dumps(item), role, text=text)


def usage_of(usage: Any) -> Usage | None:
    """The ``usage`` of a response object."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(
        prompt_tokens=as_count(usage.get("input_tokens")),
        output_tokens=as_count(usage.get("output_tokens")),
        cached_tokens=cached if isinstance(cached, int) else None,
    )


def _call_of(item: Any) -> ToolCall | None:
    if not isinstance(item, dict) or item.get("type") not in _CALLS:
        return None
    name = as_str(item.get("name"))
    if namespace := as_str(item.get("namespace")):
        name = f"{namespace}.{name}"
    arguments = item.get("arguments", item.get("input"))
    return ToolCall.of(as_str(item.get("call_id")), name, as_str(arguments))


_TEACHING = tuple(
    b"event: response.%b\n" % name
    for name in (b"created", b"output_item.done", b"completed", b"incomplete", b"failed")
)


class ResponsesStream(SseObserver):
    """Observes the responses event sequence; a call is whole at ``response.output_item.done``."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome = TurnOutcome()

    def skippable(self, event: bytes) -> bool:
        return event.startswith(b"event: response.") and not event.startswith(_TEACHING)

    def event(self, data: dict[str, Any]) -> None:
        outcome = self.outcome
        match data.get("type"):
            case "response.created":
                outcome.response_id = as_str((data.get("response") or {}).get("id")) or None
            case "response.output_item.done":
                if call := _call_of(data.get("item")):
                    outcome.add_call(call)
            case "response.completed" | "response.incomplete" | "response.failed":
                response = data.get("response") or {}
                outcome.response_id = outcome.response_id or as_str(response.get("id")) or None
                outcome.stop_reason = as_str(response.get("status")) or "completed"
                outcome.usage = usage_of(response.get("usage"))
                outcome.error = outcome.error or data.get("type") == "response.failed"
            case "error":
                outcome.error = True


class ResponsesJson(JsonObserver):
    """Observes a whole response object."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome = TurnOutcome()

    def body(self, data: dict[str, Any]) -> None:
        outcome = self.outcome
        outcome.error = data.get("error") is not None
        outcome.response_id = as_str(data.get("id")) or None
        outcome.stop_reason = as_str(data.get("status")) or None
        outcome.usage = usage_of(data.get("usage"))
        for item in data.get("output") or ():
            if call := _call_of(item):
                outcome.add_call(call)
