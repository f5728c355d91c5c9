"""The replay: sessions, the gateway's policies and a fleet of engines in one virtual time.

Everything between a turn's arrival and its pod is the gateway's own code (`gateway.conductor`,
admission, routing, residency, hints); everything in a pod is vLLM's own scheduler and block pool.
Only the clients, the network (none) and the GPU (`bench.engine.simulation`) are modelled.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from bench.engine import simulation
from bench.engine.roofline import DENSE_32B, Roofline
from bench.engine.simulation import SCALE
from bench.replay.forecasts import Forecaster
from bench.replay.traces import BLOCK_TOKENS, SHARED, Session
from engine_patch.scheduler import SyncReuseAwareScheduler
from gateway import hints
from gateway.admission import Admission, Ask, Ended, Mode, Ticket
from gateway.conductor import Conductor, Run
from gateway.config import AdmissionSettings
from gateway.fleet.pod import Pod
from gateway.routing import Arrival, Policy

BLOCK = BLOCK_TOKENS // SCALE
MODEL = "model"
TICK_S = 0.5
STARTED_APART_S = 0.05
MAX_HOLD_S = AdmissionSettings().max_hold_s
PATIENCE_S = 610.0
"""So long Claude Code, whose sessions most are, waits behind heartbeats before it tries again."""
COMES_AGAIN_S = 1.0
HEAD_BLOCKS = (512, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Setup:
    """One policy under test."""

    name: str
    routing: Policy
    mode: Mode
    patched: bool
    forecast: Forecaster | None


@dataclass(slots=True)
class TurnRecord:
    """What became of one turn; seconds of virtual time."""

    session: int
    pod: str
    latency_s: float
    first_token_s: float
    held_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass
class Outcome:
    """What a replay measured."""

    turns: list[TurnRecord] = field(default_factory=list)
    evicted_blocks: int = 0
    makespan_s: float = 0.0
    lost_tokens: dict[str, int] = field(default_factory=dict)
    saved_tokens: int = 0
    reserves: dict[str, float] = field(default_factory=dict)
    sent_away: int = 0
    """Turns that the gateway would hold no longer, each as often as it was."""


@dataclass(slots=True, eq=False)
class _Job:
    """A turn on its way."""

    session: int
    k: int
    arrived_at: float
    run: Run | None = None
    answer: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    first_token_at: float = 0.0


class Engine:
    """One pod: vLLM's scheduler, stepped in virtual time."""

    def __init__(
        self,
        name: str,
        kv_tokens: int,
        roofline: Roofline,
        patched: bool,
        clock: Callable[[], float],
    ) -> None:
        self.roofline = roofline
        cls = SyncReuseAwareScheduler if patched else Scheduler
        self.scheduler = simulation.make_scheduler(
            cls, kv_tokens // BLOCK_TOKENS, BLOCK, simulation.BATCH_TOKENS // SCALE
        )
        self.hasher = simulation.make_hasher(BLOCK)
        self.evicted = simulation.count_evictions(self.scheduler)
        if patched:
            self.scheduler._reuse.clock = clock
        self.pod = Pod(name, f"http://{name}", ready=True, models={MODEL: None})
        self.pod.residency.set_capacity(kv_tokens)
        self.jobs: dict[str, _Job] = {}
        self.busy = False
        self._output: Any = None

    def add(self, request_id: str, job: _Job, prompt: list[int], output: int) -> None:
        self.jobs[request_id] = job
        self.scheduler.add_request(
            simulation.make_request(request_id, prompt, output, f"s{job.session}", self.hasher)
        )

    def begin_step(self) -> float:
        """Schedule; returns how long the step takes."""
        contexts = {r.request_id: r.num_computed_tokens for r in self.scheduler.running}
        output = self._output = self.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            job = self.jobs[new.req_id]
            if job.cached_tokens is None:
                job.cached_tokens = SCALE * new.num_computed_tokens
        self.busy = True
        return simulation.step_s(output, contexts, self.roofline)

    def finish_step(self, now: float) -> tuple[list[_Job], list[_Job]]:
        """The step's tokens are there: turns whose answer begins, turns that are done."""
        jobs, began = self.jobs, []

        def next_token(request: Any) -> int:
            job = jobs[request.request_id]
            n: int = request.num_output_tokens
            if not n and not job.first_token_at:
                job.first_token_at = now
                began.append(job)
            return job.answer[n]

        finished = simulation.complete(self.scheduler, self._output, next_token)
        self.busy = False
        return began, [jobs.pop(request.request_id) for request in finished]

    def tell(self, envelope: dict[str, Any]) -> None:
        answer = json.loads(self.scheduler.cachewise("hints", json.dumps(envelope)))
        assert answer["results"], answer


class World:
    """A closed loop: each session's next turn comes its gap after its last answer."""

    def __init__(
        self,
        sessions: Sequence[Session],
        setup: Setup,
        pods: int,
        kv_tokens: int,
        progress: Callable[[int], None] = lambda turns: None,
        roofline: Roofline = DENSE_32B,
    ) -> None:
        self.now = 0.0
        self.sessions = sessions
        self.setup = setup
        self.engines = {
            f"pod-{i}": Engine(f"pod-{i}", kv_tokens, roofline, setup.patched, lambda: self.now)
            for i in range(pods)
        }
        self.pods = [engine.pod for engine in self.engines.values()]
        self.conductor = Conductor(Admission(self._released, setup.mode, setup.routing))
        self.outcome = Outcome()
        self.progress = progress
        self.home: dict[int, str] = {}
        self.output_tokens: dict[int, float] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._messages = count()
        self._ticking = False
        self._left = sum(len(session) for session in sessions)

    def run(self) -> Outcome:
        for i in range(len(self.sessions)):
            self._at(i * STARTED_APART_S, partial(self._arrive, i, 0))
        while self._left:
            self.now, _, event = heapq.heappop(self._events)
            event()
        outcome = self.outcome
        outcome.makespan_s = self.now
        outcome.evicted_blocks = sum(engine.evicted() for engine in self.engines.values())
        outcome.lost_tokens = {str(k): v for k, v in self.conductor.totals.lost_tokens.items()}
        admission = self.conductor.admission
        outcome.saved_tokens = admission.saved_tokens
        outcome.reserves = {name: book.reserve for name, book in admission.books.items()}
        return outcome

    def _at(self, at: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), event))

    # -- the client ------------------------------------------------------------------------------

    def _arrive(self, i: int, k: int, since: float | None = None, spared: bool = False) -> None:
        """A session's turn comes, or comes again."""
        arrived_at = self.now if since is None else since
        session = self.sessions[i]
        turn = session[k]
        prompt_tokens = BLOCK_TOKENS * len(turn.blocks)
        ask = Ask(
            Arrival(
                sid=f"s{i}",
                prompt_tokens=prompt_tokens,
                same_tokens=BLOCK_TOKENS * _shared(session, k),
                heads=_heads(turn.blocks),
                home=self.home.get(i),
            ),
            model=MODEL,
            began_at=i * STARTED_APART_S,
            person_waits=k == 0 or session[k - 1].idle_kind == "human",
            output_tokens=round(self.output_tokens.get(i, 500)),
            arrived_at=arrived_at,
            spared=spared,
        )
        ticket = self.conductor.arrive(ask, self.pods, self.now)
        ticket.context = job = _Job(i, k, arrived_at)
        if not ticket.held or self.setup.mode != "enforce":
            self._send(ticket, job)
            return
        self._at(self.now + min(MAX_HOLD_S, PATIENCE_S), lambda: self._held_too_long(ticket, job))
        self._tick_soon()

    def _held_too_long(self, ticket: Ticket, job: _Job) -> None:
        if not ticket.held:
            return
        sent_away = MAX_HOLD_S < PATIENCE_S
        self.outcome.sent_away += sent_away
        self.conductor.admission.end(ticket, self.now)
        spared = ticket.spared and not sent_away
        again = partial(self._arrive, job.session, job.k, job.arrived_at, spared)
        self._at(self.now + COMES_AGAIN_S, again)

    # -- the gateway -----------------------------------------------------------------------------

    def _released(self, ticket: Ticket) -> None:
        assert isinstance(ticket.context, _Job)
        self._send(ticket, ticket.context)

    def _tick_soon(self) -> None:
        if not self._ticking:
            self._ticking = True
            self._at(self.now + TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        admission = self.conductor.admission
        admission.tick(self.now)
        if admission.held_count:
            self._tick_soon()

    def _send(self, ticket: Ticket, job: _Job) -> None:
        run = self.conductor.start(ticket, self.now)
        job.run = run
        engine = self.engines[run.pod.name]
        session = self.sessions[job.session]
        output = -(-session[job.k].output_tokens // SCALE)
        job.answer = _answer(session, job.session, job.k, output)
        prompt = _tokens(job.session, session[job.k].blocks)
        engine.add(f"{job.session}/{job.k}", job, prompt, output)
        self._step(engine)

    def _tell(self, pod: str, action: dict[str, Any]) -> None:
        self.engines[pod].tell(hints.envelope(str(next(self._messages)), action))

    # -- the pods --------------------------------------------------------------------------------

    def _step(self, engine: Engine) -> None:
        if not engine.busy and engine.jobs:
            engine.busy = True
            # After all that happens at this instant, as an engine takes what has arrived.
            self._at(self.now, lambda: self._begin(engine))

    def _begin(self, engine: Engine) -> None:
        self._at(self.now + engine.begin_step(), lambda: self._finish(engine))

    def _finish(self, engine: Engine) -> None:
        began, done = engine.finish_step(self.now)
        for job in began:
            assert job.run is not None
            self.conductor.first_token(job.run, self.now)
        for job in done:
            self._ended(job)
        self._step(engine)

    def _ended(self, job: _Job) -> None:
        assert job.run is not None
        i, k = job.session, job.k
        session = self.sessions[i]
        turn = session[k]
        pod = job.run.pod.name
        forecast = self.setup.forecast
        curve = forecast(session, k) if forecast is not None else None
        over = forecast is not None and curve is None
        ended = Ended(
            prompt_tokens=BLOCK_TOKENS * len(turn.blocks),
            output_tokens=turn.output_tokens,
            cached_tokens=job.cached_tokens,
            idle_kind="ended" if over else turn.idle_kind,
            forecast=curve,
        )
        self.home[i] = pod
        mean = self.output_tokens.get(i, turn.output_tokens)
        self.output_tokens[i] = 0.7 * mean + 0.3 * turn.output_tokens
        self.outcome.turns.append(
            TurnRecord(
                session=i,
                pod=pod,
                latency_s=self.now - job.arrived_at,
                first_token_s=job.first_token_at - job.arrived_at,
                held_s=job.run.ticket.held_s,
                prompt_tokens=ended.prompt_tokens,
                cached_tokens=job.cached_tokens or 0,
                output_tokens=turn.output_tokens,
            )
        )
        if self.setup.patched and forecast is not None:
            self._tell(pod, hints.reuse(f"s{i}", ended.idle_kind, curve))
        self.conductor.end(job.run, self.now, ended)
        self._left -= 1
        self.progress(1)
        if k + 1 < len(session):
            self._at(self.now + session[k + 1].gap_s, lambda: self._arrive(i, k + 1))


def _shared(session: Session, k: int) -> int:
    """Blocks of the prompt that are unchanged since the turn before."""
    if not k:
        return 0
    n = 0
    for a, b in zip(session[k - 1].blocks, session[k].blocks, strict=False):
        if a != b:
            break
        n += 1
    return n


def _heads(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """What another session may have left of the prompt, longest first."""
    return [
        (blocks[n - 1], BLOCK_TOKENS * n)
        for n in HEAD_BLOCKS
        if n <= len(blocks) and blocks[n - 1] >= SHARED
    ]


def _tokens(session: int, blocks: Sequence[int]) -> list[int]:
    base = (session + 1) << 32
    return [b if b >= SHARED else base + b for b in blocks for _ in range(BLOCK)]


def _answer(turns: Session, session: int, k: int, output: int) -> list[int]:
    """The answer's tokens: those the next prompt has after this one, as far as it goes on."""
    prompt = turns[k].blocks
    answer: list[int] = []
    if k + 1 < len(turns) and turns[k + 1].blocks[: len(prompt)] == prompt:
        answer = _tokens(session, turns[k + 1].blocks[len(prompt) :])[:output]
    return answer + [-(k + 1) * 1_000_000 - n for n in range(output - len(answer))]
