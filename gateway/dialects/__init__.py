"""Wire dialects: what clients send and what pods answer, one file per dialect.

A dialect is three things, kept in one table: how to read a request, how to watch a stream, how to
read a whole answer. Dialects know no sessions and no pods.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
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

__all__ = ["DIALECTS", "Dialect", "MalformedRequestError", "parse", "read_model", "splice_model"]


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


class _ModelOnly(msgspec.Struct):
    model: str
    stream: msgspec.Raw = EMPTY


_decode_model_only = msgspec.json.Decoder(_ModelOnly).decode


def parse(dialect: Dialect, body: bytes) -> TurnRequest:
    """Read a request body.

    A body that names a model but is otherwise not of its dialect's shape comes back with no
    segments: the pod will refuse it in its own words. Raises `MalformedRequestError` where even the
    model cannot be read.
    """
    try:
        return dialect.parse(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        model, stream = read_model(body)
        return TurnRequest(
            dialect.wire, model, stream, [EMPTY, EMPTY], lambda _, raw: Item(bytes(raw), "other")
        )


def read_model(body: bytes) -> tuple[str, bool]:
    """The model that a JSON body names and whether it asks for a stream. Raises
    `MalformedRequestError` if it is no JSON object or names none."""
    try:
        found = _decode_model_only(body)
    except msgspec.ValidationError as error:
        raise MalformedRequestError(f"request body: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequestError(f"request body is not valid JSON: {error}") from None
    except RecursionError:
        raise MalformedRequestError("request body is nested too deeply") from None
    return found.model, bytes(found.stream) == b"true"


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
