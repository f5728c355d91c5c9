"""The flow of one turn through the policies, without any I/O: arrive, start, first token, end.

The HTTP gateway and the replay drive the same class; they differ in who tells it what happened and
when.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from gateway.admission import Admission, Ask, Ended, Ticket
from gateway.fleet.pod import Pod, Prefill
from gateway.losses import Left, LossCause, lost_tokens

MAX_SESSIONS = 65_536


@dataclass(slots=True, eq=False)
class Run:
    """A turn on its pod: counted in by `Conductor.start`, out by `Conductor.end`."""

    ticket: Ticket
    pod: Pod
    tokens_ahead: int
    """Prefill tokens queued on the pod before its own."""
    started_at: float
    serving: AbstractContextManager[Prefill]
    prefill: Prefill
    first_token_s: float | None = None


@dataclass(slots=True)
class Totals:
    """What the turns so far lost, by cause, and what was expected of the caches."""

    lost_tokens: dict[LossCause, int] = field(default_factory=dict)
    expected_tokens: int = 0
    cached_tokens: int = 0


class Conductor:
    """Joins admission with what pods are believed to hold and do. Synchronous; ``now`` in seconds.

    Each `start` needs its `end`, on every exit; `Admission.end` is part of it.
    """

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.totals = Totals()
        self.epochs: dict[str, int] = {}
        """Lives of each pod's engine; raised by `restarted`."""
        self._left: OrderedDict[str, Left] = OrderedDict()

    def start(self, ticket: Ticket, now: float) -> Run:
        """The turn has its place and is sent to ``ticket.decision.pod``."""
        decision = ticket.decision
        pod = decision.pod
        uncached_tokens = decision.prompt_tokens - decision.resident_tokens
        serving = pod.serving(uncached_tokens)
        prefill = serving.__enter__()
        pod.pass_time(now)
        queued_tokens = pod.queued_prefill_tokens + round(pod.elsewhere_queued_tokens)
        return Run(ticket, pod, queued_tokens - uncached_tokens, now, serving, prefill)

    def first_token(self, run: Run, now: float) -> None:
        """The answer begins: the turn's prefill is done."""
        run.pod.prefilled(run.prefill)
        run.first_token_s = now - run.started_at

    def end(self, run: Run, now: float, ended: Ended | None) -> dict[LossCause, int]:
        """The turn is over; ``ended`` is None if it was not answered. Returns the tokens lost."""
        losses: dict[LossCause, int] = {}
        try:
            run.serving.__exit__(None, None, None)
            if ended is not None:
                losses = self._learn(run, ended)
            elif run.first_token_s is not None:
                self._learn_prompt(run)
        finally:
            self.admission.end(run.ticket, now, ended)
        return losses

    def _learn_prompt(self, run: Run) -> None:
        """The answer began and was not finished: its prompt is in the cache all the same."""
        arrival = run.ticket.ask.arrival
        decision = run.ticket.decision
        assert run.first_token_s is not None
        uncached_tokens = max(1, arrival.prompt_tokens - decision.resident_tokens)
        run.pod.rate.learn(run.tokens_ahead + uncached_tokens, run.first_token_s)
        run.pod.residency.touch(arrival.sid, arrival.prompt_tokens, arrival.heads)

    def _learn(self, run: Run, ended: Ended) -> dict[LossCause, int]:
        arrival = run.ticket.ask.arrival
        decision = run.ticket.decision
        pod = run.pod
        losses: dict[LossCause, int] = {}
        cached_tokens = ended.cached_tokens
        epoch = self.epochs.get(pod.name, 0)
        if cached_tokens is not None:
            pod.residency.learn(decision.resident_tokens, cached_tokens)
            self.totals.expected_tokens += decision.resident_tokens
            self.totals.cached_tokens += cached_tokens
            losses = lost_tokens(
                ended.prompt_tokens,
                arrival.same_tokens,
                cached_tokens,
                self._left.get(arrival.sid),
                pod.name,
                epoch,
            )
            for cause, tokens in losses.items():
                self.totals.lost_tokens[cause] = self.totals.lost_tokens.get(cause, 0) + tokens
        if run.first_token_s is not None:
            known = cached_tokens if cached_tokens is not None else decision.resident_tokens
            uncached_tokens = max(1, ended.prompt_tokens - known)
            pod.rate.learn(run.tokens_ahead + uncached_tokens, run.first_token_s)
        pod.residency.touch(arrival.sid, ended.prompt_tokens + ended.output_tokens, arrival.heads)
        self._leave(arrival.sid, Left(ended.prompt_tokens, pod.name, epoch))
        return losses

    def restarted(self, pod: Pod, now: float) -> None:
        """The pod's engine began anew: its cache is empty."""
        self.epochs[pod.name] = self.epochs.get(pod.name, 0) + 1
        pod.residency.clear()
        self.admission.pod_restarted(pod.name, now)

    def served_elsewhere(self, sid: str, pod: Pod, prompt_tokens: int) -> None:
        """Another replica of the gateway has served a turn of the session there."""
        self._leave(sid, Left(prompt_tokens, pod.name, self.epochs.get(pod.name, 0)))

    def _leave(self, sid: str, left: Left) -> None:
        self._left[sid] = left
        self._left.move_to_end(sid)
        while len(self._left) > MAX_SESSIONS:
            self._left.popitem(last=False)

    def forget(self, sid: str, now: float) -> None:
        """The session is over."""
        self._left.pop(sid, None)
        self.admission.forget(sid, now)

    def arrive(self, ask: Ask, pods: Sequence[Pod], now: float) -> Ticket:
        """See `Admission.arrive`."""
        for pod in pods:
            pod.pass_time(now)
        return self.admission.arrive(ask, pods, now)
