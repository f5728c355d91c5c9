"""What a prompt has in common with the one before it, in blocks of bytes."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from gateway.recorder.names import Salted
from gateway.traces.cachewise import BLOCK_BYTES

MAX_SESSIONS: Final = 65_536
MAX_SEGMENTS: Final = 4_000_000
"""Segments of all prompts kept, of 12 bytes each."""


@dataclass(slots=True, eq=False)
class Told:
    """A session of which the file that is written holds a prompt."""

    name: str
    n: int
    """Turns of it in the file."""
    chain: array[int]
    """Of its latest prompt (`gateway.prefix.Prefix`)."""


class Prompts:
    """The latest prompt of each session in the file that is written. Bounded; a session that was
    forgotten is told anew."""

    def __init__(self) -> None:
        self._told: OrderedDict[str, Told] = OrderedDict()
        self._segments = 0

    def __len__(self) -> int:
        return len(self._told)

    def clear(self) -> None:
        self._told.clear()
        self._segments = 0

    def of(self, sid: str) -> Told | None:
        return self._told.get(sid)

    def begin(self, sid: str, name: str) -> Told:
        """The file is told of the session."""
        told = self._told[sid] = Told(name, 0, array("Q"))
        return told

    def forget(self, sid: str) -> None:
        told = self._told.pop(sid, None)
        if told is not None:
            self._segments -= len(told.chain)

    def share(
        self, sid: str, told: Told, chain: array[int], ends: array[int], salted: Salted
    ) -> tuple[int, list[int]]:
        """How many blocks a prompt shares with the session's latest, and its others as runs; it is
        the latest from now on. ``chain`` and ``ends`` as of `gateway.prefix.Prefix`.
        O(log segments) and what is new."""
        last = len(chain) - 1
        same = min(last, _common(told.chain, chain))  # the last one's end may not be full
        shared = blocks = ends[same - 1] // BLOCK_BYTES if same else 0
        fresh: list[int] = []
        for index in range(same, len(chain)):
            end = ends[index] // BLOCK_BYTES
            if index == last and ends[index] % BLOCK_BYTES:
                end += 1  # which is not full
            if end > blocks:
                fresh += (salted.block(chain[index]), end - blocks)
                blocks = end
        self._segments += len(chain) - len(told.chain)
        told.n += 1
        told.chain = chain
        self._told.move_to_end(sid)
        while len(self._told) > MAX_SESSIONS or (
            self._segments > MAX_SEGMENTS and len(self._told) > 1
        ):
            self._segments -= len(self._told.popitem(last=False)[1].chain)
        return shared, fresh


def _common(a: array[int], b: array[int]) -> int:
    """How many links two chains have in common: a link stands for all before it."""
    most = min(len(a), len(b))
    if not most or a[most - 1] == b[most - 1]:
        return most
    return bisect_left(range(most), True, key=lambda i: a[i] != b[i])
