"""What may be done with a client's connection beyond ASGI: extensions of the scope, which
`gateway.protocol` offers and another server may not."""

from collections.abc import Callable, MutableMapping
from typing import Any, Final

ABORT: Final = "cachewise.abort"
"""Key in ``scope["extensions"]`` of what drops the connection at once, unsent bytes with it."""
WRITE: Final = "cachewise.write"
"""Key of what sends a piece of an answer, with more to come, from outside a coroutine; it returns
False, and has done nothing, where only ``send`` can."""


def abort(scope: MutableMapping[str, Any]) -> None:
    """Drop the connection where the server offers it; else its response is left short."""
    drop = scope.get("extensions", {}).get(ABORT)
    if drop is not None:
        drop()


def writer(scope: MutableMapping[str, Any]) -> Callable[[bytes], bool]:
    """What sends a piece of an answer, as `WRITE` says."""
    write: Callable[[bytes], bool] = scope.get("extensions", {}).get(WRITE, cannot_write)
    return write


def cannot_write(_: bytes) -> bool:
    """Where the server offers nothing."""
    return False
