"""The trained correction: oblivious gradient-boosted trees, as flat arrays.

Each tree asks the same question at each of its levels, so all of a call's answers are one gather,
one comparison and one `packbits`; the leaves' scores, one for each bin of the grid, are summed and
their softmax is the distribution of the gap. Trained by `gateway.predictor.train` with CatBoost
(Prokhorenkova et al., NeurIPS 2018), which is not needed to evaluate them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from gateway.predictor.grid import BINS

LEVELS: Final = 8
"""Questions a tree may ask: a byte's bits."""

MAX_SCORE: Final = 80.0
"""Bound of all scores' sum, so that no exponential overflows."""
_ONES: Final = np.ones(BINS, np.float32)


class Correction:
    """Trees over a vector of features.

    Args:
        columns: feature asked at each level, shape ``(trees, depth)``.
        borders: what it must exceed, same shape; level 0 is the leaf index's lowest bit.
        leaves: scores, shape ``(trees, 2 ** depth, BINS)``.
        bias: scores before any tree, shape ``(BINS,)``.
    """

    def __init__(
        self,
        columns: NDArray[np.int16],
        borders: NDArray[np.float32],
        leaves: NDArray[np.float16],
        bias: NDArray[np.float32],
    ) -> None:
        trees, depth = columns.shape
        if depth > LEVELS or leaves.shape != (trees, 1 << depth, BINS) or bias.shape != (BINS,):
            raise ValueError("trees do not fit the grid")
        if not np.abs(leaves.astype(np.float32)).max(axis=(1, 2)).sum() < MAX_SCORE:
            raise ValueError("the trees' scores are too large")
        self.columns, self.borders, self.leaves, self.bias = columns, borders, leaves, bias
        padded = np.zeros((trees, LEVELS), np.intp)
        padded[:, :depth] = columns
        limits = np.full((trees, LEVELS), np.inf, np.float32)
        limits[:, :depth] = borders
        self._columns = np.ascontiguousarray(padded).ravel()
        self._limits = np.ascontiguousarray(limits).ravel()
        self._offsets = np.arange(trees, dtype=np.intp) << depth
        self._scores = np.ascontiguousarray(leaves.reshape(-1, BINS).astype(np.float32))
        self._ones = np.ones(trees, np.float32)

    @property
    def features(self) -> int:
        """How many features it asks about, at the least."""
        return int(self.columns.max()) + 1

    def masses(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """P(gap in bin), shape ``(BINS,)``."""
        above = x.take(self._columns) > self._limits
        leaf = np.packbits(above, bitorder="little") + self._offsets
        scores: NDArray[np.float32] = self._ones @ self._scores.take(leaf, axis=0)
        scores += self.bias
        np.exp(scores, out=scores)
        scores /= scores @ _ONES
        return scores
