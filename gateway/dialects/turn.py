"""What a turn is, whatever wire dialect it came in: the request's segments, the response's outcome.

A request is kept as raw JSON slices of its body ("segments"); a slice is parsed only when somebody
must look inside, so a 400 KB history costs one skip over its bytes and a hash of each message.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
import orjson

Wire = Literal["chat", "completions", "responses", "messages"]
Role = Literal["system", "user", "assistant", "tool", "other"]

EMPTY = msgspec.Raw(b"")

MAX_ARGUMENT_CHARS = 65_536
"""Characters of a tool call's arguments that are kept; the rest is counted, not stored."""

MAX_CALLS = 256
"""Tool calls of one response that are kept."""

HEAD_CHARS = 2_000
"""Characters of a message's text that are looked at to classify it."""


@dataclass(slots=True, frozen=True)
class ToolCall:
    """A tool call asked for by a response.

    ``arguments`` is the JSON text as the model wrote it, cut to `MAX_ARGUMENT_CHARS`;
    ``arguments_chars`` is its full length.
    """

    id: str
    name: str
    arguments: str
    arguments_chars: int

    @classmethod
    def of(cls, call_id: str, name: str, arguments: str) -> ToolCall:
        return cls(call_id, name, arguments[:MAX_ARGUMENT_CHARS], len(arguments))


@dataclass(slots=True)
class CallDraft:
    """A tool call whose arguments come in pieces."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)
    chars: int = 0

    def add(self, piece: str) -> None:
        if piece and self.chars < MAX_ARGUMENT_CHARS:
            self.pieces.append(piece)
        self.chars += len(piece)

    def call(self) -> ToolCall:
        return ToolCall(self.id, self.name, "".join(self.pieces)[:MAX_ARGUMENT_CHARS], self.chars)


@dataclass(slots=True, frozen=True)
class ToolResult:
    """A tool's answer found in a request: the call's id, whether it failed, how its text begins."""

    call_id: str
    is_error: bool
    head: str


@dataclass(slots=True, frozen=True)
class Usage:
    """Tokens of a turn. ``prompt_tokens`` includes the cached ones; ``cached_tokens`` is None
    where the pod does not say."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None


@dataclass(slots=True)
class TurnOutcome:
    """What a response said, as far as the gateway needs to know it."""

    response_id: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    stop_reason: str | None = None
    """The pod's own word (``tool_calls``, ``end_turn``, ``length`` …), None if it never came."""
    usage: Usage | None = None
    error: bool = False

    def add_call(self, call: ToolCall) -> None:
        if len(self.tool_calls) < MAX_CALLS:
            self.tool_calls.append(call)


@dataclass(slots=True, frozen=True)
class Item:
    """One segment of a request, looked into.

    ``canonical`` is its normalised form, equal for equal meaning (`clients.md` §0.8): sorted keys,
    no ``cache_control``, no item ``id`` and ``status``, a string content as one text block.
    """

    canonical: bytes
    role: Role
    call_ids: tuple[str, ...] = ()
    results: tuple[ToolResult, ...] = ()
    text: str = ""
    """The first `HEAD_CHARS` of a person's (or the client's) text in it."""


NOTHING = Item(b"", "other")
"""What a field that is not there holds."""


class BodyIds(msgspec.Struct):
    """Fields of the body that may name the session; every value is untrusted and may be odd."""

    metadata: msgspec.Raw = EMPTY
    conversation: msgspec.Raw = EMPTY
    client_metadata: msgspec.Raw = EMPTY
    agent_hint: msgspec.Raw = EMPTY
    session_id: msgspec.Raw = EMPTY
    prompt_cache_key: msgspec.Raw = EMPTY
    previous_response_id: msgspec.Raw = EMPTY


@dataclass(slots=True)
class TurnRequest:
    """A parsed turn. ``segments`` are ``[tools, system, item, item, …]`` in the order in which
    chat templates print them; the first two may be empty."""

    wire: Wire
    model: str
    stream: bool
    segments: list[msgspec.Raw]
    look: Callable[[int, msgspec.Raw], Item]
    ids: BodyIds = field(default_factory=BodyIds)
    title_format: bool = False
    """The client asked for a JSON object that holds only a title."""
    hinted: bool = False
    """The body has a field ``kv_hints``."""
    _items: dict[int, Item] = field(default_factory=dict)

    @property
    def has_tools(self) -> bool:
        return len(self.segments[0]) > 0

    def item(self, index: int) -> Item:
        """The segment at ``index``, parsed once. Never raises: what cannot be read is ``other``."""
        found = self._items.get(index)
        if found is None:
            raw = self.segments[index]
            if not len(raw):
                return NOTHING
            try:
                found = self.look(index, raw)
            except Exception:
                found = Item(bytes(raw), "other")
            self._items[index] = found
        return found


class MalformedRequestError(ValueError):
    """The body is no JSON object that names a model; the text says what is wrong."""


class Observer(Protocol):
    """Reads a copy of a response as it passes. ``feed`` takes bytes cut anywhere; ``finish`` is
    called once, after the last byte. Neither ever changes or delays what the client gets."""

    outcome: TurnOutcome

    def feed(self, chunk: bytes) -> None: ...
    def finish(self) -> None: ...


def given(raw: msgspec.Raw) -> msgspec.Raw:
    """A field's value; `EMPTY` for null, an empty list and an empty string, which all say that
    there is none."""
    nothing = len(raw) < 64 and bytes(raw).strip(b'[]" \t\r\n') in (b"", b"null")
    return EMPTY if nothing else raw


def loads(raw: msgspec.Raw) -> Any:
    """A slice's value. Raises `orjson.JSONDecodeError`."""
    return orjson.loads(memoryview(raw))  # which takes no msgspec.Raw


def dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def text_blocks(content: Any) -> list[Any]:
    """Content as a list of blocks without ``cache_control``; a string is one text block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        return [] if content is None else [content]
    for block in content:
        if isinstance(block, dict):
            block.pop("cache_control", None)
    return content


def head_of(content: Any) -> str:
    """How the text of a content value begins (string, or list of text blocks)."""
    if isinstance(content, str):
        return content[:HEAD_CHARS]
    parts: list[str] = []
    room = HEAD_CHARS
    for block in content if isinstance(content, list) else ():
        text = block.get("text") if isinstance(block, dict) else None
        if isinstance(text, str) and room > 0:
            parts.append(text[:room])
            room -= len(text)
    return "\n".join(parts)


_REMINDER = re.compile(r"<system-reminder>.*?(?:</system-reminder>|\Z)", re.DOTALL)


def _keep_notification(reminder: re.Match[str]) -> str:
    passage = reminder.group()
    at = passage.find("<task-notification>")
    return passage[at:] if at >= 0 else ""


def human_head_of(blocks: list[Any], kinds: tuple[str, ...]) -> str:
    """The beginning of what a person wrote in ``blocks``: texts of the given block types, without
    the ``<system-reminder>`` passages a client adds to them (a ``<task-notification>`` is kept)."""
    parts: list[str] = []
    room = HEAD_CHARS
    for block in blocks:
        if not isinstance(block, dict) or block.get("type") not in kinds:
            continue
        text = block.get("text")
        if not isinstance(text, str):
            continue
        if "<system-reminder>" in text:
            text = _REMINDER.sub(_keep_notification, text)
        text = text.strip()
        if text and room > 0:
            parts.append(text[:room])
            room -= len(text)
    return "\n".join(parts)


def as_str(value: Any) -> str:
    return value if isinstance(value, str) else ""


def as_count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
