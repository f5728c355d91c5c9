"""What is remembered of gaps: one row a node, in flat arrays, the least recently used out first.

A node is a place in the hierarchy (all shell calls; `go test`; `go test` of this tenant; `go test`
in this session). Its row holds a histogram of the gap and a few moving statistics of its log, both
with exponential forgetting. About 400 bytes a node, all told.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gateway.predictor.grid import BINS

N: Final = 0
MEAN: Final = 1
FAST: Final = 2
LAST: Final = 3
DEV: Final = 4
BEFORE: Final = 5
TRUST: Final = 6
STATS: Final = 7
"""Columns: weight of what was seen, mean and fast mean of log10 s, the last and the one before,
mean absolute deviation, and by how much the node's histogram forecast better than the trained
correction (log likelihood, moving sum)."""

_FIRST_ROWS: Final = 1024
EMPTY_ROW: Final = 0
"""Row of a node that is not there: always zeros."""


class NodeTable:
    """At most ``max_nodes`` nodes. Looking up and adding are O(1)."""

    def __init__(self, max_nodes: int) -> None:
        self.max_nodes = max_nodes
        rows = min(_FIRST_ROWS, max_nodes) + 1
        self.data: NDArray[np.float32] = np.zeros((rows, STATS + BINS), np.float32)
        """A node's statistics, then its histogram."""
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
        return row

    def fill(
        self,
        keys: Sequence[Hashable],
        stats: NDArray[np.float32],
        counts: NDArray[np.float32],
    ) -> None:
        """Take these nodes, least recently used first, in place of all there are."""
        self._rows.clear()
        self._grow(len(keys))
        self.stats[1 : len(keys) + 1] = stats
        self.counts[1 : len(keys) + 1] = counts
        self._rows.update(zip(keys, range(1, len(keys) + 1), strict=True))

    def _grow(self, row: int) -> None:
        rows = min(max(row + row // 2, _FIRST_ROWS), self.max_nodes) + 1
        old = self.data
        self.data = np.zeros((rows, STATS + BINS), np.float32)
        self.data[: len(old)] = old[:rows]
