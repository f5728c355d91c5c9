"""When a session will need its KV again: a survival curve, read as a rate of reuse.

The queue compares very different blocks (a tool that returns in a second, a human who may never
come back, anonymous traffic known only by its age), so everything is brought to one unit: reuses
per second of cache time spent waiting.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

# Below this the curve's last point says nothing any more: a session later than its whole forecast
# is late, not dead (1 % is the resolution of a curve learned from a few hundred gaps).
_TAIL_FLOOR = 0.01
_MIN_ELAPSED_S = 1e-3
_RESOLUTION_S = 1e-4


class Forecast:
    """P(gap > t) of a session that returns, and the chance that it returns at all.

    Args:
        survival: points `(t_s, p)`, `t_s` rising from 0 or later, `p` falling in [0, 1]; linear
            between points, from `(0, 1)`. Beyond the last point, and from where it reaches 1 %,
            `p` falls as 1/t, the heavy tail of agents' gaps.
        p_return: P(the session ever returns), in [0, 1].
    """

    # Flat tuples of numbers: there is one forecast a session, and the collector skips these.
    __slots__ = ("_horizons", "_survival", "_times_s", "p_return")

    def __init__(self, survival: Sequence[tuple[float, float]], p_return: float) -> None:
        self.p_return = p_return
        times_s, falls = [0.0], [1.0]
        for t, p in survival:
            if falls[-1] <= _TAIL_FLOOR:
                break  # what little is left is the tail's
            if t - times_s[-1] >= _RESOLUTION_S:
                times_s.append(t)
                falls.append(max(p, _TAIL_FLOOR))
            elif len(times_s) > 1:  # a curve has a resolution: this is the same point
                falls[-1] = max(p, _TAIL_FLOOR)
        self._times_s = tuple(times_s)
        self._survival = tuple(falls)
        self._horizons: tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]] | None = None

    @property
    def last_s(self) -> float:
        """Time of the curve's last point, seconds."""
        return self._times_s[-1]

    def survival_at(self, t_s: float) -> float:
        """P(gap > t_s | the session returns)."""
        last_s = max(self._times_s[-1], _MIN_ELAPSED_S)
        if t_s >= last_s:
            return self._survival[-1] * last_s / t_s
        i = bisect_right(self._times_s, t_s)
        t0, t1 = self._times_s[i - 1 : i + 1]
        p0, p1 = self._survival[i - 1 : i + 1]
        return p0 + (p1 - p0) * (t_s - t0) / (t1 - t0)

    def reuse_rate(self, elapsed_s: float) -> float:
        """Reuses per second of residency, given that `elapsed_s` have passed without a return.

        The Gittins index of keeping the blocks: the best over all horizons h of
        `P(returns within h) / E[time kept, at most h]`, both conditioned on the time already
        waited (Gittins 1979; as a cache's hit density: Beckmann, Chen & Cidon, LHD, NSDI 2018).
        A return after exactly g seconds gives 1/(g - elapsed), which orders as Belady; a gap
        longer than all forecast gives P(returns)/elapsed, which orders as LRU.

        The curve's points are prepared once; then a call costs O(log points).
        """
        if self.p_return <= 0:
            return 0.0
        elapsed_s = max(elapsed_s, _MIN_ELAPSED_S)
        times_s = self._times_s
        if elapsed_s >= times_s[-1]:
            # The hazard only falls from here on: its value now is the best.
            still_out = self.p_return * self.survival_at(elapsed_s)
            return still_out / (still_out + 1 - self.p_return) / elapsed_s
        if self._horizons is None:
            self._horizons = self._prepare()
        kept_s, absent, following = self._horizons
        i = bisect_right(times_s, elapsed_s)
        waited_s = elapsed_s - times_s[i - 1]
        p0, p1 = absent[i - 1], absent[i]
        p = p0 + (p1 - p0) * waited_s / (times_s[i] - times_s[i - 1])
        kept = kept_s[i - 1] + (p0 + p) / 2 * waited_s
        rate = 0.0
        while i >= 0:
            if kept_s[i] > kept:  # else the point is now, to the last digit
                better = (p - absent[i]) / (kept_s[i] - kept)
                if better < rate:
                    break
                rate = better
            i = following[i]
        return rate

    def _prepare(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
        """For each point of the curve and some beyond: E[time kept until then], P(not back by
        then), and the best horizon after it (the index of a point; -1 after the last).

        In the plane of the first two the index is the steepest slope to a later point: the edge
        of the upper hull of all that follow. One pass from the end, O(points).
        """
        p_return, gone = self.p_return, 1 - self.p_return
        kept_s, absent = [0.0], [1.0]
        t0 = kept = 0.0
        for t, survival in zip(self._times_s[1:], self._survival[1:], strict=True):
            p = p_return * survival + gone
            kept += (absent[-1] + p) / 2 * (t - t0)
            kept_s.append(kept)
            absent.append(p)
            t0 = t
        tail = p_return * self._survival[-1] * t0
        for growth in (1.1, 1.3, 1.5, 2, 2, 2):
            kept += tail * math.log(growth) + gone * t0 * (growth - 1)
            t0 *= growth
            kept_s.append(kept)
            absent.append(tail / t0 + gone)
        following = [-1] * len(kept_s)
        for i in range(len(kept_s) - 2, -1, -1):
            kept, p = kept_s[i], absent[i]
            best = i + 1
            while (beyond := following[best]) >= 0 and (p - absent[beyond]) * (
                kept_s[best] - kept
            ) >= (p - absent[best]) * (kept_s[beyond] - kept):
                best = beyond
            following[i] = best
        return tuple(kept_s), tuple(absent), tuple(following)


def recompute_cost(context_tokens: float, parity_tokens: float) -> float:
    """Prefill cost of one token after `context_tokens` others, in units of the first token's.

    A dense transformer spends `2 x params` FLOPs a token on its weights and
    `4 x layers x width x context` on attention (Kaplan et al. 2020, section 2.1), so the cost is
    `1 + context / parity` with `parity = params / (2 x layers x width)` tokens: the context at
    which attention costs as much as the weights.
    """
    return 1 + context_tokens / parity_tokens


def attention_parity_tokens(hidden_size: int) -> float:
    """`parity_tokens` from the model's width, with `params = 12 x layers x width^2` (ibid.)."""
    return 6.0 * hidden_size
