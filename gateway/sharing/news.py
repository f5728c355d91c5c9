"""What replicas say to each other on their channel: one message for all that happened in a moment.

Nothing depends on a message arriving: a replica that missed some reads the store, and what it
believes of the others lapses.
"""

from __future__ import annotations

from typing import Final

import msgspec

from gateway.idle import IdleKind
from gateway.sharing.wire import decoded

VERSION: Final = 1
MAX_NEWS_BYTES: Final = 4 * 1024 * 1024


class NewsError(ValueError):
    """A message that is none, or of another version."""


class Left(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A turn has ended: what it left in a pod's cache."""

    sid: str
    pod: str
    prompt_tokens: int
    output_tokens: int
    heads: tuple[tuple[int, int], ...]
    """Links of the prompt's prefix, longest first, and their lengths in tokens."""
    idle_kind: IdleKind | None
    turns: int


class Share(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a replica has on one pod, and would have."""

    agent_tokens: int = 0
    aside_tokens: int = 0
    """Of its places."""
    wanted_tokens: int = 0
    """Of turns that it holds, as far as they may go to this pod."""
    claim_tokens: int = 0
    """Of a due turn for which it gives no other a place."""
    claim_age_s: float = 0.0
    in_flight: int = 0
    queued_tokens: int = 0
    """To be prefilled."""


class PlaceTaken(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An idle session keeps its place on a pod."""

    sid: str
    pod: str
    tokens: int


class News(msgspec.Struct, array_like=True, frozen=True):
    """One message. ``shares`` is None where they are not told."""

    version: int
    replica: str
    began: tuple[tuple[str, float], ...] = ()
    """Sessions that others had served, whose turns this replica has begun: seconds since."""
    left: tuple[Left, ...] = ()
    shares: dict[str, Share] | None = None
    held: int = 0
    whole: bool = False
    """Whether ``placed`` is all there is, or only what came since the last message."""
    placed: tuple[PlaceTaken, ...] = ()
    dropped: tuple[str, ...] = ()
    """Sessions whose places were given up."""
    leaves: bool = False
    """The replica stops."""


pack = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(News).decode


def unpack(data: bytes) -> News:
    """Raises `NewsError`."""
    return decoded(_decode, data, MAX_NEWS_BYTES, VERSION, NewsError)
