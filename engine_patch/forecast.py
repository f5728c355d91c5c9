"""When a session will need its KV again: a survival curve, read as a rate of reuse.

The queue compares very different blocks (a tool that returns in a second, a human who may never
come back, anonymous traffic known only by its age), so everything is brought to one unit: reuses
per second of cache time spent waiting.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

# Below this the curve's last point says nothing any more: a session later than its whole forecast
# is late, not dead (1 % is the resolution of a curve learned from a few hundred gaps).
_TAIL_FLOOR = 0.01
_MIN_ELAPSED_S = 1e-3


@dataclass(frozen=True, slots=True)
class Forecast:
    """P(gap > t) of a session that returns, and the chance that it returns at all.

    Args:
        survival: points `(t_s, p)`, `t_s` rising from 0 or later, `p` falling in [0, 1]; linear
            between points, from `(0, 1)`. Beyond the last point `p` falls as 1/t, the heavy tail
            of agents' gaps.
        p_return: P(the session ever returns), in [0, 1].
    """

    survival: tuple[tuple[float, float], ...]
    p_return: float

    @property
    def last_s(self) -> float:
        """Time of the curve's last point, seconds."""
        return self.survival[-1][0] if self.survival else 0.0

    def survival_at(self, t_s: float) -> float:
        """P(gap > t_s | the session returns)."""
        if not self.survival or t_s >= self.last_s:
            last_s, p = self.survival[-1] if self.survival else (0.0, 1.0)
            last_s = max(last_s, _MIN_ELAPSED_S)
            return max(p, _TAIL_FLOOR) * last_s / max(t_s, last_s)
        i = bisect_left(self.survival, (t_s,))
        t1, p1 = self.survival[i]
        t0, p0 = self.survival[i - 1] if i else (0.0, 1.0)
        if t1 <= t0:
            return max(p1, _TAIL_FLOOR)
        return max(p0 + (p1 - p0) * (t_s - t0) / (t1 - t0), _TAIL_FLOOR)

    def reuse_rate(self, elapsed_s: float) -> float:
        """Reuses per second of residency, given that `elapsed_s` have passed without a return.

        The Gittins index of keeping the blocks: the best over all horizons h of
        `P(returns within h) / E[time kept, at most h]`, both conditioned on the time already
        waited (Gittins 1979; as a cache's hit density: Beckmann, Chen & Cidon, LHD, NSDI 2018).
        A return after exactly g seconds gives 1/(g - elapsed), which orders as Belady; a gap
        longer than all forecast gives P(returns)/elapsed, which orders as LRU.
        """
        p_return = self.p_return
        if p_return <= 0:
            return 0.0
        gone = 1 - p_return
        elapsed_s = max(elapsed_s, _MIN_ELAPSED_S)
        still_out = p_return * self.survival_at(elapsed_s)
        absent = still_out + gone
        last_s = max(self.last_s, _MIN_ELAPSED_S)
        if elapsed_s >= last_s:  # the hazard only falls from here on: its value now is the best
            return still_out / absent / elapsed_s
        best = kept_s = 0.0
        t0, p0 = elapsed_s, absent
        for t, survival in self.survival[bisect_left(self.survival, (elapsed_s,)) :]:
            if t <= t0:
                continue
            p = p_return * max(survival, _TAIL_FLOOR) + gone
            kept_s += (p0 + p) / 2 * (t - t0)
            best = max(best, (absent - p) / kept_s)
            t0, p0 = t, p
        tail = p_return * self.survival_at(last_s) * last_s
        for growth in (1.1, 2, 2, 2, 2):
            kept_s += tail * math.log(growth) + gone * t0 * (growth - 1)
            t0 *= growth
            best = max(best, (absent - tail / t0 - gone) / kept_s)
        return best


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
