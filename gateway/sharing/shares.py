"""How replicas of the gateway share a pod's budget: none gives away what others hold or are due.

What the pods' places may have in all is divided by max-min fairness over what each replica holds
and would have: a replica that wants less than an equal part gets what it wants, and what it leaves
is divided among the rest. A replica that holds less than its part is waited for: what others give
up goes to it. The oldest claim of a due turn goes before the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.sharing.news import Share


def parts(budget: float, demands: Sequence[float]) -> list[float]:
    """The max-min fair parts of a budget (Bertsekas & Gallager, Data Networks, 6.5.2). They sum to
    the budget, or to the demands where those are less."""
    got = [0.0] * len(demands)
    left = budget
    order = sorted(range(len(demands)), key=lambda i: demands[i])
    for place, i in enumerate(order):
        got[i] = min(demands[i], max(0.0, left) / (len(order) - place))
        left -= got[i]
    return got


def kept_for_others(
    budget: float, me: str, own: Share, others: Iterable[tuple[str, Share]]
) -> float:
    """Tokens of a pod's budget that replica ``me`` must leave alone. With every replica keeping to
    it places exceed the budget only by what was given away since they last heard of each other."""
    others = list(others)
    if not others:
        return 0.0
    fair = parts(budget, [s.agent_tokens + s.wanted_tokens for s in (own, *(s for _, s in others))])
    mine = (own.claim_age_s, me) if own.claim_tokens else (-1.0, "")
    oldest = max(((s.claim_age_s, name) for name, s in others if s.claim_tokens), default=None)
    kept = 0.0
    for (name, share), part in zip(others, fair[1:], strict=True):
        claimed = 0.0
        if oldest is not None and oldest > mine and oldest[1] == name:
            claimed = share.agent_tokens + share.claim_tokens
        kept += max(share.agent_tokens, part, claimed)
    return kept
