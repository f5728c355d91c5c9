"""What the dialects share: the exchange they implement, usage, errors, event framing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import orjson

from gateway.embedded.answer import Delta, FinishReason
from gateway.embedded.prompt import Conversation, Message

SYSTEM_FINGERPRINT = "cachewise-embedded"
DONE = b"data: [DONE]\n\n"
JSON = dict[str, Any]


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0


class RequestError(Exception):
    """A request vLLM would refuse; `err_type` as vLLM names it."""

    def __init__(
        self, message: str, status: int = 400, err_type: str = "BadRequestError", param: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.err_type = err_type
        self.param = param or None


class Exchange(Protocol):
    """One request and the writer of its answer."""

    conversation: Conversation
    max_tokens: int | None

    def opening(self, usage: Usage) -> bytes: ...
    def delta(self, deltas: Sequence[Delta], usage: Usage) -> bytes: ...
    def closing(self, finish_reason: FinishReason, usage: Usage) -> bytes: ...
    def whole(self, message: Message, finish_reason: FinishReason, usage: Usage) -> JSON: ...
    def failure(self, error: RequestError) -> bytes: ...


class Dialect(NamedTuple):
    """How an endpoint reads requests and refuses them."""

    exchange: Callable[[JSON, str, str], Exchange]
    """Made from the body, the served model's name and a request id; raises RequestError."""
    error_body: Callable[[RequestError], JSON]


def event(data: JSON, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


def openai_error(error: RequestError) -> JSON:
    return {
        "error": {
            "message": str(error),
            "type": error.err_type,
            "param": error.param,
            "code": error.status,
        }
    }


def openai_usage(usage: Usage, *, sparse: bool = False) -> JSON:
    """vLLM's UsageInfo with --enable-prompt-tokens-details; `sparse` leaves out the nulls."""
    details: JSON = {"cached_tokens": usage.cached_tokens}
    answer: JSON = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": details,
    }
    if not sparse:
        details |= {"created_cache_tokens": None, "multimodal_tokens": None}
        answer["completion_tokens_details"] = None
    return answer


def list_field(body: JSON, field: str) -> list[Any]:
    """A list of objects; RequestError where the field is something else."""
    value = body.get(field)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RequestError(f"{field}: Input should be a valid list of objects", param=field)
    return value


def optional_list(body: JSON, field: str) -> list[Any]:
    return [] if body.get(field) is None else list_field(body, field)


def token_limit(body: JSON, *fields: str) -> int | None:
    """The first of `fields` that is set: the most tokens to generate."""
    for field in fields:
        value = body.get(field)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise RequestError(f"{field}: Input should be a valid integer", param=field)
        if value < 1:
            raise RequestError(f"{field} must be at least 1, got {value}.", param=field)
        return value
    return None
