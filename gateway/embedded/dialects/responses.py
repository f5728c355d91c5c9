"""`/v1/responses`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

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
from gateway.embedded.prompt import (
    Call,
    Conversation,
    Message,
    canonical_json,
    join_text,
    merge_assistant_runs,
)


class ResponsesExchange:
    def __init__(self, body: JSON, model: str, request_id: str) -> None:
        if (previous := body.get("previous_response_id")) is not None:
            raise RequestError(
                f"Response with id '{previous}' not found.",
                404,
                "invalid_request_error",
                "response_id",
            )
        self.conversation = Conversation(
            merge_assistant_runs(_messages(body)), optional_list(body, "tools")
        )
        self.max_tokens = token_limit(body, "max_output_tokens")
        self._body = body
        self._model = model
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._sequence = 0
        self._output: list[JSON] = []
        self._item: JSON | None = None
        self._text = ""
        self._namespaces = _namespaces(body)

    def opening(self, usage: Usage) -> bytes:
        response = self._response("in_progress", [], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        return b"".join(map(self._delta, deltas))

    def closing(self, finish_reason: FinishReason, usage: Usage) -> bytes:
        closed = self._close_item()
        status = "incomplete" if finish_reason == "length" else "completed"
        response = self._response(status, self._output, usage)
        return closed + self._event("response.completed", response=response)

    def whole(self, message: Message, finish_reason: FinishReason, usage: Usage) -> JSON:
        output: list[JSON] = []
        if message.reasoning:
            output.append(_finished(_new_item("reasoning"), message.reasoning))
        if message.text or not (message.reasoning or message.calls):
            output.append(_finished(_new_item("text"), message.text))
        output += [
            _finished(self._call_item(call.name), call.arguments.decode()) for call in message.calls
        ]
        status = "incomplete" if finish_reason == "length" else "completed"
        return self._response(status, output, usage)

    def failure(self, error: RequestError) -> bytes:
        return self._event("error", code=str(error.status), message=str(error), param=None)

    def _delta(self, delta: Delta) -> bytes:
        opened = b""
        if delta.kind == "name":
            return self._open_item(self._call_item(delta.text))
        kind = _ITEM_TYPES[delta.kind]
        if self._item is None or self._item["type"] != kind:
            opened = self._open_item(_new_item(delta.kind))
        self._text += delta.text
        name = _DELTA_EVENTS[kind]
        place = self._place() if kind == "function_call" else self._place() | {"content_index": 0}
        extra: JSON = {"logprobs": []} if kind == "message" else {}
        return opened + self._event(f"{name}.delta", **place, delta=delta.text, **extra)

    def _call_item(self, name: str) -> JSON:
        return _new_item("name", name) | {"namespace": self._namespaces.get(name)}

    def _open_item(self, item: JSON) -> bytes:
        out = self._close_item()
        self._item, self._text = item, ""
        out += self._event("response.output_item.added", output_index=len(self._output), item=item)
        if item["type"] != "function_call":
            out += self._event(
                "response.content_part.added",
                **self._place(),
                content_index=0,
                part=_part(item["type"], "", done=False),
            )
        return out

    def _close_item(self) -> bytes:
        if self._item is None:
            return b""
        kind, place, text = self._item["type"], self._place(), self._text
        done = f"{_DELTA_EVENTS[kind]}.done"
        if kind == "function_call":
            out = self._event(done, **place, arguments=text, name=self._item["name"])
        else:
            extra: JSON = {"logprobs": []} if kind == "message" else {}
            place["content_index"] = 0
            out = self._event(done, **place, text=text, **extra)
            out += self._event(
                "response.content_part.done", **place, part=_part(kind, text, done=True)
            )
        item = _finished(self._item, text)
        out += self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._item = None
        return out

    def _place(self) -> JSON:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self._output)}

    def _event(self, kind: str, **fields: Any) -> bytes:
        fields |= {"type": kind, "sequence_number": self._sequence}
        self._sequence += 1
        name = {"name": fields.pop("name")} if "name" in fields else {}
        return event(dict(sorted(fields.items())) | name, kind)  # the order of OpenAI's models

    def _response(self, status: str, output: list[JSON], usage: Usage | None) -> JSON:
        body = self._body
        return {
            "id": self._id,
            "created_at": self._created,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata"),
            "model": self._model,
            "object": "response",
            "output": output,
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "temperature": body.get("temperature") or 1.0,
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p") or 1.0,
            "background": False,
            "max_output_tokens": self.max_tokens,
            "max_tool_calls": body.get("max_tool_calls"),
            "previous_response_id": None,
            "prompt": None,
            "reasoning": body.get("reasoning"),
            "service_tier": body.get("service_tier") or "auto",
            "status": status,
            "text": body.get("text"),
            "top_logprobs": None,
            "truncation": body.get("truncation") or "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": body.get("user"),
            "presence_penalty": body.get("presence_penalty"),
            "frequency_penalty": body.get("frequency_penalty"),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }


_ITEM_TYPES = {"reasoning": "reasoning", "text": "message", "arguments": "function_call"}
_DELTA_EVENTS = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}


def _namespaces(body: JSON) -> dict[str, str]:
    """The namespace of each tool that is offered in one."""
    found: dict[str, str] = {}
    for tool in body.get("tools") or []:
        if isinstance(tool, dict) and tool.get("type") == "namespace":
            inner = tool.get("tools")
            for each in inner if isinstance(inner, list) else []:
                if isinstance(each, dict) and isinstance(each.get("name"), str):
                    found[each["name"]] = str(tool.get("name"))
    return found


def _new_item(kind: str, name: str = "") -> JSON:
    unique = uuid.uuid4().hex
    if kind == "reasoning":
        return {
            "id": f"rs_{unique}",
            "summary": [],
            "type": "reasoning",
            "content": None,
            "encrypted_content": None,
            "status": "in_progress",
        }
    if kind == "text":
        return {
            "id": f"msg_{unique}",
            "content": [],
            "role": "assistant",
            "status": "in_progress",
            "type": "message",
        }
    return {
        "arguments": "",
        "call_id": f"call_{uuid.uuid4().hex}",
        "name": name,
        "type": "function_call",
        "id": f"fc_{unique}",
        "namespace": None,
        "status": "in_progress",
    }


def _finished(item: JSON, text: str) -> JSON:
    if item["type"] == "function_call":
        return item | {"arguments": text, "status": "completed"}
    return item | {"content": [_part(item["type"], text, done=True)], "status": "completed"}


def _part(item_type: str, text: str, *, done: bool) -> JSON:
    if item_type == "reasoning":
        return {"text": text, "type": "reasoning_text"}
    logprobs: list[JSON] | None = None if done else []
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


def _usage(usage: Usage) -> JSON:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "input_tokens_per_turn": [],
            "cached_tokens_per_turn": [],
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _messages(body: JSON) -> Iterator[Message]:
    if isinstance(instructions := body.get("instructions"), str) and instructions:
        yield Message("system", instructions)
    given = body.get("input")
    if isinstance(given, str):
        yield Message("user", given)
        return
    for item in list_field(body, "input"):
        match item.get("type", "message"):
            case "message":
                yield Message(str(item.get("role")), join_text(item.get("content")))
            case "reasoning":
                text = join_text(item.get("content")) or join_text(item.get("summary"))
                yield Message("assistant", reasoning=text)
            case "function_call":
                yield _call(item, canonical_json(item.get("arguments") or ""))
            case "custom_tool_call":
                yield _call(item, orjson.dumps(item.get("input") or ""))
            case "function_call_output" | "custom_tool_call_output":
                yield Message("tool", join_text(item.get("output")))
            case other:
                known = {key: item[key] for key in item if key not in ("id", "status")}
                yield Message(str(other), orjson.dumps(known).decode())


def _call(item: JSON, arguments: bytes) -> Message:
    return Message("assistant", calls=(Call(str(item.get("name")), arguments),))
