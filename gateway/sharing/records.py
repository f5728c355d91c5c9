"""What is written to the store of a session, and how it becomes a session again elsewhere.

Numbers, names of pods and tools, digests. No text, no key, no id that a client or an engine chose;
times are of the wall clock.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Final

import msgspec

from gateway.dialects.turn import Usage
from gateway.identity import RequestClass
from gateway.idle import IdleKind
from gateway.prefix import Skeleton, skeleton_of
from gateway.sessions import UNNAMED_CALL, Session
from gateway.sharing.wire import decoded

VERSION: Final = 1
MAX_RECORD_BYTES: Final = 64 * 1024
TOOLS_KEPT: Final = 16
_MOST: Final = 1 << 40
"""No count that a session has is larger."""


class RecordError(ValueError):
    """A record that is none, or of another version."""


class SessionRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A session at the end of a turn, as one MessagePack array."""

    version: int
    key: str
    """Of a session that its client does not name: random, this gateway's own. Else empty."""
    source: str
    group: str
    parent: str | None
    client: str
    model: str
    request_class: RequestClass
    affinity: str
    forked_from: str | None
    created_at: float
    seen_at: float
    turns: int
    tool_calls: int
    breaks: int
    lost_tokens: int
    idle_kind: IdleKind | None
    idle_since: float | None
    waiting_for: tuple[str, ...]
    left_running: int
    woken_later: int
    """Calls left running; wake-ups that the client has planned for itself."""
    has_tools: bool
    last_failed: bool
    pod: str | None
    tokens_per_byte: float
    answer_tokens: float
    usage: tuple[int, int, int | None] | None
    seed: int
    segments: int
    total_bytes: int
    joints: tuple[tuple[int, int, int], ...]
    """Of its latest request; the links are mixed with the caller's scope."""
    marks: tuple[bytes, ...]
    """Under which digests it is found where no request names it."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SessionRecord).decode


def digest(mark: str) -> bytes:
    """Under what a mark stands in the store."""
    return blake2b(mark.encode(errors="replace"), digest_size=16).digest()


def pack(session: Session, marks: tuple[bytes, ...], wall_minus_now_s: float) -> bytes:
    """The record of a session whose times are of a clock behind the wall's by
    ``wall_minus_now_s``."""
    prefix = skeleton_of(session.prefix) if session.prefix is not None else Skeleton(0, 0, 0, ())
    usage = session.usage
    planned = sum(session.background.values())
    since = session.idle_since
    return _encode(
        SessionRecord(
            version=VERSION,
            key="" if session.named else session.key,
            source=session.source,
            group=session.group,
            parent=session.parent,
            client=session.client,
            model=session.model,
            request_class=session.request_class,
            affinity=session.affinity,
            forked_from=session.forked_from,
            created_at=session.created_at + wall_minus_now_s,
            seen_at=session.seen_at + wall_minus_now_s,
            turns=session.turns,
            tool_calls=session.tool_calls,
            breaks=session.breaks,
            lost_tokens=session.lost_tokens,
            idle_kind=session.idle_kind,
            idle_since=None if since is None else since + wall_minus_now_s,
            waiting_for=session.waiting_for[:TOOLS_KEPT],
            left_running=len(session.background) - planned,
            woken_later=planned,
            has_tools=session.has_tools,
            last_failed=session.last_failed,
            pod=session.pod,
            tokens_per_byte=session.tokens_per_byte,
            answer_tokens=session.answer_tokens,
            usage=None
            if usage is None
            else (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens),
            seed=prefix.seed,
            segments=prefix.length,
            total_bytes=prefix.total_bytes,
            joints=tuple((n, link ^ session.scope, size) for n, link, size in prefix.joints),
            marks=marks,
        )
    )


def unpack(data: bytes) -> SessionRecord:
    """Raises `RecordError`: what another version, or somebody else, has written is not used."""
    record = decoded(_decode, data, MAX_RECORD_BYTES, VERSION, RecordError)
    counts = (record.turns, record.tool_calls, record.breaks, record.lost_tokens, record.segments)
    running = record.left_running + record.woken_later
    if not (
        all(0 <= count < _MOST for count in (*counts, record.total_bytes))
        and 0 <= record.left_running <= running <= 64
        and 0 < record.tokens_per_byte < 1e6
        and 0 <= record.answer_tokens < 1e9
        and record.turns > 0
    ):
        raise RecordError("numbers that cannot be")
    return record


def restore(
    record: SessionRecord, key: str, sid: str, tenant: str, scope: int, now: float, wall: float
) -> Session:
    """The session of a record, as a replica that has not seen it takes it in."""
    session = Session(
        key=key,
        sid=sid,
        tenant=tenant,
        scope=scope,
        source=record.source,
        group=record.group,
        parent=record.parent,
        client=record.client,
        model=record.model,
        created_at=_back(record.created_at, now, wall),
        seen_at=now,
        request_class=record.request_class,
        affinity=record.affinity,
        forked_from=record.forked_from,
    )
    renew(session, record, now, wall)
    return session


def renew(session: Session, record: SessionRecord, now: float, wall: float) -> None:
    """Bring a session that other replicas have served since up to what they know of it."""
    updates: dict[str, Any] = {
        name: getattr(record, name)
        for name in (
            "turns",
            "tool_calls",
            "breaks",
            "lost_tokens",
            "idle_kind",
            "waiting_for",
            "has_tools",
            "last_failed",
            "pod",
            "tokens_per_byte",
            "answer_tokens",
        )
    }
    for name, value in updates.items():
        setattr(session, name, value)
    since = record.idle_since
    session.idle_since = None if since is None else _back(since, now, wall)
    session.usage = Usage(*record.usage) if record.usage is not None else None
    session.background = {
        f"{UNNAMED_CALL}{n}": n >= record.left_running
        for n in range(record.left_running + record.woken_later)
    }
    session.forecast = None
    links = ((n, link ^ session.scope, size) for n, link, size in record.joints)
    session.skeleton = Skeleton(record.seed, record.segments, record.total_bytes, tuple(links))
    session.heads_elsewhere = frozenset()
    session.elsewhere = True
    session.heard_at = now


def _back(at: float, now: float, wall: float) -> float:
    """A time of the wall clock on the caller's own; never in its future."""
    return now - max(0.0, wall - at)
