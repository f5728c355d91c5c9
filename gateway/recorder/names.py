"""What may be written of words that come from a client's conversation, and what they become."""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b
from typing import Final

from gateway.predictor.features import WRAPPER
from gateway.predictor.kinds import is_well_known
from gateway.predictor.shell import UNKNOWN

_STOPS: Final = {
    "stop": "end_turn",
    "end_turn": "end_turn",
    "stop_sequence": "end_turn",
    "completed": "end_turn",
    "length": "max_tokens",
    "max_tokens": "max_tokens",
    "incomplete": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "tool_use": "tool_use",
}
_PIECE: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_TOOL: Final = re.compile(r"[A-Za-z_.:-]{1,64}")
_DIGIT: Final = re.compile(r"\d").search
_MEAN_PIECE_CHARS: Final = 3
_MAX_PIECE_CHARS: Final = 16


class Salted:
    """Names that cannot be traced back without the salt; equal names become equal."""

    def __init__(self, salt: bytes) -> None:
        def keyed(kind: str) -> blake2b:
            return blake2b(kind.encode() + b"\0", key=salt, digest_size=8)

        self._session = keyed("session")
        self._tenant = keyed("tenant")
        self._block = keyed("block")
        self.scope = keyed("scope").hexdigest()
        """Of all blocks."""
        self.tenant = lru_cache(maxsize=1024)(self._name_of_tenant)

    def session(self, sid: str) -> str:
        """16 hexadecimal digits."""
        return _digits(self._session, sid)

    def _name_of_tenant(self, scope: int) -> str:
        """16 hexadecimal digits, of `gateway.sessions.Session.scope`."""
        return _digits(self._tenant, f"{scope:x}")

    def block(self, link: int) -> int:
        """The first block's id, of 61 bits, of a segment with this link of its prefix chain."""
        keyed = self._block.copy()
        keyed.update(link.to_bytes(8, "big"))
        return int.from_bytes(keyed.digest(), "big") >> 3


def _digits(keyed: blake2b, value: str) -> str:
    keyed = keyed.copy()
    keyed.update(value.encode(errors="surrogatepass"))
    return keyed.hexdigest()


@lru_cache(maxsize=1024)
def kept_tool(asked: str, tool: str) -> str:
    """``tool``, which `gateway.predictor.features` made of the name that was ``asked`` for, if it
    is a well-known one or made of words; any other may hold anything: nothing of it is kept."""
    if is_well_known(tool) or (asked != WRAPPER and not _DIGIT(asked) and _of_words(tool)):
        return tool
    return UNKNOWN


def _of_words(name: str) -> bool:
    if not _TOOL.fullmatch(name):
        return False
    pieces = _PIECE.findall(name)
    chars = sum(map(len, pieces))
    return (
        chars >= _MEAN_PIECE_CHARS * len(pieces) > 0 and max(map(len, pieces)) <= _MAX_PIECE_CHARS
    )


def stop_of(said: str | None, asks: bool) -> str | None:
    """Why an answer ended, in words of ours: of what the pod said, and whether it asks for
    tools."""
    if said is None:
        return None
    stop = _STOPS.get(said, "other")
    return "tool_use" if asks and stop == "end_turn" else stop
