"""What was learned of gaps in a while, as plain sums, for other replicas of the gateway to add to
what they know.

Sums merge in any order and any grouping. What fades in a table does not fade here: n gaps told at
once fade what was there before as n gaps one by one do, and each counts as their mean weight,

    gain = (1 - keep^n) / ((1 - keep) n)

so that a table's weights come out as if it had seen them all itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from gateway.predictor.grid import BINS
from gateway.predictor.warp import BINS as WARP_BINS
from gateway.predictor.warp import Warp

VERSION: Final = 1
MAX_NODES: Final = 5_000
MAX_BYTES: Final = 4 * 1024 * 1024
MAX_GAPS: Final = 1e6
_MAX_WORD_CHARS: Final = 64
_MAX_WORDS: Final = 5
_MAX_NAMES: Final = 1_000

GAPS: Final = 0
LOGS: Final = 1
LOG_SQUARES: Final = 2
BETTER: Final = 3
HEAD: Final = 4
"""Of a node's row: gaps, sums of log10 s and its square, by how much the histogram has forecast
better than the correction. From `HEAD` on, the histogram."""


class DeltaError(ValueError):
    """Bytes that are no delta, or of another version."""


class _Wire(msgspec.Struct, array_like=True, frozen=True):
    version: int
    gaps: int
    keys: tuple[tuple[str, ...], ...]
    heads: bytes
    """float32, `HEAD` a key."""
    places: bytes
    """uint32: key × BINS + bin, of each bin that is not empty."""
    masses: bytes
    """float32, what is in it."""
    returns: dict[str, tuple[float, float]]
    warps: dict[str, tuple[float, ...]]
    overheads: dict[str, tuple[float, float]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Wire).decode


@dataclass(slots=True)
class Delta:
    """Sums over the gaps noted. At most `MAX_NODES` nodes; what is noted of more is left out."""

    gaps: int = 0
    nodes: dict[tuple[str, ...], NDArray[np.float32]] = field(default_factory=dict)
    returns: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Sessions that came back, that did not."""
    warps: dict[str, list[float]] = field(default_factory=dict)
    overheads: dict[str, list[float]] = field(default_factory=dict)
    """Times a client's own time was seen, the sum of its log10 s."""

    def __bool__(self) -> bool:
        return self.gaps > 0

    def gap(self, keys: Sequence[Hashable], log_gap: float, bin_: int, better: float) -> None:
        """A gap of some nodes."""
        for key in keys:
            row = self._row(key)
            if row is not None:
                row[GAPS] += 1
                row[LOGS] += log_gap
                row[LOG_SQUARES] += log_gap * log_gap
                row[BETTER] += better
                row[HEAD + bin_] += 1

    def masses(self, key: Hashable, masses: NDArray[np.float32], log_gap: float | None) -> None:
        """A gap of which only a distribution is known; ``log_gap`` is None where it has not
        ended."""
        row = self._row(key)
        if row is not None:
            row[GAPS] += masses.sum()
            row[HEAD:] += masses
            if log_gap is not None:
                row[LOGS] += log_gap
                row[LOG_SQUARES] += log_gap * log_gap

    def returned(self, place: tuple[str, str], returned: bool) -> None:
        counts = self.returns.setdefault(place, [0.0, 0.0])
        counts[0 if returned else 1] += 1

    def reached(self, place: str, stated: float) -> None:
        """A gap ended at this probability of its forecast."""
        counts = self.warps.setdefault(place, [0.0] * WARP_BINS)
        counts[Warp.bin_of(stated)] += 1

    def overhead(self, client: str, log_seconds: float) -> None:
        counts = self.overheads.setdefault(client, [0.0, 0.0])
        counts[0] += 1
        counts[1] += log_seconds

    def _row(self, key: Hashable) -> NDArray[np.float32] | None:
        assert isinstance(key, tuple)
        row = self.nodes.get(key)
        if row is None and len(self.nodes) < MAX_NODES:
            row = self.nodes[key] = np.zeros(HEAD + BINS, np.float32)
        return row

    def merge(self, other: Delta) -> None:
        """Add another delta's sums."""
        self.gaps += other.gaps
        for key, theirs in other.nodes.items():
            row = self._row(key)
            if row is not None:
                row += theirs
        _add_up(self.returns, other.returns)
        _add_up(self.warps, other.warps)
        _add_up(self.overheads, other.overheads)

    def pack(self) -> bytes:
        keys = tuple(self.nodes)
        rows = np.array(list(self.nodes.values()), np.float32).reshape(len(keys), HEAD + BINS)
        masses = rows[:, HEAD:].reshape(-1)
        places = np.flatnonzero(masses)
        return _encode(
            _Wire(
                VERSION,
                self.gaps,
                keys,
                np.ascontiguousarray(rows[:, :HEAD]).tobytes(),
                places.astype(np.uint32).tobytes(),
                masses[places].tobytes(),
                {"\t".join(place): (a, b) for place, (a, b) in self.returns.items()},
                {name: tuple(counts) for name, counts in self.warps.items()},
                {name: (n, total) for name, (n, total) in self.overheads.items()},
            )
        )

    @classmethod
    def unpack(cls, data: bytes) -> Delta:
        """Raises `DeltaError`."""
        if len(data) > MAX_BYTES:
            raise DeltaError("too long")
        try:
            wire = _decode(data)
            heads = np.frombuffer(wire.heads, np.float32).reshape(-1, HEAD)
            places = np.frombuffer(wire.places, np.uint32)
            masses = np.frombuffer(wire.masses, np.float32)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise DeltaError(type(error).__name__) from None
        if wire.version != VERSION:
            raise DeltaError(f"version {wire.version}")
        _check(wire, heads, places, masses)
        rows = np.zeros((len(wire.keys), HEAD + BINS), np.float32)
        rows[:, :HEAD] = heads
        np.add.at(rows, (places // BINS, HEAD + places % BINS), masses)
        made = cls(wire.gaps, dict(zip(wire.keys, rows, strict=True)))
        for name, pair in wire.returns.items():
            idle_kind, _, kind = name.partition("\t")
            made.returns[idle_kind, kind] = list(pair)
        made.warps = {name: list(counts) for name, counts in wire.warps.items()}
        made.overheads = {name: list(pair) for name, pair in wire.overheads.items()}
        return made


def faded(keep: float, n: float) -> tuple[float, float]:
    """What remains of the old after n gaps, and the mean weight of these."""
    kept: float = keep**n
    return kept, (1 - kept) / ((1 - keep) * n) if n > 0 else 1.0


_Key = TypeVar("_Key")


def _add_up(mine: dict[_Key, list[float]], more: dict[_Key, list[float]]) -> None:
    for name, counts in more.items():
        known = mine.get(name)
        mine[name] = [a + b for a, b in zip(known, counts, strict=True)] if known else list(counts)


def _check(wire: _Wire, heads: Any, places: Any, masses: Any) -> None:
    names = (*wire.returns, *wire.warps, *wire.overheads)
    numbers = [
        *(x for pair in wire.returns.values() for x in pair),
        *(x for counts in wire.warps.values() for x in counts),
        *(n for n, _ in wire.overheads.values()),
        wire.gaps,
    ]
    if not (
        len(wire.keys) == len(heads) <= MAX_NODES
        and len(set(wire.keys)) == len(wire.keys)
        and len(names) <= _MAX_NAMES
        and all(len(name) <= 2 * _MAX_WORD_CHARS for name in names)
        and all(0 < len(key) <= _MAX_WORDS for key in wire.keys)
        and all(len(word) <= _MAX_WORD_CHARS for key in wire.keys for word in key)
        and len(places) == len(masses)
        and (not len(places) or int(places.max()) < len(wire.keys) * BINS)
        and all(len(counts) == WARP_BINS for counts in wire.warps.values())
    ):
        raise DeltaError("parts that do not fit together")
    logs = [total for _, total in wire.overheads.values()]
    if not (
        all(0 <= number <= MAX_GAPS for number in numbers)
        and all(abs(total) <= 1e7 for total in logs)
        and np.isfinite(heads).all()
        and (np.abs(heads) <= 100 * MAX_GAPS).all()
        and (heads[:, GAPS] >= 0).all()
        and (heads[:, GAPS] <= MAX_GAPS).all()
        and np.isfinite(masses).all()
        and ((masses >= 0) & (masses <= MAX_GAPS)).all()
    ):
        raise DeltaError("numbers that cannot be")
