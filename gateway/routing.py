"""Choose a pod: by estimated seconds to the first token.

For each pod that serves the model and is ready:

    queue_s   = prefill tokens queued there / its prefill rate
    prefill_s = (prompt tokens - resident tokens) / its prefill rate
    crowd_s   = sessions living there × its mean prefill seconds of a turn   (homeless turns only)
    hold_s    = seconds until the pod would admit it (`gateway.admission`; 0 without)

The smallest sum wins. So a session stays where its KV is, unless waiting there costs more than
computing the prompt elsewhere. It leaves its home only for a gain of `STAY_S`.

A session without a home (new, new to this replica, or its KV believed gone) goes to the pod that
rendezvous hashing ranks first for it, so that every replica of the gateway sends it to the same
one. Of the ranking those pods are left out that are too loaded, as in consistent hashing with
bounded loads (Mirrokni, Thorup & Zadimoghaddam, SODA 2018): their

    load_s    = queue_s + crowd_s + hold_s

with this turn would exceed the pods' mean by more than the share `BALANCE` and `COMPANY` turns. A
session whose history says that it goes on has its KV somewhere, most likely there: it is worth
waiting as long as its prompt takes to compute. The smallest sum wins here too where a pod holds
what no other session brings along: a fork's origin, or a shared prefix of `FOLLOW_TOKENS`.

Pure: all inputs are arguments, the result explains itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Final, Literal

import xxhash

from gateway.fleet.pod import Pod

Policy = Literal["expected_ttft", "least_loaded", "round_robin", "session_hash"]
Reason = Literal[
    "only", "home", "moved", "shared_prefix", "hashed", "admitted", "policy", "fallback"
]

STAY_S = 0.05
"""A move must gain at least this much."""
NEARLY_S = 0.005
"""Estimates closer than this count as equal."""
BALANCE: Final = 0.5
COMPANY: Final = 2.0
FOLLOW_TOKENS: Final = 32_768
"""System prompts are shorter, and soon on every pod."""


@dataclass(slots=True)
class Candidate:
    """What one pod would cost this turn, in seconds. Not frozen: a turn makes one for each pod, and
    a frozen one takes three times as long to make."""

    pod: Pod
    resident_tokens: int
    queue_s: float
    prefill_s: float
    crowd_s: float
    hold_s: float = 0.0

    @property
    def load_s(self) -> float:
        return self.queue_s + self.crowd_s + self.hold_s

    @property
    def total_s(self) -> float:
        return self.load_s + self.prefill_s


@dataclass(slots=True, frozen=True)
class Decision:
    """The choice and why. ``candidates`` are all pods that were weighed."""

    pod: Pod
    policy: Policy
    reason: Reason
    resident_tokens: int
    prompt_tokens: int
    candidates: tuple[Candidate, ...]
    common_tokens: int = 0
    """Of the prompt, the longest beginning that other chains left on one of the pods."""

    def explain(self) -> dict[str, object]:
        """The decision as plain data, for the route header and the API."""
        return {
            "pod": self.pod.name,
            "policy": self.policy,
            "reason": self.reason,
            "prompt_tokens": self.prompt_tokens,
            "candidates": [
                {
                    "pod": c.pod.name,
                    "resident_tokens": c.resident_tokens,
                    "queue_s": round(c.queue_s, 4),
                    "prefill_s": round(c.prefill_s, 4),
                    "crowd_s": round(c.crowd_s, 4),
                    "hold_s": round(c.hold_s, 4),
                    "total_s": round(c.total_s, 4),
                }
                for c in self.candidates
            ],
        }


@dataclass(slots=True, frozen=True)
class Arrival:
    """What routing needs to know of a turn.

    ``same_tokens`` of the prompt are unchanged since the session's last turn (what is resident of
    the session is of use only so far); ``heads`` are the prompt's leading prefix links, longest
    first, with their lengths in tokens; ``relative`` is the chain it was forked from, with the
    tokens they share. ``affinity`` is what every replica of the gateway calls the session, its
    ``sid`` if not given; ``resumed`` says that replicas which this one knows nothing of have served
    it since, or ever.
    """

    sid: str
    prompt_tokens: int
    same_tokens: int
    heads: list[tuple[int, int]]
    home: str | None = None
    relative: tuple[str, int] | None = None
    affinity: str = ""
    resumed: bool = False
    steps: tuple[tuple[int, int], ...] = field(init=False, compare=False)
    """The heads, shortest first, each with the tokens it adds."""

    def __post_init__(self) -> None:
        steps = []
        before = 0
        for link, length_tokens in reversed(self.heads):
            length_tokens = min(length_tokens, self.prompt_tokens)
            if length_tokens > before:
                steps.append((link, length_tokens - before))
                before = length_tokens
        object.__setattr__(self, "steps", tuple(steps))


def weigh(pod: Pod, arrival: Arrival) -> tuple[int, bool, int]:
    """Tokens of the prompt believed resident on the pod, whether they are the session's own, and
    how many of them any session would find there."""
    own = min(pod.residency.tokens(arrival.sid), arrival.same_tokens)
    shared = common = pod.residency.shared_tokens(arrival.heads)
    if arrival.relative is not None:
        shared = max(shared, min(pod.residency.tokens(arrival.relative[0]), arrival.relative[1]))
    return min(max(own, shared), arrival.prompt_tokens), own > 0 and own >= shared, common


def choose(
    pods: Sequence[Pod],
    arrival: Arrival,
    policy: Policy = "expected_ttft",
    turn_number: int = 0,
    hold_s: Callable[[Pod], float] | None = None,
) -> Decision:
    """Choose among ``pods`` (not empty, all able to serve). ``turn_number`` drives round robin;
    ``hold_s`` says how long a pod would keep the turn waiting for a place."""
    at_home = False
    common_tokens = 0
    weighed: list[tuple[Pod, int]] = []
    for pod in pods:
        resident_tokens, own, common = weigh(pod, arrival)
        common_tokens = max(common_tokens, common)
        own = own and (not arrival.resumed or pod.residency.knows(arrival.sid))
        at_home = at_home or own
        weighed.append((pod, resident_tokens))
    home_name = _home(arrival, weighed)

    candidates = []
    for pod, resident_tokens in weighed:
        crowd_s = 0.0
        if not at_home and len(pods) > 1:
            living = len(pod.residency) + pod.in_flight + pod.elsewhere_in_flight
            crowd_s = living * _turn_s(pod)
        waits_s = hold_s(pod) if hold_s is not None else 0.0
        candidates.append(_candidate(pod, arrival, resident_tokens, crowd_s, waits_s))

    def decision(best: Candidate, reason: Reason) -> Decision:
        return Decision(
            best.pod,
            policy,
            reason,
            best.resident_tokens,
            arrival.prompt_tokens,
            tuple(candidates),
            common_tokens,
        )

    if len(candidates) == 1:
        return decision(candidates[0], "only")
    if policy == "round_robin":
        return decision(candidates[turn_number % len(candidates)], "policy")
    if policy == "session_hash":
        return decision(max(candidates, key=lambda c: rendezvous(arrival, c.pod)), "policy")
    if policy == "least_loaded":
        return decision(min(candidates, key=lambda c: _load(arrival, c)), "policy")

    home = next((c for c in candidates if c.pod.name == home_name), None)
    if home is not None and at_home and home.resident_tokens:
        best = _soonest(arrival, candidates)
        if home.total_s <= best.total_s + STAY_S:
            return decision(home, "home")
        return decision(best, "moved")
    best = _agreed(arrival, candidates)
    if _worth_following(arrival, candidates, best):
        best = _soonest(arrival, candidates)
        if best.resident_tokens:
            return decision(best, "shared_prefix")
    return decision(best, "hashed")


def settled(pod: Pod, arrival: Arrival, policy: Policy, reason: Reason) -> Decision:
    """The decision for a pod that was chosen elsewhere."""
    resident_tokens, _, common_tokens = weigh(pod, arrival)
    candidates = (_candidate(pod, arrival, resident_tokens),)
    return Decision(
        pod, policy, reason, resident_tokens, arrival.prompt_tokens, candidates, common_tokens
    )


def _candidate(
    pod: Pod, arrival: Arrival, resident_tokens: int, crowd_s: float = 0.0, hold_s: float = 0.0
) -> Candidate:
    tokens_per_s = pod.rate.tokens_per_s
    return Candidate(
        pod,
        resident_tokens,
        (pod.queued_prefill_tokens + pod.elsewhere_queued_tokens) / tokens_per_s,
        (arrival.prompt_tokens - resident_tokens) / tokens_per_s,
        crowd_s,
        hold_s,
    )


def _soonest(arrival: Arrival, candidates: Sequence[Candidate]) -> Candidate:
    """The smallest sum; of nearly equal ones the least loaded."""
    totals = [round(c.total_s / NEARLY_S) for c in candidates]
    least = min(totals)
    nearest = [c for c, total in zip(candidates, totals, strict=True) if total == least]
    return min(nearest, key=lambda c: _load(arrival, c)) if len(nearest) > 1 else nearest[0]


def _agreed(arrival: Arrival, candidates: Sequence[Candidate]) -> Candidate:
    """Of the pods that are not too loaded its old home, else the first by rendezvous hashing."""
    turns_s = [_turn_s(c.pod) for c in candidates]
    turn_s = fmean(turns_s)
    with_it = [c.load_s + own_s for c, own_s in zip(candidates, turns_s, strict=True)]
    mean_s = fmean(c.load_s for c in candidates) + turn_s / len(candidates)
    bound_s = max(min(with_it), (1 + BALANCE) * mean_s + COMPANY * turn_s)
    within = [
        c
        for c, load_s in zip(candidates, with_it, strict=True)
        if load_s - (_prompt_s(arrival, c.pod) if arrival.resumed else 0.0) <= bound_s
    ]
    home = None if arrival.resumed else arrival.home
    return max(within, key=lambda c: (c.pod.name == home, rendezvous(arrival, c.pod)))


def _home(arrival: Arrival, weighed: Sequence[tuple[Pod, int]]) -> str | None:
    """Where the session was served last. Of one that others have served since, where most of it is
    known to be, if any pod tells."""
    if not arrival.resumed:
        return arrival.home
    known = [(tokens, pod.name) for pod, tokens in weighed if pod.residency.knows(arrival.sid)]
    tokens, name = max(known, default=(0, None))
    return name if tokens else None


def _worth_following(arrival: Arrival, candidates: Sequence[Candidate], instead: Candidate) -> bool:
    """Whether some pod holds so much of the prompt that it is not to be computed elsewhere."""
    if arrival.resumed:
        return False  # what is believed of it is from before others have served it
    most_tokens = max(c.resident_tokens for c in candidates)
    if arrival.relative is not None:
        return most_tokens > instead.resident_tokens
    return most_tokens - instead.resident_tokens >= FOLLOW_TOKENS


def _turn_s(pod: Pod) -> float:
    """Mean prefill seconds of the pod's turns."""
    return pod.rate.seconds * (1 - pod.rate.keep)


def _prompt_s(arrival: Arrival, pod: Pod) -> float:
    """Seconds to prefill the whole prompt there."""
    return arrival.prompt_tokens / pod.rate.tokens_per_s


def _load(arrival: Arrival, candidate: Candidate) -> tuple[float, int, int, int]:
    pod = candidate.pod
    return (
        round(candidate.queue_s / NEARLY_S),
        pod.in_flight + pod.elsewhere_in_flight,
        pod.residency.total_tokens,
        -rendezvous(arrival, pod),
    )


def rendezvous(arrival: Arrival, pod: Pod) -> int:
    """Highest random weight (Thaler & Ravishankar 1996): every replica ranks the pods alike, and
    losing a pod moves only its own sessions."""
    return xxhash.xxh3_64_intdigest(f"{arrival.affinity or arrival.sid}@{pod.name}".encode())
