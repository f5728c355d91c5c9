"""Bytes from the store as what was written, or an error: anybody may have written them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec


class Versioned(Protocol):
    @property
    def version(self) -> int: ...


V = TypeVar("V", bound=Versioned)


def decoded(
    decode: Callable[[bytes], V],
    data: bytes,
    most_bytes: int,
    version: int,
    error: type[ValueError],
) -> V:
    """Raises ``error`` where the data are too long, of no such shape, or of another version."""
    if len(data) > most_bytes:
        raise error("too long")
    try:
        found = decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as fault:
        raise error(type(fault).__name__) from None
    if found.version != version:
        raise error(f"version {found.version}")
    return found
