"""Who is calling: the session that a request names by itself, and what class of request it is.

The precedence is that of `clients.md` §2; first match wins. Three keys come out: ``group`` (the
root session, shared by its sub-agents), ``chain`` (one reasoning chain, the identity of a KV
prefix), ``parent`` (the chain that started this one). Every value is the client's word, so it is
only ever used inside the caller's own scope.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import orjson
import xxhash
from msgspec.structs import astuple

from gateway.dialects.turn import TurnRequest, loads

RequestClass = Literal["main", "subagent", "compaction", "auxiliary"]
Headers = Mapping[bytes, bytes]

MAX_KEY_CHARS = 256


@dataclass(slots=True, frozen=True)
class Named:
    """A session named by the request itself. ``source`` is the header or field that named it."""

    source: str
    group: str
    chain: str
    parent: str | None = None
    final: bool = False


def _header(headers: Headers, name: bytes) -> str | None:
    value = headers.get(name)
    return _key(value.decode("latin-1")) if value else None


def _key(value: Any) -> str | None:
    """A usable key, or None. An over-long one is replaced by its digest."""
    if not isinstance(value, str):
        return None
    value = value.strip()
    if not value:
        return None
    return value if len(value) <= MAX_KEY_CHARS else xxhash.xxh3_128_hexdigest(value.encode())


def named_by_headers(headers: Headers) -> Named | None:
    """The session that the request's headers name, by the clients' own conventions."""
    if _NAMING_HEADERS.isdisjoint(headers):
        return None
    for operator in (b"x-cachewise-session-id", b"x-dynamo-session-id"):
        if chain := _header(headers, operator):
            base = operator.removesuffix(b"session-id")
            parent = _header(headers, base + b"parent-session-id")
            final = headers.get(base + b"session-final", b"").lower() in (b"true", b"1")
            return Named(operator.decode(), parent or chain, chain, parent, final)
    if group := _header(headers, b"x-claude-code-session-id"):
        source = "x-claude-code-session-id"
        agent = _header(headers, b"x-claude-code-agent-id")
        if agent is None:
            return Named(source, group, group)
        nested = _header(headers, b"x-claude-code-parent-agent-id")
        parent = f"{group}/{nested}" if nested else group
        return Named(source, group, f"{group}/{agent}", parent)
    if chain := _header(headers, b"thread-id"):  # Codex
        parent = _header(headers, b"x-codex-parent-thread-id")
        return Named("thread-id", _header(headers, b"session-id") or chain, chain, parent)
    if chain := _header(headers, b"x-session-id"):  # opencode, Crush, Harbor
        parent = _header(headers, b"x-parent-session-id")
        return Named("x-session-id", parent or chain, chain, parent)
    for name in _PLAIN_HEADERS:
        if chain := _header(headers, name):
            return Named(name.decode(), chain, chain)
    return None


_PLAIN_HEADERS = (
    b"x-session-affinity",
    b"x-opencode-session",
    b"agent-session-id",
    b"goose-session-id",
    b"session-id",
    b"session_id",
    b"conversation_id",
    b"x-conversation-id",
    b"x-task-id",
    b"x-roo-task-id",
    b"x-litellm-session-id",
    b"x-litellm-trace-id",
)
_NAMING_HEADERS = frozenset(
    {
        b"x-cachewise-session-id",
        b"x-dynamo-session-id",
        b"x-claude-code-session-id",
        b"thread-id",
        b"x-session-id",
        *_PLAIN_HEADERS,
    }
)


def named_by_body(request: TurnRequest) -> Named | None:
    """The session that fields of the body name. ``prompt_cache_key`` comes last: in general it
    groups prompts, but for the clients that send it, it is the conversation."""
    ids = request.ids
    if not any(map(len, astuple(ids))):
        return None
    metadata = _object(ids.metadata)
    if chain := _user_id_session(metadata.get("user_id")):
        return Named("metadata.user_id", chain, chain)
    for name in ("session_id", "cursorConversationId"):
        if chain := _key(metadata.get(name)):
            return Named(f"metadata.{name}", chain, chain)
    conversation = _loaded(ids.conversation)
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    if chain := _key(conversation):
        return Named("conversation", chain, chain)
    if chain := _key(_loaded(ids.session_id)):
        return Named("session_id", chain, chain)
    hint = _object(ids.agent_hint)
    if chain := _key(hint.get("session_id")):
        parent = _key(hint.get("parent_session_id"))
        return Named("agent_hint.session_id", parent or chain, chain, parent)
    client = _object(ids.client_metadata)
    if chain := _key(client.get("thread_id")):
        group = _key(client.get("session_id")) or chain
        return Named("client_metadata.thread_id", group, chain)
    if chain := _key(_loaded(ids.prompt_cache_key)):
        return Named("prompt_cache_key", chain, chain)
    return None


def _loaded(raw: msgspec.Raw) -> Any:
    if not 0 < len(raw) <= 65_536:
        return None
    try:
        return loads(raw)
    except orjson.JSONDecodeError:
        return None


def _object(raw: msgspec.Raw) -> dict[str, Any]:
    value = _loaded(raw)
    return value if isinstance(value, dict) else {}


_OLD_USER_ID = re.compile(r"_session_([A-Za-z0-9-]{8,256})\Z")


def _user_id_session(user_id: Any) -> str | None:
    """Claude Code's ``metadata.user_id``: a JSON string with ``session_id``; in older versions
    ``user_<hex>_account__session_<uuid>``."""
    if not isinstance(user_id, str) or len(user_id) > 4096:
        return None
    if user_id.startswith("{"):
        try:
            value = orjson.loads(user_id)
        except orjson.JSONDecodeError:
            return None
        return _key(value.get("session_id")) if isinstance(value, dict) else None
    found = _OLD_USER_ID.search(user_id)
    return found.group(1) if found else None


_CLASS_HINTS: dict[bytes, RequestClass] = {
    b"main": "main",
    b"subagent": "subagent",
    b"compaction": "compaction",
    b"auxiliary": "auxiliary",
}
_COMPACTION_TEXT = (
    "CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.",
    "You are performing a CONTEXT CHECKPOINT COMPACTION",
    "Your task is to create a detailed summary of",
)
_AUXILIARY_SYSTEM = (
    "You are naming a coding session",
    "You are a title generator",
    "Generate a concise, sentence-case title",
    "You are a context summarization agent",
)
_ALWAYS_OFFER_TOOLS = frozenset({"x-claude-code-session-id", "thread-id", "x-session-id"})
"""Sources of clients whose own chains always offer tools: a request without is an aside."""


def classify(headers: Headers, request: TurnRequest, named: Named | None) -> RequestClass:
    """Whether a request is a chain's own turn or an aside (`clients.md` §5)."""
    hinted = _CLASS_HINTS.get(headers.get(b"x-claude-code-request-class", b""))
    if hinted is not None:
        return hinted
    if b"x-claude-code-compaction" in headers:
        return "compaction"
    if b'"request_kind":"compaction"' in headers.get(b"x-codex-turn-metadata", b""):
        return "compaction"
    if request.title_format:
        return "auxiliary"
    last = request.item(len(request.segments) - 1)
    if last.role == "user" and any(mark in last.text for mark in _COMPACTION_TEXT):
        return "compaction"
    if not request.has_tools:
        if named is not None and named.source in _ALWAYS_OFFER_TOOLS:
            return "auxiliary"
        for index in (1, 2):
            if index < len(request.segments):
                item = request.item(index)
                if item.role == "system" and item.text.startswith(_AUXILIARY_SYSTEM):
                    return "auxiliary"
    return "subagent" if named is not None and named.parent is not None else "main"


_CLIENTS = (
    (b"claude-cli", "claude-code"),
    (b"claude-code", "claude-code"),
    (b"codex", "codex"),
    (b"opencode", "opencode"),
    (b"qwencode", "qwen-code"),
    (b"cline", "cline"),
    (b"goose", "goose"),
    (b"crush", "crush"),
    (b"openhands", "openhands"),
    (b"litellm", "litellm"),
    (b"aider", "aider"),
    (b"anthropic/", "anthropic-sdk"),
    (b"openai/", "openai-sdk"),
    (b"ls/js", "openai-sdk"),
)


def client_kind(headers: Headers) -> str:
    """The client program, from its ``User-Agent``: one of a fixed few names, or ``other``."""
    agent = headers.get(b"user-agent", b"")[:200].lower()
    for mark, kind in _CLIENTS:
        if mark in agent:
            return kind
    return "other"
