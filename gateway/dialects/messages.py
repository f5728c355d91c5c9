"""Anthropic messages (``/v1/messages``)."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson

from gateway.dialects.chat import look_tools
from gateway.dialects.sse import JsonObserver, SseObserver
from gateway.dialects.turn import (
    EMPTY,
    MAX_CALLS,
    BodyIds,
    CallDraft,
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

ATTRIBUTION = "x-anthropic-billing-header:"
"""How Claude Code's attribution block begins; vLLM leaves it out of the prompt too
(vllm-project/vllm PR 36829), so it is left out of the prefix hash."""


class MessagesBody(msgspec.Struct):
    """The fields of a messages request that the gateway looks at, as raw slices."""

    model: str
    messages: list[msgspec.Raw]
    stream: bool | None = False
    system: msgspec.Raw = EMPTY
    tools: msgspec.Raw = EMPTY
    metadata: msgspec.Raw = EMPTY
    output_config: msgspec.Raw = EMPTY
    session_id: msgspec.Raw = EMPTY
    kv_hints: msgspec.Raw = EMPTY


_decode = msgspec.json.Decoder(MessagesBody).decode


def parse_messages(body: bytes) -> TurnRequest:
    """Read a messages request. Raises `msgspec.DecodeError` where it is none."""
    message = _decode(body)
    return TurnRequest(
        wire="messages",
        model=message.model,
        stream=bool(message.stream),
        segments=[given(message.tools), given(message.system), *message.messages],
        look=look_messages,
        ids=BodyIds(metadata=message.metadata, session_id=message.session_id),
        title_format=_asks_only_title(message.output_config),
        hinted=len(message.kv_hints) > 0,
    )


def _asks_only_title(output_config: msgspec.Raw) -> bool:
    if b'"json_schema"' not in bytes(output_config):
        return False
    try:
        properties = loads(output_config)["format"]["schema"]["properties"]
        return list(properties) == ["title"]
    except (KeyError, TypeError, orjson.JSONDecodeError):
        return False


_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}


def look_messages(index: int, raw: msgspec.Raw) -> Item:
    """A segment of a messages request."""
    if index == 0:
        return look_tools(raw)
    if index == 1:
        return _look_system(raw)
    message = loads(raw)
    role = _ROLES.get(as_str(message.get("role")), "other")
    blocks = text_blocks(message.get("content"))
    for block in blocks:
        if isinstance(block, dict) and block.get("type") == "tool_result":
            block["content"] = text_blocks(block.get("content"))
    message["content"] = blocks
    call_ids: tuple[str, ...] = ()
    results: tuple[ToolResult, ...] = ()
    text = ""
    if role == "assistant":
        call_ids = tuple(
            block["id"]
            for block in blocks
            if isinstance(block, dict)
            and block.get("type") == "tool_use"
            and isinstance(block.get("id"), str)
        )
    elif role == "user":
        results = tuple(
            ToolResult(
                block["tool_use_id"],
                block.get("is_error") is True,
                head_of(block.get("content")),
            )
            for block in blocks
            if isinstance(block, dict)
            and block.get("type") == "tool_result"
            and isinstance(block.get("tool_use_id"), str)
        )
        text = human_head_of(blocks, ("text",))
    else:
        text = head_of(blocks)
    return Item(dumps(message), role, call_ids, results, text)


def _look_system(raw: msgspec.Raw) -> Item:
    if not len(raw):
        return Item(b"", "system")
    blocks = [
        block
        for block in text_blocks(loads(raw))
        if not (isinstance(block, dict) and as_str(block.get("text")).startswith(ATTRIBUTION))
    ]
    return Item(dumps(blocks) if blocks else b"", "system", text=head_of(blocks))


def merge_usage(before: Usage | None, usage: Any) -> Usage | None:
    """Anthropic's ``usage``: ``input_tokens`` leaves out what was read from the cache, which comes
    as ``cache_read_input_tokens``; a stream's ``message_delta`` adds to ``message_start``."""
    if not isinstance(usage, dict):
        return before
    cached = usage.get("cache_read_input_tokens")
    if not isinstance(cached, int):
        cached = before.cached_tokens if before else None
    prompt_tokens = before.prompt_tokens if before else 0
    if isinstance(usage.get("input_tokens"), int):
        written = as_count(usage.get("cache_creation_input_tokens"))
        prompt_tokens = max(prompt_tokens, usage["input_tokens"] + written + (cached or 0))
    output_tokens = as_count(usage.get("output_tokens")) or (before.output_tokens if before else 0)
    return Usage(prompt_tokens, output_tokens, cached)


class MessagesStream(SseObserver):
    """Observes Anthropic's event sequence. A call's input comes as ``input_json_delta`` pieces
    between ``content_block_start`` and ``content_block_stop``."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome = TurnOutcome()
        self._calls: dict[int, CallDraft] = {}

    def skippable(self, event: bytes) -> bool:
        return event.startswith(b"event: content_block_delta\n") and (
            b'"partial_json"' not in event
        )

    def event(self, data: dict[str, Any]) -> None:
        outcome = self.outcome
        match data.get("type"):
            case "message_start":
                message = data.get("message") or {}
                outcome.response_id = as_str(message.get("id")) or None
                outcome.usage = merge_usage(None, message.get("usage"))
            case "content_block_start":
                block = data.get("content_block") or {}
                if block.get("type") == "tool_use" and len(self._calls) < MAX_CALLS:
                    call = CallDraft(as_str(block.get("id")), as_str(block.get("name")))
                    if arguments := block.get("input"):
                        call.add(orjson.dumps(arguments).decode())
                    self._calls[as_count(data.get("index"))] = call
            case "content_block_delta":
                if open_call := self._calls.get(as_count(data.get("index"))):
                    open_call.add(as_str((data.get("delta") or {}).get("partial_json")))
            case "content_block_stop":
                self._close_call(as_count(data.get("index")))
            case "message_delta":
                outcome.stop_reason = (
                    as_str((data.get("delta") or {}).get("stop_reason")) or outcome.stop_reason
                )
                outcome.usage = merge_usage(outcome.usage, data.get("usage"))
            case "message_stop":
                # vLLM ends a stream without a reason when it aborts the request.
                outcome.error = outcome.error or outcome.stop_reason is None
            case "error":
                outcome.error = True

    def _close_call(self, index: int) -> None:
        call = self._calls.pop(index, None)
        if call is not None:
            self.outcome.add_call(call.call())

    def finish(self) -> None:
        super().finish()
        for index in list(self._calls):
            self._close_call(index)


class MessagesJson(JsonObserver):
    """Observes a whole Anthropic message."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome = TurnOutcome()

    def body(self, data: dict[str, Any]) -> None:
        outcome = self.outcome
        outcome.error = data.get("error") is not None
        outcome.response_id = as_str(data.get("id")) or None
        outcome.stop_reason = as_str(data.get("stop_reason")) or None
        outcome.usage = merge_usage(None, data.get("usage"))
        for block in data.get("content") or ():
            if block.get("type") == "tool_use":
                arguments = orjson.dumps(block.get("input")).decode()
                outcome.add_call(
                    ToolCall.of(as_str(block.get("id")), as_str(block.get("name")), arguments)
                )
