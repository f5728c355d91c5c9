"""Cutting the connection of a client that does not read: an extension of the ASGI scope."""

from collections.abc import MutableMapping
from typing import Any, Final

ABORT: Final = "cachewise.abort"
"""Key in ``scope["extensions"]`` of what drops the connection at once, unsent bytes with it."""


def abort(scope: MutableMapping[str, Any]) -> None:
    """Drop the connection where the server offers it; else its response is left short."""
    drop = scope.get("extensions", {}).get(ABORT)
    if drop is not None:
        drop()
