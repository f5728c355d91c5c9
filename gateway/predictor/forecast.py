"""A forecast: the distribution of one gap, as seen at its start."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

import numpy as np

from gateway.predictor.grid import BINS, EDGES, EDGES_S, FLOOR_S, LAST_S, log_s
from gateway.predictor.warp import KNOTS, Curve, calibrated, stated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gateway.predictor.model import Basis

HORIZON_S: Final = 86_400.0
"""`Forecast.expected_remaining` counts no more than this beyond the time already waited."""
_LATE_POWER: Final = 0.7
_NEVER_S: Final = 1e10
_TAIL: Final = 1e-3
_TAIL_SCALE_S: Final = 600.0


_BELOW: Final = np.tri(BINS, BINS, -1, dtype=np.float32)
"""Row ``i`` picks the bins below ``i``."""


class Forecast:
    """When, and whether, an idle session comes back. Immutable; all times in seconds since the gap
    began, but for what is said to be *remaining*.

    The curve is a histogram on `gateway.predictor.grid`, uniform in log time within a bin. Below
    it lies a tail ``0.001 x 600 / (600 + t)``, so that a wait longer than anything ever seen still
    has a future: the longer it has lasted, the longer it will.
    """

    __slots__ = ("_survival", "basis", "idle_kind", "masses", "offset_s", "p_return", "warp")

    def __init__(
        self,
        masses: NDArray[np.float32],
        p_return: float,
        idle_kind: str,
        offset_s: float = 0.0,
        basis: Basis | None = None,
        warp: Curve | None = None,
    ) -> None:
        self.masses = masses
        """P(gap in bin | it returns) before calibration, shape ``(BINS,)``, sums to 1."""
        self.p_return = p_return
        """P(the session ever returns), at the gap's start."""
        self.idle_kind = idle_kind
        self.offset_s = offset_s
        """Client's own time on top of the tools', by which the curve is shifted."""
        self.basis = basis
        """What `Predictor.observe` needs to learn from the outcome."""
        self.warp = warp
        """Calibration of ``masses`` (`gateway.predictor.warp`)."""
        self._survival: list[float] | None = None

    def _at_edges(self) -> list[float]:
        """P(gap > edge) at each edge of the grid."""
        found = self._survival
        if found is None:
            below = np.cumsum(self.masses)
            found = self._survival = [1.0, *(1.0 - below / below[-1]).tolist()]
        return found

    def stated(self, t_s: float) -> float:
        """P(gap <= ``t_s`` | the session returns) before calibration and without the tail."""
        t_s -= self.offset_s
        if t_s <= FLOOR_S:
            return 0.0
        if t_s >= LAST_S:
            return 1.0
        log_t = log_s(t_s)
        i = bisect_right(EDGES, log_t) - 1
        within = (log_t - EDGES[i]) / (EDGES[i + 1] - EDGES[i])
        at = self._survival
        if at is None:  # asked once, the sum is cheaper than the whole curve
            return min(1.0, float(self.masses @ _BELOW[i]) + float(self.masses[i]) * within)
        return 1.0 - at[i] - (at[i + 1] - at[i]) * within

    def reached(self, t_s: float) -> float:
        """How far up the distribution a gap of ``t_s`` fell, before calibration. One too short for
        the grid fell somewhere in the lowest bin: it counts as its middle (mid-P)."""
        if t_s - self.offset_s <= FLOOR_S:
            return float(self.masses[0]) / 2
        return self.stated(t_s)

    def survival(self, t_s: float) -> float:
        """P(gap > ``t_s`` | the session returns)."""
        self._at_edges()
        reached = self.stated(t_s)
        if self.warp is not None:
            reached = calibrated(self.warp, reached)
        after_s = max(0.0, t_s - self.offset_s)
        return max(1.0 - reached, _TAIL * _TAIL_SCALE_S / (_TAIL_SCALE_S + after_s))

    def survival_given(self, t_s: float, elapsed_s: float) -> float:
        """P(gap > ``t_s`` | gap > ``elapsed_s``, the session returns), for ``t_s`` from then on.

        The less of the forecast's own curve is left, the less it is worth: an unlikely long wait
        is mostly one for another reason (a person was asked, a machine is stuck), and these last
        about as long again as they have lasted. So the curve counts for ``survival(elapsed_s)``,
        and for the rest a power law of the whole wait.
        """
        alive = self.survival(elapsed_s)
        late = math.pow((elapsed_s + 1.0) / (max(t_s, elapsed_s) + 1.0), _LATE_POWER)
        return min(alive, self.survival(t_s)) + (1.0 - alive) * late

    def quantile(self, p: float, elapsed_s: float = 0.0) -> float:
        """Time that remains with probability ``p`` at most, once ``elapsed_s`` have been waited,
        if the session returns. ``p`` in (0, 1)."""
        if elapsed_s <= 0:
            return self._time_at(1.0 - p)
        target = 1.0 - p
        low, high = elapsed_s, 2.0 * elapsed_s + 1.0
        while self.survival_given(high, elapsed_s) > target and high < _NEVER_S:
            low, high = high, 4.0 * high
        for _ in range(40):
            middle = (low + high) / 2
            if high - low < 1e-3 * (high - elapsed_s):
                break
            if self.survival_given(middle, elapsed_s) > target:
                low = middle
            else:
                high = middle
        return (low + high) / 2 - elapsed_s

    def _time_at(self, target: float) -> float:
        """The time at which the survival curve falls to ``target``."""
        wanted = target
        if self.warp is not None:
            wanted = 1.0 - stated(self.warp, 1.0 - target)
        at = self._at_edges()
        i = bisect_left(at, -wanted, key=lambda value: -value)
        if i == 0:
            found = FLOOR_S
        elif i > BINS:
            found = LAST_S
        else:
            high, low = at[i - 1], at[i]
            within = (high - wanted) / (high - low) if high > low else 1.0
            found = 10 ** (EDGES[i - 1] + (EDGES[i] - EDGES[i - 1]) * within)
        tail = _TAIL * _TAIL_SCALE_S / target - _TAIL_SCALE_S if target > 0 else LAST_S
        return max(found, min(tail, 1e9)) + self.offset_s

    @property
    def median_s(self) -> float:
        """The gap's median, if the session returns."""
        return self._time_at(0.5)

    @property
    def typical_log_s(self) -> float:
        """log10 of the gap in seconds, if the session returns: a mean of the quartiles and, twice,
        the 60 % quantile, which tells best which of two sessions is back later (Tukey's trimean has
        the median there; with these skewed gaps it ranks a little worse)."""
        low, middle, high = (log_s(self._time_at(left)) for left in (0.75, 0.4, 0.25))
        return (low + 2 * middle + high) / 4

    def expected_remaining(self, elapsed_s: float = 0.0) -> float:
        """Expected time until the return, once ``elapsed_s`` have been waited, if the session
        returns. Bounded: a return later than `HORIZON_S` from now counts as `HORIZON_S`; sessions
        that never return are left to `p_return_given`."""
        alive = self.survival(elapsed_s)
        area = 0.0
        t, s = elapsed_s, alive
        end = elapsed_s + HORIZON_S
        for edge_s in EDGES_S[bisect_right(EDGES_S, elapsed_s - self.offset_s) :]:
            edge_s += self.offset_s
            if edge_s >= end:
                break
            p = self.survival(edge_s)
            area += (s + p) / 2 * (edge_s - t)
            t, s = edge_s, p
        while t < end:  # beyond the grid the tail falls slowly: a few growing steps
            step = min(2.0 * t + 1.0, end)
            p = self.survival(step)
            area += (s + p) / 2 * (step - t)
            t, s = step, p
        rest = 1.0 - _LATE_POWER
        since = elapsed_s + 1.0
        late = (
            math.pow(since, _LATE_POWER)
            * (math.pow(since + HORIZON_S, rest) - math.pow(since, rest))
            / rest
        )
        return area + (1.0 - alive) * late

    def p_return_given(self, elapsed_s: float) -> float:
        """P(the session ever returns), once ``elapsed_s`` have been waited in vain."""
        out = self.p_return * self.survival(elapsed_s)
        gone = 1.0 - self.p_return
        return out / (out + gone) if gone > 0 else 1.0

    def curve(self, max_points: int = 32) -> list[tuple[float, float]]:
        """Points ``(t_s, P(gap > t_s | returns))`` for a hint, ``t_s`` rising, ``p`` falling, at
        most ``max_points``: where the curve falls; straight lines between them."""
        points: list[tuple[float, float]] = []
        before = 1.0
        at = self._at_edges()
        if self.warp is not None:
            at = (1.0 - np.interp(1.0 - np.array(at), KNOTS, self.warp)).tolist()
        for edge_s, p in zip(EDGES_S[1:], at[1:], strict=True):
            p = max(p, _TAIL * _TAIL_SCALE_S / (_TAIL_SCALE_S + edge_s))
            if before - p > 0.002:
                points.append((edge_s + self.offset_s, p))
                before = p
        if not points:
            points.append((EDGES_S[1] + self.offset_s, before))
        while len(points) > max_points:  # drop the point that bends the curve least
            least = min(
                range(len(points) - 1),
                key=lambda i: (points[i - 1][1] if i else 1.0) - points[i + 1][1],
            )
            del points[least]
        return points
