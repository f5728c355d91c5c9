"""From a request body to tokens: one canonical byte string, four bytes a token.

There is no tokenizer. Every dialect's history is brought into one form and rendered to bytes:
tools, then the messages, each ended by a marker and padded to whole tokens. An answer is
rendered by the same function as the assistant message that brings it back in the next turn, so
prompt + answer is a byte prefix of the next prompt and the KV of both is found again.

Left out, since they change from turn to turn without changing what the model sees:
`cache_control`, item ids and status, tool-call ids, thinking signatures, and Claude Code's
`x-anthropic-billing-header` system entry (as vLLM does since its #36829). Tool-call arguments
are rendered from their parsed form, for clients re-serialise them. An image counts as its hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

BYTES_PER_TOKEN = 4
END_OF_MESSAGE = b"\x00<|end|>"
THINK, END_THINK, CALL = b"<think>", b"</think>", b"\x00<call>"


class Call(NamedTuple):
    """A tool call in the history, or in an answer. `arguments` is compact JSON."""

    name: str
    arguments: bytes


class Message(NamedTuple):
    """One message of a conversation, in any dialect."""

    role: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a request asks the model to continue."""

    messages: Sequence[Message]
    tools: Sequence[Any] = ()
    raw: bytes | None = None  # a bare prompt of /v1/completions, instead of messages


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and its answer as the engine sees them; one hash a full block of both."""

    prompt_tokens: int
    output_tokens: int
    block_hashes: Sequence[int]


def render_prompt(conversation: Conversation) -> bytes:
    """The conversation up to and including the header of the answer, in whole tokens."""
    if conversation.raw is not None:
        return pad(conversation.raw)
    parts: list[bytes] = []
    if conversation.tools:
        parts.append(pad(b"<|tools|>" + orjson.dumps(conversation.tools)))
    for message in conversation.messages:
        parts.append(_header(message.role))
        parts.append(render_body(message))
    parts.append(_header("assistant"))
    return b"".join(parts)


def render_body(message: Message) -> bytes:
    """A message without its header: what the model generates when it is the answer."""
    parts: list[bytes] = []
    if message.reasoning:
        parts += (THINK, message.reasoning.encode(errors="replace"), END_THINK)
    if message.text:
        parts.append(message.text.encode(errors="replace"))
    for call in message.calls:
        parts += (CALL, call.name.encode(errors="replace"), b" ", call.arguments)
    parts.append(END_OF_MESSAGE)
    return pad(b"".join(parts))


def pad(data: bytes) -> bytes:
    """Fill up to whole tokens."""
    return data + b"\x00" * (-len(data) % BYTES_PER_TOKEN)


def block_hashes(data: bytes, block_size_tokens: int) -> list[int]:
    """One hash a full block, each seeded with its parent's: equal hashes, equal prefixes."""
    size = block_size_tokens * BYTES_PER_TOKEN
    view = memoryview(data)
    parent = 0
    hashes: list[int] = []
    for start in range(0, len(data) - size + 1, size):
        parent = xxh3_64_intdigest(view[start : start + size], parent)
        hashes.append(parent)
    return hashes


def canonical_json(text: str) -> bytes:
    """JSON text in its compact form; other text as it is."""
    try:
        return orjson.dumps(orjson.loads(text))
    except orjson.JSONDecodeError:
        return text.encode(errors="replace")


def join_text(content: Any) -> str:
    """The text of a `content` field: a string, or a list of blocks of any dialect."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "".join(map(_block_text, content))


def merge_assistant_runs(messages: Iterable[Message]) -> list[Message]:
    """Join neighbouring assistant messages: the items of one answer, where a dialect splits it."""
    merged: list[Message] = []
    for message in messages:
        if message.role == "assistant" and merged and merged[-1].role == "assistant":
            last = merged[-1]
            merged[-1] = Message(
                "assistant",
                last.text + message.text,
                last.reasoning + message.reasoning,
                last.calls + message.calls,
            )
        else:
            merged.append(message)
    return merged


def _block_text(block: Any) -> str:
    if isinstance(block, str):
        return block
    if not isinstance(block, dict):
        return ""
    text = block.get("text")
    if isinstance(text, str):
        return text
    kind = block.get("type")
    if kind in ("image", "image_url", "input_image", "input_file", "document", "file"):
        payload = {key: value for key, value in block.items() if key != "cache_control"}
        return f"<|{kind} {xxh3_64_hexdigest(orjson.dumps(payload))}|>"
    return ""


def _header(role: str) -> bytes:
    return pad(f"<|{role}|>\n".encode())
