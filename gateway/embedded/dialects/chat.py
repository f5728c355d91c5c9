"""`/v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from gateway.embedded.answer import Delta, FinishReason
from gateway.embedded.dialects.base import (
    DONE,
    JSON,
    SYSTEM_FINGERPRINT,
    RequestError,
    Usage,
    event,
    list_field,
    openai_error,
    openai_usage,
    optional_list,
    token_limit,
)
from gateway.embedded.prompt import Call, Conversation, Message, canonical_json, join_text


class ChatExchange:
    def __init__(self, body: JSON, model: str, request_id: str) -> None:
        self.conversation = Conversation(
            [_message(message) for message in list_field(body, "messages")],
            optional_list(body, "tools"),
        )
        self.max_tokens = token_limit(body, "max_completion_tokens", "max_tokens")
        options = body.get("stream_options") or {}
        self._include_usage = bool(options.get("include_usage"))
        self._continuous_usage = self._include_usage and bool(options.get("continuous_usage_stats"))
        self._base: JSON = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
        }

    def opening(self, usage: Usage) -> bytes:
        chunk = self._chunk(
            {"role": "assistant", "content": ""}, usage._replace(completion_tokens=0)
        )
        del chunk["choices"][0]["token_ids"]
        return event(chunk | {"prompt_token_ids": None, "prompt_text": None})

    def delta(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        return b"".join(event(self._chunk(_delta(delta), usage)) for delta in deltas)

    def closing(self, finish_reason: FinishReason, usage: Usage) -> bytes:
        last = self._chunk({}, usage)
        choice = last["choices"][0]
        last["choices"] = [
            {
                "index": 0,
                "delta": {} if finish_reason == "tool_calls" else {"content": ""},
                "logprobs": None,
                "finish_reason": finish_reason,
                "stop_reason": None,
                "token_ids": choice["token_ids"],
            }
        ]
        if not self._include_usage:
            last["system_fingerprint"] = SYSTEM_FINGERPRINT
            return event(last) + DONE
        total = self._base | {
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": openai_usage(usage, sparse=True),
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        return event(last) + event(total) + DONE

    def whole(self, message: Message, finish_reason: FinishReason, usage: Usage) -> JSON:
        answer: JSON = {
            "role": "assistant",
            "content": message.text or (None if message.calls else ""),
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
        }
        if message.calls:
            answer["tool_calls"] = [
                {
                    "id": tool_call_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments.decode()},
                }
                for call in message.calls
            ]
        answer["reasoning"] = message.reasoning or None
        choice = {
            "index": 0,
            "message": answer,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
            "token_ids": None,
            "routed_experts": None,
        }
        return self._base | {
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": SYSTEM_FINGERPRINT,
            "usage": openai_usage(usage),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def failure(self, error: RequestError) -> bytes:
        return event(openai_error(error)) + DONE

    def _chunk(self, delta: JSON, usage: Usage) -> JSON:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
            "token_ids": None,
        }
        chunk = self._base | {"object": "chat.completion.chunk", "choices": [choice]}
        if self._continuous_usage:
            total = usage.prompt_tokens + usage.completion_tokens
            chunk["usage"] = {
                "prompt_tokens": usage.prompt_tokens,
                "total_tokens": total,
                "completion_tokens": usage.completion_tokens,
            }
        return chunk


def tool_call_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


def _delta(delta: Delta) -> JSON:
    match delta.kind:
        case "text":
            return {"content": delta.text}
        case "reasoning":
            return {"reasoning": delta.text}
        case "name":
            call: JSON = {
                "id": tool_call_id(),
                "type": "function",
                "index": delta.call,
                "function": {"name": delta.text},
            }
        case "arguments":
            call = {"index": delta.call, "function": {"arguments": delta.text}}
    return {"tool_calls": [call]}


def _message(message: JSON) -> Message:
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    return Message(
        str(message.get("role")),
        join_text(message.get("content")),
        reasoning if isinstance(reasoning, str) else "",
        tuple(_calls(message.get("tool_calls") or ())),
    )


def _calls(tool_calls: Iterable[Any]) -> Iterable[Call]:
    for call in tool_calls:
        function = call.get("function") or call.get("custom") or {}
        arguments = function.get("arguments") or function.get("input") or ""
        yield Call(str(function.get("name")), canonical_json(arguments))
