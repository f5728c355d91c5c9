"""Choosing a pod: the formula, its tie-breaks, the other policies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.fleet.ledger import Ledger
from gateway.fleet.pod import Pod, PrefillRate
from gateway.routing import (
    BALANCE,
    COMPANY,
    FOLLOW_TOKENS,
    NEARLY_S,
    STAY_S,
    Arrival,
    Decision,
    Policy,
    choose,
    rendezvous,
)

RATE = 10_000.0
"""Tokens a second of the pods made here."""
TURN_S = 0.1
"""Mean prefill seconds of their turns: what one session living there adds for a newcomer."""


def pod(
    name: str,
    *,
    queued: int = 0,
    in_flight: int = 0,
    rate: float = RATE,
    resident: dict[str, int] | None = None,
    heads: dict[str, list[tuple[int, int]]] | None = None,
) -> Pod:
    made = Pod(name, f"http://{name}", ready=True)
    seconds = TURN_S / (1 - PrefillRate().keep)
    made.rate = PrefillRate(tokens=rate * seconds, seconds=seconds)
    made.queued_prefill_tokens = queued
    made.in_flight = in_flight
    for sid, tokens in (resident or {}).items():
        made.residency.touch(sid, tokens, (heads or {}).get(sid, []))
    return made


def arrival(
    prompt_tokens: int = 10_000,
    same_tokens: int | None = None,
    heads: list[tuple[int, int]] | None = None,
    home: str | None = None,
    relative: tuple[str, int] | None = None,
    sid: str = "me",
    affinity: str = "",
    resumed: bool = False,
) -> Arrival:
    same = prompt_tokens if same_tokens is None else same_tokens
    return Arrival(sid, prompt_tokens, same, heads or [], home, relative, affinity, resumed)


# -- the formula ----------------------------------------------------------------------------------


def test_the_estimate_is_queue_plus_prefill() -> None:
    pods = [pod("a", queued=5_000, resident={"me": 8_000}), pod("b", rate=20_000)]
    decision = choose(pods, arrival(home="a"))
    a, b = decision.candidates
    assert (a.queue_s, a.prefill_s, a.crowd_s) == pytest.approx((0.5, 0.2, 0))
    assert (b.queue_s, b.prefill_s, b.crowd_s) == pytest.approx((0, 0.5, 0))
    assert a.total_s == pytest.approx(0.7)
    assert (decision.pod.name, decision.reason) == ("b", "moved")


def test_a_session_stays_where_its_kv_is() -> None:
    pods = [pod("a", queued=5_000, in_flight=3, resident={"me": 9_000, "x": 9}), pod("b")]
    decision = choose(pods, arrival(home="a"))
    assert (decision.pod.name, decision.reason, decision.resident_tokens) == ("a", "home", 9_000)


def test_what_is_resident_counts_only_as_far_as_the_prompt_is_unchanged() -> None:
    pods = [pod("a", resident={"me": 9_000}), pod("b")]
    assert choose(pods, arrival(same_tokens=2_000, home="a")).resident_tokens == 2_000


@pytest.mark.parametrize(("gain_s", "moves"), [(STAY_S - 0.01, False), (STAY_S + 0.01, True)])
def test_a_session_leaves_home_only_for_a_gain(gain_s: float, moves: bool) -> None:
    queued = round((0.9 + gain_s) * RATE)
    pods = [pod("a", queued=queued, resident={"me": 9_000}), pod("b")]
    decision = choose(pods, arrival(home="a"))
    assert decision.reason == ("moved" if moves else "home")
    assert decision.pod.name == ("b" if moves else "a")


# -- sessions without a home ----------------------------------------------------------------------


def hashed(sid: str, *pods: Pod) -> str:
    """The pod that rendezvous hashing ranks first."""
    return max(pods, key=lambda p: rendezvous(arrival(sid=sid), p)).name


def test_a_new_session_goes_where_the_hash_sends_it_while_the_load_is_even() -> None:
    for number in range(50):
        pods = [pod("a", resident={"x": 10}, in_flight=1), pod("b"), pod("c", resident={"y": 9})]
        decision = choose(pods, arrival(sid=f"s{number}", same_tokens=0))
        assert decision.reason == "hashed"
        assert decision.pod.name == hashed(f"s{number}", *pods)


def test_a_session_whose_kv_is_gone_goes_home() -> None:
    pods = [pod("a"), pod("b"), pod("c")]
    for home in "abc":
        decision = choose(pods, arrival(same_tokens=0, home=home))
        assert (decision.pod.name, decision.reason) == (home, "hashed")


@pytest.mark.parametrize("home", ["a", None])
def test_a_pod_that_is_too_loaded_gets_no_new_session(home: str | None) -> None:
    turns = 10
    pods = [pod("a", in_flight=turns), pod("b"), pod("c")]
    mean_with_it = (turns + 1) / 3
    assert turns + 1 > (1 + BALANCE) * mean_with_it + COMPANY
    for number in range(50):
        decision = choose(pods, arrival(sid=f"s{number}", same_tokens=0, home=home))
        assert decision.pod.name == hashed(f"s{number}", *pods[1:])


def test_of_pods_that_are_all_loaded_the_least_loaded_is_free_to_take() -> None:
    pods = [pod("a", queued=50_000), pod("b", queued=49_000)]
    for number in range(20):
        decision = choose(pods, arrival(sid=f"s{number}", same_tokens=0))
        assert decision.pod.name == hashed(f"s{number}", *pods)


def test_sessions_living_there_are_load() -> None:
    pods = [pod("a", resident={"x": 10, "y": 10}), pod("b", resident={"z": 10_000})]
    decision = choose(pods, arrival(same_tokens=0))
    assert [c.crowd_s for c in decision.candidates] == pytest.approx([2 * TURN_S, TURN_S])


def test_a_resumed_session_is_worth_a_wait_where_its_kv_is() -> None:
    sid = next(s for s in map(str, range(99)) if hashed(s, pod("a"), pod("b")) == "a")
    for queued, stays in ((8_000, True), (120_000, False)):
        pods = [pod("a", queued=queued), pod("b")]
        new = choose(pods, arrival(20_000, 0, sid=sid))
        resumed = choose(pods, arrival(20_000, 0, sid=sid, resumed=True))
        assert new.pod.name == "b"
        assert resumed.pod.name == ("a" if stays else "b")


@pytest.mark.parametrize("believed", [0, 10_000, 19_900])
def test_a_resumed_session_is_weighed_by_its_whole_prompt_whatever_is_believed_of_it(
    believed: int,
) -> None:
    sid = next(s for s in map(str, range(99)) if hashed(s, pod("a"), pod("b")) == "a")
    for queued, stays in ((16_000, True), (120_000, False)):
        pods = [pod("a", queued=queued), pod("b")]
        if believed:
            pods[0].residency.touch(sid, believed, [])
        decision = choose(pods, arrival(20_000, sid=sid, resumed=True))
        assert decision.pod.name == ("a" if stays else "b")


def test_what_is_believed_of_a_resumed_session_does_not_hide_those_that_live_there() -> None:
    crowd = {f"s{n}": 10 for n in range(5)}
    for believed in ({}, {"me": 9_000}):
        pods = [pod("a", resident=crowd), pod("b", resident=believed)]
        decision = choose(pods, arrival(resumed=True))
        assert decision.candidates[0].crowd_s == pytest.approx(5 * TURN_S)


def test_a_resumed_session_is_sent_by_the_hash_whatever_this_replica_believes() -> None:
    pods = [pod("a", resident={"me": 9_000}), pod("b", resident={"me": 9_000})]
    for home in "ab":
        decision = choose(pods, arrival(home=home, resumed=True))
        assert decision.pod.name == hashed("me", *pods)


def test_a_resumed_session_goes_where_most_of_it_is_known_to_be() -> None:
    pods = [pod("a", resident={"me": 60_000}), pod("b", resident={"me": 1}), pod("c")]
    for made, blocks in zip(pods, (100, 200, 0), strict=True):
        made.residency.ledger = Ledger()
        made.residency.ledger.live = True
        made.residency.ledger.store("me", None, range(1, blocks + 1), 16)
    decision = choose(pods, arrival(4_000, home="a", resumed=True))
    assert (decision.pod.name, decision.reason, decision.resident_tokens) == ("b", "home", 3_200)
    pods[1].residency.ledger.live = False  # type: ignore[union-attr]
    assert choose(pods, arrival(4_000, home="a", resumed=True)).pod.name == "a"


def test_what_is_believed_of_a_resumed_session_draws_it_nowhere() -> None:
    for home in "ab":
        pods = [pod("a"), pod("b")]
        next(p for p in pods if p.name == home).residency.touch("me", 90_000, [])
        turn = arrival(100_000, home=home, resumed=True)
        assert choose(pods, turn).pod.name == hashed("me", *pods)


def test_a_session_is_ranked_by_its_affinity() -> None:
    pods = [pod("a"), pod("b"), pod("c")]
    chosen = {
        choose(pods, arrival(sid=f"s{n}", same_tokens=0, affinity="same")).pod.name
        for n in range(30)
    }
    assert chosen == {hashed("same", *pods)}


HEADS = [(33, 9_000), (22, 5_000), (11, 2_000)]
LONG_HEADS = [(33, FOLLOW_TOKENS + 9_000), (22, FOLLOW_TOKENS), (11, FOLLOW_TOKENS - 16)]


@pytest.mark.parametrize("shorter", [0, 1])
def test_only_a_long_shared_prefix_draws_a_new_session(shorter: int) -> None:
    heads = LONG_HEADS[1 + shorter :]
    for number in range(20):
        pods = [pod("a"), pod("b", resident={"x": 60_000}, heads={"x": heads})]
        turn = arrival(60_000, 0, LONG_HEADS, sid=f"s{number}")
        decision = choose(pods, turn)
        if shorter:
            assert decision.reason == "hashed"
            assert decision.pod.name == hashed(f"s{number}", *pods)
        else:
            assert (decision.pod.name, decision.resident_tokens) == ("b", FOLLOW_TOKENS)
            assert decision.reason in ("shared_prefix", "hashed")


def test_a_shared_prefix_does_not_pile_sessions_up() -> None:
    pods = [pod("a"), pod("b")]
    homes = []
    for number in range(80):
        decision = choose(pods, arrival(60_000, 0, LONG_HEADS, sid=f"s{number}"))
        decision.pod.residency.touch(f"s{number}", 60_000, LONG_HEADS)
        homes.append(decision.pod.name)
    assert homes[1] == homes[0]  # the prefix of 4 s is worth some company
    assert min(homes.count("a"), homes.count("b")) >= 15


def test_a_fork_goes_to_its_origin() -> None:
    pods = [pod("a"), pod("b", resident={"origin": 9_500})]
    decision = choose(pods, arrival(same_tokens=0, relative=("origin", 8_000)))
    assert (decision.pod.name, decision.resident_tokens) == ("b", 8_000)


def test_nothing_resident_is_more_than_the_prompt() -> None:
    pods = [pod("a", resident={"me": 90_000}), pod("b")]
    decision = choose(pods, arrival(prompt_tokens=100, same_tokens=500, home="a"))
    assert decision.resident_tokens == 100
    assert decision.candidates[0].prefill_s == 0


def test_of_equal_pods_the_one_with_fewer_turns_in_flight() -> None:
    pods = [pod("a", in_flight=1, resident={"x": 1}), pod("b", resident={"x": 1, "me": 8_000})]
    pods[0].residency.touch("me", 8_000, [])
    assert choose(pods, arrival(), "least_loaded").pod.name == "b"


def test_a_single_pod_is_taken_as_it_is() -> None:
    decision = choose([pod("a", queued=99_999)], arrival())
    assert (decision.pod.name, decision.reason, len(decision.candidates)) == ("a", "only", 1)


names = st.lists(st.sampled_from("abcdefghijklmnop"), min_size=2, max_size=16, unique=True)
tokens = st.integers(0, 50_000)


@st.composite
def fleets(draw: st.DrawFn) -> list[Pod]:
    made = []
    for name in draw(names):
        resident = draw(st.dictionaries(st.sampled_from(["me", "x", "y"]), tokens, max_size=3))
        made.append(
            pod(
                name,
                queued=draw(tokens),
                in_flight=draw(st.integers(0, 20)),
                rate=draw(st.sampled_from([500.0, 8_000.0, 40_000.0])),
                resident=resident,
                heads=dict.fromkeys(resident, HEADS),
            )
        )
    return made


arrivals = st.builds(
    Arrival,
    sid=st.just("me"),
    prompt_tokens=st.integers(1, 100_000),
    same_tokens=tokens,
    heads=st.sampled_from([[], HEADS]),
    home=st.none() | st.sampled_from("abcdef"),
    relative=st.none() | st.tuples(st.just("x"), tokens),
    resumed=st.booleans(),
)


@given(fleets(), arrivals)
@settings(max_examples=150, deadline=None)
def test_the_winner_has_the_least_seconds_or_is_home_or_hashed(
    pods: list[Pod], turn: Arrival
) -> None:
    decision = choose(pods, turn)
    totals = {c.pod.name: c.total_s for c in decision.candidates}
    least = min(totals.values())
    assert [c.pod for c in decision.candidates] == pods
    for c in decision.candidates:
        assert 0 <= c.resident_tokens <= turn.prompt_tokens
        assert min(c.queue_s, c.prefill_s, c.crowd_s) >= 0
    if decision.reason != "hashed":
        slack = STAY_S + NEARLY_S if decision.reason == "home" else NEARLY_S
        assert totals[decision.pod.name] <= least + slack + 1e-9
    if decision.reason == "home":
        assert decision.pod.name == turn.home
    if decision.reason == "moved":
        assert decision.pod.name != turn.home
        assert totals[str(turn.home)] > totals[decision.pod.name] + STAY_S


@given(fleets(), st.lists(st.integers(0, 20), min_size=16, max_size=16), st.text(max_size=8))
@settings(max_examples=150, deadline=None)
def test_replicas_with_other_loads_choose_alike_unless_the_pod_is_too_loaded_for_one(
    pods: list[Pod], in_flight: list[int], sid: str
) -> None:
    turn = arrival(same_tokens=0, sid=sid)
    elsewhere = [pod(p.name, in_flight=n) for p, n in zip(pods, in_flight, strict=False)]
    first = hashed(sid, *pods)
    for fleet in (pods, elsewhere):
        chosen = choose(fleet, turn)
        if chosen.pod.name != first:
            loads = {c.pod.name: c.load_s for c in chosen.candidates}
            mean_s = sum(loads.values()) / len(loads)
            assert loads[first] > mean_s
            assert loads[first] > loads[chosen.pod.name]


@given(fleets(), arrivals, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_choice_is_stable(pods: list[Pod], turn: Arrival, random: object) -> None:
    first = choose(pods, turn)
    shuffled = list(pods)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = choose(shuffled, turn)
    assert (again.pod, again.reason) == (first.pod, first.reason)
    assert choose(pods, turn) == first


@given(fleets(), arrivals)
@settings(max_examples=50, deadline=None)
def test_a_decision_explains_itself(pods: list[Pod], turn: Arrival) -> None:
    explained = choose(pods, turn).explain()
    listed = explained["candidates"]
    assert isinstance(listed, list)
    assert [c["pod"] for c in listed] == [p.name for p in pods]
    assert explained["pod"] in {c["pod"] for c in listed}
    for c in listed:
        parts = c["queue_s"] + c["prefill_s"] + c["crowd_s"]
        assert c["total_s"] == pytest.approx(parts, abs=2e-4)


# -- the other policies ---------------------------------------------------------------------------

FLEET = [f"pod-{number}" for number in range(16)]
SIDS = [f"session-{number}" for number in range(800)]


def homes(pods: list[Pod], policy: Policy) -> dict[str, str]:
    return {sid: choose(pods, arrival(sid=sid), policy).pod.name for sid in SIDS}


def test_round_robin_takes_pods_in_turn() -> None:
    pods = [pod(name) for name in FLEET[:3]]
    chosen: list[Decision] = [choose(pods, arrival(), "round_robin", n) for n in range(6)]
    assert [decision.pod.name for decision in chosen] == FLEET[:3] * 2
    assert {decision.reason for decision in chosen} == {"policy"}


def test_least_loaded_looks_at_load_alone() -> None:
    pods = [pod("a", queued=2_000, resident={"me": 10_000}), pod("b", queued=1_000)]
    assert choose(pods, arrival(home="a"), "least_loaded").pod.name == "b"
    pods = [pod("a", in_flight=2), pod("b", in_flight=1)]
    assert choose(pods, arrival(), "least_loaded").pod.name == "b"


@pytest.mark.parametrize("policy", ["session_hash", "expected_ttft", "least_loaded"])
def test_losing_a_pod_moves_only_its_sessions(policy: Policy) -> None:
    """All pods idle and alike: only the hash tells them apart, in every policy."""
    before = homes([pod(name) for name in FLEET], policy)
    after = homes([pod(name) for name in FLEET if name != "pod-7"], policy)
    assert all(after[sid] == before[sid] for sid in SIDS if before[sid] != "pod-7")
    counts = [list(before.values()).count(name) for name in FLEET]
    assert min(counts) > 0.4 * len(SIDS) / len(FLEET)
    assert max(counts) < 2 * len(SIDS) / len(FLEET)


def test_session_hash_does_not_look_at_load() -> None:
    idle = homes([pod(name) for name in FLEET], "session_hash")
    busy = homes([pod(name, queued=i * 1_000) for i, name in enumerate(FLEET)], "session_hash")
    assert idle == busy


def test_every_replica_ranks_the_pods_alike() -> None:
    turn = arrival(sid="s")
    assert rendezvous(turn, pod("a")) == rendezvous(turn, pod("a", queued=5, in_flight=3))
    assert rendezvous(turn, pod("a")) != rendezvous(turn, pod("b"))


# -- what a pod knows of itself -------------------------------------------------------------------


def test_the_prefill_rate_follows_what_was_served() -> None:
    rate = PrefillRate()
    for _ in range(50):
        rate.learn(20_000, 0.5)
    assert rate.tokens_per_s == pytest.approx(40_000, rel=0.02)
    rate.learn(10, 1e-9)
    assert rate.tokens_per_s == pytest.approx(40_000, rel=0.02)  # a short prompt says little
    before = rate.tokens_per_s
    rate.learn(0, 1.0)
    rate.learn(100, 0.0)
    assert rate.tokens_per_s == before


def test_a_turn_is_counted_out_on_every_exit() -> None:
    made = pod("a")
    with made.serving(500) as prefill:
        assert (made.in_flight, made.queued_prefill_tokens) == (1, 500)
        made.prefilled(prefill)
        assert made.queued_prefill_tokens == 0
    with pytest.raises(RuntimeError), made.serving(700):
        raise RuntimeError
    assert (made.in_flight, made.queued_prefill_tokens) == (0, 0)
