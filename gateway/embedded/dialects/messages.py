"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's dialect as vLLM speaks it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import orjson

from gateway.embedded.answer import Delta, FinishReason
from gateway.embedded.dialects.base import (
    JSON,
    RequestError,
    Usage,
    event,
    list_field,
    optional_list,
    token_limit,
)
from gateway.embedded.prompt import Call, Conversation, Message, join_text

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_BILLING = "x-anthropic-billing-header"
_Block = Literal["thinking", "text", "tool_use"]


class MessagesExchange:
    def __init__(self, body: JSON, model: str, request_id: str) -> None:
        self.conversation = Conversation(
            list(_messages(body)), [_tool(tool) for tool in optional_list(body, "tools")]
        )
        self.max_tokens = token_limit(body, "max_tokens")
        self._id = f"chatcmpl-{request_id}"
        self._model = model
        self._index = -1
        self._open: tuple[_Block, int] | None = None

    def opening(self, usage: Usage) -> bytes:
        # vLLM does not know the cached share yet when it sends this event.
        start: JSON = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self._model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": usage.prompt_tokens, "output_tokens": 0},
        }
        return _event("message_start", message=start)

    def delta(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        return b"".join(map(self._delta, deltas))

    def closing(self, finish_reason: FinishReason, usage: Usage) -> bytes:
        stop = {"stop_reason": _STOP_REASONS[finish_reason], "stop_sequence": None}
        return (
            self._close_block()
            + _event("message_delta", delta=stop, usage=_usage(usage))
            + _event("message_stop")
        )

    def whole(self, message: Message, finish_reason: FinishReason, usage: Usage) -> JSON:
        content: list[JSON] = []
        if message.reasoning:
            content.append(
                {
                    "type": "thinking",
                    "thinking": message.reasoning,
                    "signature": uuid.uuid4().hex,
                }
            )
        if message.text or not (message.reasoning or message.calls):
            content.append({"type": "text", "text": message.text})
        content += [
            {
                "type": "tool_use",
                "id": _tool_use_id(),
                "name": call.name,
                "input": orjson.loads(call.arguments),
            }
            for call in message.calls
        ]
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._model,
            "stop_reason": _STOP_REASONS[finish_reason],
            "usage": _usage(usage),
        }

    def failure(self, error: RequestError) -> bytes:
        return _event("error", error={"type": "internal_error", "message": str(error)})

    def _delta(self, delta: Delta) -> bytes:
        match delta.kind:
            case "reasoning":
                opened = self._open_block("thinking", 0, {"type": "thinking", "thinking": ""})
                part = {"type": "thinking_delta", "thinking": delta.text}
            case "text":
                opened = self._open_block("text", 0, {"type": "text", "text": ""})
                part = {"type": "text_delta", "text": delta.text}
            case "name":
                block = {"type": "tool_use", "id": _tool_use_id(), "name": delta.text, "input": {}}
                return self._open_block("tool_use", delta.call, block)
            case "arguments":
                opened = b""
                part = {"type": "input_json_delta", "partial_json": delta.text}
        return opened + _event("content_block_delta", delta=part, index=self._index)

    def _open_block(self, kind: _Block, number: int, block: JSON) -> bytes:
        if self._open == (kind, number):
            return b""
        closed = self._close_block()
        self._open = (kind, number)
        self._index += 1
        return closed + _event("content_block_start", content_block=block, index=self._index)

    def _close_block(self) -> bytes:
        if self._open is None:
            return b""
        signed = b""
        if self._open[0] == "thinking":
            signature = {"type": "signature_delta", "signature": uuid.uuid4().hex}
            signed = _event("content_block_delta", delta=signature, index=self._index)
        self._open = None
        return signed + _event("content_block_stop", index=self._index)


def anthropic_error(error: RequestError) -> JSON:
    return {"type": "error", "error": {"type": error.err_type, "message": str(error)}}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _usage(usage: Usage) -> JSON:
    """Anthropic counts cached tokens apart from `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
    }


def _tool_use_id() -> str:
    return f"toolu_{uuid.uuid4().hex}"


def _tool(tool: JSON) -> JSON:
    return {key: value for key, value in tool.items() if key != "cache_control"}


def _system_text(content: Any) -> str:
    """System text without Claude Code's attribution entry, which differs by conversation."""
    blocks = [content] if isinstance(content, str) else content or []
    texts = (join_text([block]) for block in blocks)
    return "".join(text for text in texts if not text.startswith(_BILLING))


def _messages(body: JSON) -> Iterator[Message]:
    if system := _system_text(body.get("system")):
        yield Message("system", system)
    for message in list_field(body, "messages"):
        role, content = str(message.get("role")), message.get("content")
        if role == "system":
            if text := _system_text(content):
                yield Message("system", text)
        elif isinstance(content, str):
            yield Message(role, content)
        elif role == "assistant":
            yield _assistant(content or [])
        else:
            results = [block for block in content or [] if block.get("type") == "tool_result"]
            for result in results:
                yield Message("tool", join_text(result.get("content")))
            others = [block for block in content or [] if block.get("type") != "tool_result"]
            if others:
                yield Message(role, join_text(others))


def _assistant(blocks: Sequence[JSON]) -> Message:
    return Message(
        "assistant",
        join_text(blocks),
        "".join(block.get("thinking") or "" for block in blocks if block.get("type") == "thinking"),
        tuple(
            Call(str(block.get("name")), orjson.dumps(block.get("input") or {}))
            for block in blocks
            if block.get("type") == "tool_use"
        ),
    )
