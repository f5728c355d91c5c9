"""Wire dialects: what clients send and what pods answer, one file per dialect.

A dialect is three things, kept in one table: how to read a request, how to watch a stream, how to
read a whole answer. Dialects know no sessions and no pods.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from typing import Literal

import msgspec
import orjson

from gateway.dialects.chat import ChatJson, ChatStream, parse_chat, parse_completion
from gateway.dialects.messages import MessagesJson, MessagesStream, parse_messages
from gateway.dialects.responses import ResponsesJson, ResponsesStream, parse_responses
from gateway.dialects.turn import (
    EMPTY,
    Item,
    MalformedRequestError,
    Observer,
    TurnRequest,
    Wire,
)

__all__ = [
    "DIALECTS",
    "Dialect",
    "MalformedRequestError",
    "parse",
    "read_model",
    "splice_model",
    "without_hints",
]


@dataclass(frozen=True, slots=True)
class Dialect:
    """One wire dialect. ``family`` says which error shape its callers expect."""

    wire: Wire
    path: str
    family: Literal["openai", "anthropic"]
    parse: Callable[[bytes], TurnRequest]
    stream: Callable[[], Observer]
    whole: Callable[[], Observer]


DIALECTS = (
    Dialect("chat", "/v1/chat/completions", "openai", parse_chat, ChatStream, ChatJson),
    Dialect("completions", "/v1/completions", "openai", parse_completion, ChatStream, ChatJson),
    Dialect(
        "responses", "/v1/responses", "openai", parse_responses, ResponsesStream, ResponsesJson
    ),
    Dialect("messages", "/v1/messages", "anthropic", parse_messages, MessagesStream, MessagesJson),
)


class _Essentials(msgspec.Struct):
    model: str
    stream: msgspec.Raw = EMPTY
    kv_hints: msgspec.Raw = EMPTY


_decode_essentials = msgspec.json.Decoder(_Essentials).decode


def parse(dialect: Dialect, body: bytes) -> TurnRequest:
    """Read a request body.

    A body that names a model but is otherwise not of its dialect's shape comes back with no
    segments: the pod will refuse it in its own words. Raises `MalformedRequestError` where even the
    model cannot be read.
    """
    try:
        return dialect.parse(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = _essentials(body)
        return TurnRequest(
            dialect.wire,
            found.model,
            bytes(found.stream) == b"true",
            [EMPTY, EMPTY],
            lambda _, raw: Item(bytes(raw), "other"),
            hinted=len(found.kv_hints) > 0,
        )


def read_model(body: bytes) -> tuple[str, bool]:
    """The model that a JSON body names and whether it asks for a stream. Raises
    `MalformedRequestError` if it is no JSON object or names none."""
    found = _essentials(body)
    return found.model, bytes(found.stream) == b"true"


def _essentials(body: bytes) -> _Essentials:
    try:
        return _decode_essentials(body)
    except msgspec.ValidationError as error:
        raise MalformedRequestError(f"request body: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequestError(f"request body is not valid JSON: {error}") from None
    except RecursionError:
        raise MalformedRequestError("request body is nested too deeply") from None


MAX_SPLICE_TRIES = 64


def splice_model(body: bytes, model: str, served: str) -> bytes:
    """``body`` with its top-level ``"model"`` changed from ``model`` to ``served``; every other
    byte stays.

    Where the value stands is found by trying each place that spells it and reading the result
    back: right for any nesting and order of keys, without a scanner of our own. Raises
    `MalformedRequestError` after `MAX_SPLICE_TRIES` wrong places.
    """
    new = orjson.dumps(served)
    tries = 0
    for spelling in {orjson.dumps(model), json.dumps(model).encode()}:
        at = body.find(spelling)
        while at >= 0 and (tries := tries + 1) <= MAX_SPLICE_TRIES:
            spliced = b"".join((body[:at], new, body[at + len(spelling) :]))
            try:
                if read_model(spliced)[0] == served:
                    return spliced
            except MalformedRequestError:
                pass
            at = body.find(spelling, at + 1)
    raise MalformedRequestError(
        'model: its alias could not be applied; put "model" first in the body, without escapes'
    )


_HINTS_KEY = re.compile(
    b'"' + b"".join(b"(?:%c|\\\\u00(?i:%02x))" % (c, c) for c in b"kv_hints") + rb'"\s*:\s*'
)
"""``kv_hints`` as JSON may spell it: each character as it is or as its escape."""
MAX_HINTS = 4
"""A body may hold the field so often, nested ones of the same value aside."""
MAX_HINT_PLACES = 16
"""Places that spell it with its value, from the body's end, are tried so far."""


def without_hints(body: bytes) -> bytes:
    """``body`` without its top-level ``"kv_hints"``; every other byte stays. Linear in the body.

    Raises `MalformedRequestError` if the field is there more than `MAX_HINTS` times, or
    `MAX_HINT_PLACES` of that value stand behind it.
    """
    for _ in range(MAX_HINTS + 1):
        value = bytes(_essentials(body).kv_hints)
        if not value:
            return body
        body = _without_field(body, value)
    raise _hints_stay()


def _without_field(body: bytes, value: bytes) -> bytes:
    """The body without the field whose value counts, the last. Each place that spells it is tried
    with another value, which then is the one that is read if it is this field."""
    keys = (key.span() for key in _HINTS_KEY.finditer(body) if body.startswith(value, key.end()))
    mark = b'"%b"' % token_hex(8).encode()
    for start, at in reversed(deque(keys, maxlen=MAX_HINT_PLACES)):
        end = at + len(value)
        try:
            found = bytes(_essentials(b"".join((body[:at], mark, body[end:]))).kv_hints) == mark
        except MalformedRequestError:
            continue
        if found:
            before = body[:start].rstrip()
            if before.endswith(b","):
                return before[:-1].rstrip() + body[end:]
            return body[:start] + body[end:].lstrip().removeprefix(b",")
    raise _hints_stay()


def _hints_stay() -> MalformedRequestError:
    return MalformedRequestError(
        "kv_hints: could not be taken out of the body; only trusted tenants may send hints"
    )
