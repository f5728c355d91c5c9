"""Wire dialects: what clients send and what pods answer, one file per dialect.

A dialect is three things, kept in one table: how to read a request, how to watch a stream, how to
read a whole answer. Dialects know no sessions and no pods.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
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


_HINTS_KEY = b"".join(b"(?:%c|\\\\u00(?i:%02x))" % (c, c) for c in b"kv_hints")
"""``kv_hints`` as JSON may spell it: each character as it is or as its escape."""


def without_hints(body: bytes) -> bytes:
    """``body`` without its top-level ``"kv_hints"``; every other byte stays.

    As in `splice_model`, each place that spells the field is tried and the result read back. Raises
    `MalformedRequestError` after `MAX_SPLICE_TRIES` wrong places.
    """
    while len(value := bytes(_essentials(body).kv_hints)):
        body = _without_field(body, value)
    return body


def _without_field(body: bytes, value: bytes) -> bytes:
    field = b'"' + _HINTS_KEY + rb'"\s*:\s*' + re.escape(value)
    places = re.finditer(rb"\s*,\s*" + field + rb"|" + field + rb"\s*,?", body)
    for place in islice(places, MAX_SPLICE_TRIES):
        spliced = body[: place.start()] + body[place.end() :]
        try:
            if bytes(_essentials(spliced).kv_hints) != value:
                return spliced
        except MalformedRequestError:
            continue
    raise MalformedRequestError(
        "kv_hints: could not be taken out of the body; only trusted tenants may send hints"
    )
