"""Choose a pod: by estimated seconds to the first token.

For each pod that serves the model and is ready:

    queue_s   = prefill tokens queued there / its prefill rate
    prefill_s = (prompt tokens - resident tokens) / its prefill rate
    crowd_s   = sessions living there × its mean prefill seconds of a turn   (homeless turns only)
    hold_s    = seconds until the pod would admit it (`gateway.admission`; 0 without)

The smallest sum wins. So a session stays where its KV is, unless waiting there costs more than
computing the prompt elsewhere; a session without a home (new, or its KV believed gone) takes the
longest shared prefix that is not on a crowded pod. A session leaves its home only for a gain of
`STAY_S`, and nearly equal pods are told apart by turns in flight, then by resident tokens, then by
rendezvous hashing, so that the choice is stable.

Pure: all inputs are arguments, the result explains itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import xxhash

from gateway.fleet.pod import Pod

Policy = Literal["expected_ttft", "least_loaded", "round_robin", "session_hash"]
Reason = Literal[
    "only", "home", "moved", "shared_prefix", "least_loaded", "admitted", "policy", "fallback"
]

STAY_S = 0.05
"""A move must gain at least this much."""
NEARLY_S = 0.005
"""Estimates closer than this count as equal."""


@dataclass(slots=True, frozen=True)
class Candidate:
    """What one pod would cost this turn, in seconds."""

    pod: Pod
    resident_tokens: int
    queue_s: float
    prefill_s: float
    crowd_s: float
    hold_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.crowd_s + self.hold_s


@dataclass(slots=True, frozen=True)
class Decision:
    """The choice and why. ``candidates`` are all pods that were weighed."""

    pod: Pod
    policy: Policy
    reason: Reason
    resident_tokens: int
    prompt_tokens: int
    candidates: tuple[Candidate, ...]

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
    tokens they share.
    """

    sid: str
    prompt_tokens: int
    same_tokens: int
    heads: list[tuple[int, int]]
    home: str | None = None
    relative: tuple[str, int] | None = None


def weigh(pod: Pod, arrival: Arrival) -> tuple[int, bool]:
    """Tokens of the prompt believed resident on the pod, and whether they are the session's own."""
    own = min(pod.residency.tokens(arrival.sid), arrival.same_tokens)
    shared = pod.residency.shared_tokens(arrival.heads)
    if arrival.relative is not None:
        shared = max(shared, min(pod.residency.tokens(arrival.relative[0]), arrival.relative[1]))
    return min(max(own, shared), arrival.prompt_tokens), own > 0 and own >= shared


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
    weighed: list[tuple[Pod, int]] = []
    for pod in pods:
        resident_tokens, own = weigh(pod, arrival)
        at_home = at_home or own
        weighed.append((pod, resident_tokens))

    candidates = []
    for pod, resident_tokens in weighed:
        tokens_per_s = pod.rate.tokens_per_s
        crowd_s = 0.0
        if not at_home and len(pods) > 1:
            turn_s = pod.rate.seconds * (1 - pod.rate.keep)
            crowd_s = (len(pod.residency) + pod.in_flight) * turn_s
        candidates.append(
            Candidate(
                pod,
                resident_tokens,
                pod.queued_prefill_tokens / tokens_per_s,
                (arrival.prompt_tokens - resident_tokens) / tokens_per_s,
                crowd_s,
                hold_s(pod) if hold_s is not None else 0.0,
            )
        )

    def decision(best: Candidate, reason: Reason) -> Decision:
        return Decision(
            best.pod,
            policy,
            reason,
            best.resident_tokens,
            arrival.prompt_tokens,
            tuple(candidates),
        )

    if len(candidates) == 1:
        return decision(candidates[0], "only")
    if policy == "round_robin":
        return decision(candidates[turn_number % len(candidates)], "policy")
    if policy == "session_hash":
        return decision(max(candidates, key=lambda c: rendezvous(arrival.sid, c.pod)), "policy")
    if policy == "least_loaded":
        return decision(min(candidates, key=lambda c: _load(arrival.sid, c)), "policy")

    best = min(candidates, key=lambda c: (round(c.total_s / NEARLY_S), *_load(arrival.sid, c)))
    home = next((c for c in candidates if c.pod.name == arrival.home), None)
    if home is not None and at_home and home.resident_tokens:
        if home.total_s <= best.total_s + STAY_S:
            return decision(home, "home")
        return decision(best, "moved")
    if best.resident_tokens:
        return decision(best, "shared_prefix")
    return decision(best, "least_loaded")


def _load(sid: str, candidate: Candidate) -> tuple[float, int, int, int]:
    pod = candidate.pod
    return (
        round(candidate.queue_s / NEARLY_S),
        pod.in_flight,
        pod.residency.total_tokens,
        -rendezvous(sid, pod),
    )


def rendezvous(sid: str, pod: Pod) -> int:
    """Highest random weight (Thaler & Ravishankar 1996): every replica ranks the pods alike, and
    losing a pod moves only its own sessions."""
    return xxhash.xxh3_64_intdigest(f"{sid}@{pod.name}".encode())
