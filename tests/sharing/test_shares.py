"""How replicas divide a pod's budget."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.sharing.news import Share
from gateway.sharing.shares import kept_for_others, parts

tokens = st.integers(0, 1_000_000)
shares = st.builds(Share, agent_tokens=tokens, wanted_tokens=tokens)
fleets = st.lists(shares, min_size=1, max_size=6)


@given(st.integers(1, 1_000_000), st.lists(tokens, min_size=1, max_size=8))
def test_parts_are_max_min_fair(budget: int, demands: list[int]) -> None:
    got = parts(budget, demands)
    assert sum(got) == pytest.approx(min(budget, sum(demands)))
    most = max(got)
    for part, demand in zip(got, demands, strict=True):
        assert 0 <= part <= demand
        # Who gets less than it wants gets as much as anybody.
        assert part == pytest.approx(demand) or part == pytest.approx(most)


def rooms(budget: float, fleet: list[Share]) -> list[float]:
    """What each replica may have on the pod by its own reckoning."""
    named = [(f"r{n}", share) for n, share in enumerate(fleet)]
    return [
        budget - kept_for_others(budget, name, own, [other for other in named if other[0] != name])
        for name, own in named
    ]


@given(st.integers(1_000, 1_000_000), fleets)
def test_a_replica_alone_or_with_enough_for_all_is_not_held_back(
    budget: int, fleet: list[Share]
) -> None:
    demands = [share.agent_tokens + share.wanted_tokens for share in fleet]
    if len(fleet) == 1:
        assert rooms(budget, fleet) == [budget]
    elif sum(demands) <= budget:
        for room, demand in zip(rooms(budget, fleet), demands, strict=True):
            assert room >= demand - 1e-6


@given(st.integers(10_000, 1_000_000), fleets)
@settings(max_examples=200)
def test_taking_turns_the_budget_is_kept_and_everybody_comes_to_a_fair_part(
    budget: int, fleet: list[Share]
) -> None:
    """Each round a replica gives up a tenth of its places and takes what it may; all hear of it."""
    wants = [share.agent_tokens + share.wanted_tokens for share in fleet]
    fleet = [Share(min(s.agent_tokens, budget // len(fleet)), 0, 0) for s in fleet]
    placed = [share.agent_tokens for share in fleet]
    for _ in range(60):
        for n, want in enumerate(wants):
            placed[n] = int(0.9 * placed[n])
            now = [Share(p, wanted_tokens=w - p) for p, w in zip(placed, wants, strict=True)]
            room = rooms(budget, now)[n]
            placed[n] = int(max(placed[n], min(want, room)))
            assert sum(placed) <= budget + 1
    for got, want, fair in zip(placed, wants, parts(budget, wants), strict=True):
        assert got >= min(want, 0.85 * fair) - len(wants) * 2


def test_a_turn_that_is_due_is_waited_for_beyond_its_replicas_part() -> None:
    big = Share(agent_tokens=0, wanted_tokens=90, claim_tokens=90, claim_age_s=5)
    full = Share(agent_tokens=80, wanted_tokens=500)
    room = 100 - kept_for_others(100, "a", full, [("b", big)])
    assert room == 10
    older = Share(agent_tokens=80, wanted_tokens=500, claim_tokens=60, claim_age_s=9)
    assert 100 - kept_for_others(100, "a", older, [("b", big)]) == 50  # b waits for a


def test_of_claims_of_one_age_only_one_is_waited_for() -> None:
    claim = Share(agent_tokens=0, wanted_tokens=90, claim_tokens=90, claim_age_s=5)
    kept = {
        me: kept_for_others(100, me, claim, [(other, claim)])
        for me, other in (("a", "b"), ("b", "a"))
    }
    assert sorted(kept.values()) == [50, 90]
