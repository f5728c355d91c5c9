"""The prefix index: how much of a request is the same as before, and where it broke.

A request is a list of segments in prompt order: tools, system, then one a message. Its *chain* is
the rolling hash over their canonical forms, ``chain[i] = xxh3_64(chain[i-1] ‖ canonical[i])``, as
vLLM chains its block hashes, so two requests share a prefix of k segments exactly if their chains
agree at k - 1. Beside it stands the hash of each segment's raw bytes: where that is unchanged the
segment is not even parsed, so a turn costs one xxh3 over its bytes (about 20 µs for 400 KB) and the
parsing of what is new.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import orjson
import xxhash

from gateway.dialects.turn import TurnRequest, dumps

xxh3 = xxhash.xxh3_64_intdigest

BreakCause = Literal["model", "tools", "system", "compaction", "edit", "truncation"]

HEAD_SEGMENTS = 2
"""Tools and system prompt; the messages come after."""


class Prefix:
    """The prefix of one chain, as of its latest request: three numbers a segment.

    ``raw[i]`` hashes the segment's bytes, ``chain[i]`` all canonical forms up to and with it,
    ``end_bytes[i]`` counts canonical bytes up to and with it.
    """

    __slots__ = ("chain", "end_bytes", "raw", "seed")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.raw: array[int] = array("Q")
        self.chain: array[int] = array("Q")
        self.end_bytes: array[int] = array("I")

    def __len__(self) -> int:
        return len(self.chain)

    @property
    def total_bytes(self) -> int:
        return self.end_bytes[-1] if self.end_bytes else 0


@dataclass(slots=True, frozen=True)
class PrefixChange:
    """How a request relates to the one before it in its chain.

    ``same`` segments and ``same_bytes`` canonical bytes are unchanged. Where older segments changed
    or vanished, ``cause`` says why and ``lost_bytes`` counts the part of the old request whose KV
    is of no use any more.
    """

    same: int
    same_bytes: int
    total_bytes: int
    lost_bytes: int = 0
    cause: BreakCause | None = None


def seed_of(request: TurnRequest) -> int:
    return xxh3(request.model.encode())


def raw_hashes(request: TurnRequest) -> array[int]:
    """The hash of each segment's raw bytes."""
    return array("Q", map(xxh3, request.segments))


def advance(before: Prefix | None, request: TurnRequest) -> tuple[Prefix, PrefixChange]:
    """The request's prefix and how it relates to ``before``, the prefix of its chain's last
    request. Only segments whose bytes changed are parsed and hashed again. Pure.

    The model's name seeds the chain: another model's KV is no use.
    """
    now = Prefix(seed := seed_of(request))
    segments = request.segments
    raw = now.raw = raw_hashes(request)
    comparable = before is not None and before.seed == seed

    untouched = 0
    if before is not None and comparable:
        for mine, theirs in zip(raw, before.raw, strict=False):
            if mine != theirs:
                break
            untouched += 1
        now.chain = before.chain[:untouched]
        now.end_bytes = before.end_bytes[:untouched]

    same = untouched
    link = now.chain[-1] if untouched else seed
    size = now.total_bytes
    for index in range(untouched, len(segments)):
        canonical = request.item(index).canonical
        link = xxh3(canonical, link)
        size += len(canonical)
        now.chain.append(link)
        now.end_bytes.append(size)
        if before is not None and comparable and same == index < len(before):
            same += link == before.chain[index]

    same_bytes = now.end_bytes[same - 1] if same else 0
    if before is None or same >= len(before):
        return now, PrefixChange(same, same_bytes, size)
    if same == len(before) - 1 and (grown_bytes := _grown(before, now, request, same)):
        return now, PrefixChange(same, same_bytes + grown_bytes, size)
    return now, PrefixChange(
        same,
        same_bytes,
        size,
        lost_bytes=before.total_bytes - same_bytes,
        cause=_cause(len(before), now, same) if comparable else "model",
    )


@dataclass(slots=True, frozen=True)
class Skeleton:
    """What a replica of the gateway needs to know of a prefix that another one has seen.

    ``joints`` are (segments, link after them, bytes up to there) of a few places, denser towards
    both ends, so that of a prefix that broke most of what is the same is found. ``length`` counts
    its segments.
    """

    seed: int
    length: int
    total_bytes: int
    joints: tuple[tuple[int, int, int], ...]


def skeleton_of(prefix: Prefix) -> Skeleton:
    """O(log segments) joints."""
    length = len(prefix)
    steps = [1 << k for k in range(length.bit_length())]
    places = {n for n in (*steps, *(length - step + 1 for step in steps)) if 0 < n <= length}
    joints = tuple((n, prefix.chain[n - 1], prefix.end_bytes[n - 1]) for n in sorted(places))
    return Skeleton(prefix.seed, length, prefix.total_bytes, joints)


def since(before: Skeleton, now: Prefix) -> PrefixChange:
    """How a request relates to the one before it, of which only the skeleton is known: as `advance`
    says it, but of a break no more than the last joint before it. Pure."""
    same = same_bytes = 0
    for length, link, length_bytes in before.joints if before.seed == now.seed else ():
        if length > len(now) or now.chain[length - 1] != link:
            break
        same, same_bytes = length, length_bytes
    if same >= before.length:
        return PrefixChange(same, same_bytes, now.total_bytes)
    return PrefixChange(
        same,
        same_bytes,
        now.total_bytes,
        lost_bytes=before.total_bytes - same_bytes,
        cause=_cause(before.length, now, same) if before.seed == now.seed else "model",
    )


MAX_BLOCKS_ADDED = 4


def _grown(before: Prefix, now: Prefix, request: TurnRequest, last: int) -> int:
    """Bytes that the last message of ``before`` has in common with its successor, if that only has
    more blocks at its end (Claude Code adds its wish for a summary to the last tool results);
    else 0."""
    if not HEAD_SEGMENTS <= last < len(now):
        return 0
    try:
        message = orjson.loads(request.item(last).canonical)
    except orjson.JSONDecodeError:
        return 0
    blocks = message.get("content") if isinstance(message, dict) else None
    if not isinstance(blocks, list):
        return 0
    for count in range(len(blocks) - 1, max(0, len(blocks) - 1 - MAX_BLOCKS_ADDED), -1):
        message["content"] = blocks[:count]
        canonical = dumps(message)
        if xxh3(canonical, now.chain[last - 1]) == before.chain[last]:
            return len(canonical)
    return 0


def _cause(length: int, now: Prefix, same: int) -> BreakCause:
    """Why a prefix of ``length`` segments broke after the first ``same``."""
    if same == 0:
        return "tools"
    if same == 1:
        return "system"
    if same == len(now):
        return "truncation"
    # A compaction replaces most of the history by a summary: far fewer segments than before.
    few = max(HEAD_SEGMENTS + 4, length // 2)
    if len(now) <= few and len(now) < length and same < length // 2:
        return "compaction"
    return "edit"


class TailIndex:
    """Finds the chains that a request may continue when no id names one.

    Each chain registers the links at the end of its latest request and one segment before (aider
    rewrites its last message), and one over its raw bytes; a later request that extends it carries
    one of these links too. Keys are mixed with the caller's scope, so no tenant can find another's
    chain. At most ``limit`` links, oldest out first, each with its few latest owners.
    """

    LINKS = 3
    """Links that a chain registers."""
    MAX_OWNERS = 4
    RAW_LOOKBACK = 32

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._owners: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    @staticmethod
    def _links(prefix: Prefix) -> list[int]:
        last = len(prefix) - 1
        links = [prefix.chain[i] for i in (last, last - 1) if i >= HEAD_SEGMENTS]
        return [*links, xxh3(prefix.raw, prefix.seed)]

    def register(self, scope: int, prefix: Prefix, key: str) -> None:
        """Let ``prefix`` be found as ``key``'s."""
        for link in self._links(prefix):
            place = link ^ scope
            owners = self._owners.pop(place, ())
            others = tuple(k for k in owners if k != key) if owners else ()
            self._owners[place] = (key, *others)[: self.MAX_OWNERS]
        while len(self._owners) > self._limit:
            self._owners.popitem(last=False)

    def forget(self, scope: int, prefix: Prefix, key: str) -> None:
        """Undo `register`."""
        for link in self._links(prefix):
            owners = self._owners.get(link ^ scope)
            if owners is None or key not in owners:
                continue
            rest = tuple(k for k in owners if k != key)
            if rest:
                self._owners[link ^ scope] = rest
            else:
                del self._owners[link ^ scope]

    def find(self, scope: int, prefix: Prefix) -> Iterator[tuple[str, int]]:
        """Chains that share a registered link and the number of segments shared, longest first,
        latest owner first. O(segments)."""
        for index in range(len(prefix) - 1, HEAD_SEGMENTS - 1, -1):
            for key in self._owners.get(prefix.chain[index] ^ scope, ()):
                yield key, index + 1

    def find_raw(self, scope: int, seed: int, raw: array[int]) -> tuple[str, int] | None:
        """The one chain whose whole latest request stands, byte for byte, at the beginning of this
        one, and its number of segments: found without parsing. None if there are several, or if
        more than `RAW_LOOKBACK` segments came since."""
        view = memoryview(raw)
        for length in range(len(raw) - 1, max(HEAD_SEGMENTS, len(raw) - self.RAW_LOOKBACK), -1):
            owners = self._owners.get(xxh3(view[:length], seed) ^ scope)
            if owners is not None:
                return (owners[0], length) if len(owners) == 1 else None
        return None
