"""What is remembered of gaps: one row a node, in flat arrays, the least recently used out first.

A node is a place in the hierarchy (all shell calls; `go test`; `go test` of this tenant; `go test`
in this session). Its row holds a histogram of the gap and a few sums of its log, both with
exponential forgetting. About 400 bytes a node, all told.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gateway.predictor.grid import BINS

FAST: Final = 0
OFF_FAST: Final = 1
SLOW_FAST: Final = 2
LAST: Final = 3
BEFORE: Final = 4
TRUST: Final = 5
UNIT: Final = 6
N: Final = 7
SUM: Final = 8
SQUARES: Final = 9
OFF: Final = 10
SLOW: Final = 11
STATS: Final = 12
"""Columns of a node, followed by its histogram. Up to `TRUST` what moves at a pace of its own: fast
means of log10 s, of the surprise against what the shared nodes expected, and of whether the wait
was slow; the last log10 s and the one before; by how much the node's histogram has forecast better
than the trained correction (log likelihood, moving sum). From `N` on sums that fade together: the
weight of what was seen, log10 s and its square, surprises, slow waits, and the histogram. Instead
of fading the old, each new gap weighs more than the one before: sums are in units of `UNIT`, what
the latest gap weighed."""
WIDTH: Final = STATS + BINS
_MAX_UNIT: Final = 1e6

_FAST_RATE: Final = 0.3
_FIRST_ROWS: Final = 1024
EMPTY_ROW: Final = 0
"""Row of a node that is not there: always zeros."""


def _floats(data: NDArray[np.float32]) -> memoryview[float]:
    return data.data.cast("B").cast("f")


class NodeTable:
    """At most ``max_nodes`` nodes. Looking up and adding are O(1)."""

    def __init__(self, max_nodes: int) -> None:
        self.max_nodes = max_nodes
        rows = min(_FIRST_ROWS, max_nodes) + 1
        self.data: NDArray[np.float32] = np.zeros((rows, WIDTH), np.float32)
        """A node's statistics, then its histogram."""
        self.flat = _floats(self.data)
        """The same floats one after another: reading and writing one is cheaper here."""
        self._rows: OrderedDict[Hashable, int] = OrderedDict()
        self.forgotten_total = 0
        self.find = self._rows.get

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[Hashable, int]]:
        """Keys and rows, least recently used first."""
        return iter(self._rows.items())

    @property
    def stats(self) -> NDArray[np.float32]:
        """The statistics of all rows, a view."""
        return self.data[:, :STATS]

    @property
    def counts(self) -> NDArray[np.float32]:
        """The histograms of all rows, a view."""
        return self.data[:, STATS:]

    def touch(self, key: Hashable) -> int:
        """The node's row, made if it is not there, now the most recently used."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
            return row
        if len(self._rows) >= self.max_nodes:
            _, row = self._rows.popitem(last=False)
            self.data[row] = 0
            self.forgotten_total += 1
        else:
            row = len(self._rows) + 1
            if row >= len(self.data):
                self._grow(row)
        self._rows[key] = row
        self.flat[row * WIDTH + UNIT] = 1.0
        return row

    def add(self, row: int, keep: float, log_gap: float, bin_: int) -> float:
        """Count a gap into a node's sums, what is there fading by ``keep``. Returns the rate, the
        new gap's share in the node's weight."""
        flat = self.flat
        at = row * WIDTH
        unit = flat[at + UNIT] / keep
        if unit > _MAX_UNIT:
            self.normalise(row)
            unit = 1.0 / keep
        n = flat[at + N] + unit
        flat[at + UNIT] = unit
        flat[at + N] = n
        flat[at + SUM] += unit * log_gap
        flat[at + SQUARES] += unit * log_gap * log_gap
        flat[at + STATS + bin_] += unit
        return unit / n

    def add_session(
        self, row: int, keep: float, log_gap: float, bin_: int, surprise: float, slow: float
    ) -> None:
        """`add`, for a session's node, which also follows the latest gaps and surprises."""
        share = self.add(row, keep, log_gap, bin_)
        rate = share if share > _FAST_RATE else _FAST_RATE
        flat = self.flat
        at = row * WIDTH
        unit = flat[at + UNIT]
        flat[at + FAST] += (log_gap - flat[at + FAST]) * rate
        flat[at + OFF_FAST] += (surprise - flat[at + OFF_FAST]) * rate
        flat[at + OFF] += unit * surprise
        if slow:
            flat[at + SLOW] += unit
        flat[at + SLOW_FAST] += (slow - flat[at + SLOW_FAST]) * rate
        flat[at + BEFORE] = flat[at + LAST]
        flat[at + LAST] = log_gap

    def normalise(self, rows: int | Sequence[int]) -> None:
        """Make `UNIT` 1, so that sums count gaps."""
        units = self.data[rows, UNIT]
        self.data[rows, N:] /= units[..., None]
        self.data[rows, UNIT] = 1.0

    def fill(
        self,
        keys: Sequence[Hashable],
        stats: NDArray[np.float32],
        counts: NDArray[np.float32],
    ) -> None:
        """Take these nodes, least recently used first, in place of all there are."""
        self._rows.clear()
        self.data[:] = 0
        self._grow(len(keys))
        self.stats[1 : len(keys) + 1] = stats
        self.counts[1 : len(keys) + 1] = counts
        self._rows.update(zip(keys, range(1, len(keys) + 1), strict=True))

    def _grow(self, row: int) -> None:
        rows = min(max(row + row // 2, _FIRST_ROWS), self.max_nodes) + 1
        old = self.data
        self.data = np.zeros((rows, WIDTH), np.float32)
        self.data[: len(old)] = old[:rows]
        self.flat = _floats(self.data)
