"""OpenAI chat completions (``/v1/chat/completions``) and, in the same family, the older
``/v1/completions``."""

from __future__ import annotations

from typing import Any

import msgspec

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


class ChatBody(msgspec.Struct):
    """The fields of a chat request that the gateway looks at, as raw slices."""

    model: str
    messages: list[msgspec.Raw]
    stream: bool | None = False
    tools: msgspec.Raw = EMPTY
    functions: msgspec.Raw = EMPTY
    metadata: msgspec.Raw = EMPTY
    conversation: msgspec.Raw = EMPTY
    client_metadata: msgspec.Raw = EMPTY
    agent_hint: msgspec.Raw = EMPTY
    session_id: msgspec.Raw = EMPTY
    kv_hints: msgspec.Raw = EMPTY
    prompt_cache_key: msgspec.Raw = EMPTY


_decode_chat = msgspec.json.Decoder(ChatBody).decode


def parse_chat(body: bytes) -> TurnRequest:
    """Read a chat request. Raises `msgspec.DecodeError` where it is none."""
    chat = _decode_chat(body)
    tools = given(chat.tools)
    return TurnRequest(
        wire="chat",
        model=chat.model,
        stream=bool(chat.stream),
        segments=[tools if len(tools) else given(chat.functions), EMPTY, *chat.messages],
        look=look_chat,
        ids=BodyIds(
            metadata=chat.metadata,
            conversation=chat.conversation,
            client_metadata=chat.client_metadata,
            agent_hint=chat.agent_hint,
            session_id=chat.session_id,
            prompt_cache_key=chat.prompt_cache_key,
        ),
        hinted=len(chat.kv_hints) > 0,
    )


_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def look_tools(raw: msgspec.Raw) -> Item:
    """The tools segment, in any dialect: a list of tools, order kept."""
    return Item(dumps(text_blocks(loads(raw))) if len(raw) else b"", "other")


def look_chat(index: int, raw: msgspec.Raw) -> Item:
    """A segment of a chat request."""
    if index < 2:
        return look_tools(raw)
    message = loads(raw)
    message.pop("cache_control", None)
    role = _ROLES.get(as_str(message.get("role")), "other")
    content = message.get("content")
    blocks = text_blocks(content)
    message["content"] = blocks
    call_ids: tuple[str, ...] = ()
    results: tuple[ToolResult, ...] = ()
    text = ""
    if role == "assistant":
        call_ids = tuple(
            call["id"]
            for call in message.get("tool_calls") or ()
            if isinstance(call, dict) and isinstance(call.get("id"), str)
        )
    elif role == "tool":
        call_id = message.get("tool_call_id")
        if isinstance(call_id, str):
            results = (ToolResult(call_id, False, head_of(blocks)),)
    else:
        text = human_head_of(blocks, ("text",)) if role == "user" else head_of(blocks)
    return Item(dumps(message), role, call_ids, results, text)


def usage_of(usage: Any) -> Usage | None:
    """vLLM's and OpenAI's ``usage`` of chat completions and completions."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(
        prompt_tokens=as_count(usage.get("prompt_tokens")),
        output_tokens=as_count(usage.get("completion_tokens")),
        cached_tokens=cached if isinstance(cached, int) else None,
    )


class ChatStream(SseObserver):
    """Observes ``chat.completion.chunk`` events. Calls come in fragments, keyed by ``index``."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome = TurnOutcome()
        self._calls: dict[tuple[int, int], CallDraft] = {}

    def skippable(self, event: bytes) -> bool:
        return (
            b'"finish_reason":null' in event
            and b'"finish_reason":"' not in event
            and b'"tool_calls"' not in event
            and b'"usage":{' not in event
            and b'"error":{' not in event
            and self.outcome.response_id is not None
        )

    def event(self, data: dict[str, Any]) -> None:
        outcome = self.outcome
        if data.get("error") is not None:
            outcome.error = True
            return
        if outcome.response_id is None and isinstance(data.get("id"), str):
            outcome.response_id = data["id"]
        for choice in data.get("choices") or ():
            number = as_count(choice.get("index"))
            delta = choice.get("delta") or {}
            for call in delta.get("tool_calls") or ():
                self._fragment((number, as_count(call.get("index"))), call)
            if stop_reason := as_str(choice.get("finish_reason")):
                outcome.stop_reason = stop_reason
                outcome.error = outcome.error or stop_reason == "abort"  # vLLM's, on shutdown
                self._close_calls(number)
        outcome.usage = usage_of(data.get("usage")) or outcome.usage

    def _fragment(self, key: tuple[int, int], piece: dict[str, Any]) -> None:
        function = piece.get("function") or {}
        call = self._calls.get(key)
        if call is None:
            if len(self._calls) >= MAX_CALLS:
                return
            call = self._calls[key] = CallDraft("", "")
        call.id = call.id or as_str(piece.get("id"))
        call.name = call.name or as_str(function.get("name"))
        call.add(as_str(function.get("arguments")))

    def _close_calls(self, choice: int) -> None:
        for key in [key for key in self._calls if key[0] == choice]:
            self.outcome.add_call(self._calls.pop(key).call())

    def finish(self) -> None:
        super().finish()
        for choice in {choice for choice, _ in self._calls}:
            self._close_calls(choice)


class ChatJson(JsonObserver):
    """Observes a whole ``chat.completion``."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome = TurnOutcome()

    def body(self, data: dict[str, Any]) -> None:
        outcome = self.outcome
        outcome.error = data.get("error") is not None
        outcome.response_id = as_str(data.get("id")) or None
        outcome.usage = usage_of(data.get("usage"))
        for choice in data.get("choices") or ():
            outcome.stop_reason = as_str(choice.get("finish_reason")) or outcome.stop_reason
            for call in (choice.get("message") or {}).get("tool_calls") or ():
                function = call.get("function") or {}
                outcome.add_call(
                    ToolCall.of(
                        as_str(call.get("id")),
                        as_str(function.get("name")),
                        as_str(function.get("arguments")),
                    )
                )


class CompletionBody(msgspec.Struct):
    """The fields of a ``/v1/completions`` request that the gateway looks at."""

    model: str
    prompt: msgspec.Raw = EMPTY
    stream: bool | None = False
    session_id: msgspec.Raw = EMPTY
    kv_hints: msgspec.Raw = EMPTY
    prompt_cache_key: msgspec.Raw = EMPTY


_decode_completion = msgspec.json.Decoder(CompletionBody).decode


def parse_completion(body: bytes) -> TurnRequest:
    """Read a completions request: its prompt is one segment. Raises `msgspec.DecodeError`."""
    completion = _decode_completion(body)
    return TurnRequest(
        wire="completions",
        model=completion.model,
        stream=bool(completion.stream),
        segments=[EMPTY, EMPTY, completion.prompt],
        look=lambda _, raw: Item(bytes(raw), "user", text="" if len(raw) == 0 else "prompt"),
        ids=BodyIds(session_id=completion.session_id, prompt_cache_key=completion.prompt_cache_key),
        hinted=len(completion.kv_hints) > 0,
    )
