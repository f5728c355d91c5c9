"""One turn, from arrival to last byte: the flow of the design, top to bottom.

    access → body → parse → sessions.begin → admission (may hold) → relay (an observer reads a copy;
    at the tool calls the pod is told what to expect) → sessions.end → admission.end

What is clever may fail and the turn goes on as a plain relay: such a fault is counted in
``cachewise_degraded_total`` and logged once a turn. Every count that a turn raises is lowered again
on every exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson

from gateway.access import Tenant
from gateway.admission import Ask, Ended, GapForecast, QueueFull, Ticket
from gateway.ask import ask_for, priority_of
from gateway.conductor import Run
from gateway.connection import writer
from gateway.dialects import Dialect, MalformedRequestError, parse, without_hints
from gateway.dialects.turn import Observer, TurnOutcome, TurnRequest
from gateway.errors import GatewayError, pods_error, shutting_down, stream_error
from gateway.fleet.pod import Pod
from gateway.gateway import Gateway, scope_of
from gateway.hold import HeldTurn, HoldEnd, patience, queue_full
from gateway.holds import Priority
from gateway.losses import LossCause
from gateway.relay import (
    Answer,
    BrokenOffError,
    ClientGoneError,
    Departure,
    Dropped,
    PodError,
    Refused,
    TimedOut,
)
from gateway.request import (
    Receive,
    Scope,
    Send,
    authenticate,
    map_model,
    no_answer,
    request_body,
    send_error,
)
from gateway.routing import Decision, choose
from gateway.sessions import Turn
from gateway.turn_history import held_for
from gateway.turn_log import log_turn

if TYPE_CHECKING:
    from gateway.tracing import Tracer, TurnTrace

logger = logging.getLogger("gateway.turns")


class TurnEndpoint:
    """The ASGI endpoint of one dialect's turns."""

    def __init__(self, gateway: Gateway, dialect: Dialect) -> None:
        self.gateway = gateway
        self.dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await TurnFlow(self.gateway, self.dialect, scope, receive, send).run()


class TurnFlow:
    """The state of one turn on its way through."""

    def __init__(
        self, gateway: Gateway, dialect: Dialect, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.gateway = gateway
        self.dialect = dialect
        self.scope = scope
        self.receive = receive
        self.send = send
        self.started_at = time.monotonic()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.priority: Priority = "interactive"
        self.tenant: Tenant | None = None
        self.request: TurnRequest | None = None
        self.turn: Turn | None = None
        self.ticket: Ticket | None = None
        """Open from admission to the end of the try on a pod."""
        self.pod_run: Run | None = None
        self.decision: Decision | None = None
        self.observer: Observer | None = None
        self.forecast: GapForecast | None = None
        self.told = False
        """Whether the pod has been told of the gap that follows."""
        self.responding = False
        self.event_stream = False
        self.outcome = "failed"
        self.status = 0
        self.waiting_since: float | None = None
        """Its arrival, or that of its first try if it was sent away."""
        self.spared = False
        """It was when its client left (`Ask.spared`)."""
        self.attempts = 0
        self.held_s = 0.0
        self.first_byte_s: float | None = None
        self.first_byte_at: float | None = None
        self.hold: dict[str, Any] | None = None
        """Why it was held."""
        self.losses: dict[LossCause, int] = {}
        self.call_durations_s: list[float | None] | None = None
        """How long each call of the turn before ran, if the client says so."""
        self.trace: TurnTrace | None = None
        """None unless tracing is on."""

    async def run(self) -> None:
        """Serve the turn; whatever happens, the client gets an answer and the books balance."""
        if self.gateway.tracer is not None:
            self._begin_trace(self.gateway.tracer)
        try:
            await self._serve()
        except GatewayError as error:
            await self._answer_error(error)
        except ClientGoneError:
            self.outcome = "client_gone"
        except asyncio.CancelledError:
            if self.gateway.draining:
                await self._answer_error(shutting_down())
            self.outcome = "cancelled"
            raise
        except BrokenOffError:
            await self._answer_error(
                GatewayError(502, "pod_failed", "The pod failed in the middle of its answer.")
            )
            self.outcome = "broken_off"
        except Exception:
            logger.exception("a turn failed")
            await self._answer_error(
                GatewayError(500, "internal_error", "The gateway failed; its log says where.")
            )
        finally:
            self._settle()

    # -- on the way in ---------------------------------------------------------------------------

    async def _serve(self) -> None:
        gateway = self.gateway
        if gateway.draining:
            raise shutting_down()
        self.tenant = authenticate(gateway, self.scope)
        self.priority = priority_of(self.headers)
        body = await request_body(gateway, self.scope, self.receive)
        arrived_at = time.monotonic()
        try:
            request = parse(self.dialect, body)
            if request.hinted and self.tenant.name not in gateway.trusted:
                body = without_hints(body)
                request.hinted = False
        except MalformedRequestError as error:
            raise GatewayError(400, "invalid_request", str(error)) from None
        self.request = request
        served = gateway.served_model(request.model)
        if served != request.model:
            body = map_model(body, request.model, served)
            request.model = served
        recalled = await self._recall(request)
        self.turn = self._begin(request, arrived_at, recalled)
        gateway.history.begin(self)
        if self.trace is not None:
            self.trace.parsed(arrived_at, time.monotonic())
        async with Departure(self.receive):
            await self._relay(request, body)

    async def _recall(self, request: TurnRequest) -> str | None:
        """Ask the other replicas for the session, where there are any and it is not known here."""
        gateway = self.gateway
        if gateway.sharing is None or len(request.segments) <= 2:
            return None
        assert self.tenant is not None
        return await gateway.sharing.recall(
            self.headers, request, self.tenant.name, scope_of(self.tenant)
        )

    def _begin(self, request: TurnRequest, now: float, recalled: str | None) -> Turn | None:
        gateway = self.gateway
        assert self.tenant is not None
        if len(request.segments) <= 2:
            return None  # not of its dialect's shape: the pod will say so
        try:
            turn = gateway.sessions.begin(
                self.headers, request, self.tenant.name, scope_of(self.tenant), now, recalled
            )
        except Exception:
            self._degraded("session")
            return None
        metrics = gateway.metrics
        metrics.identified[turn.identified_by,].inc()
        if turn.gap is not None:
            metrics.gaps[turn.gap.kind,].observe(turn.gap.seconds)
        if turn.change.cause is not None:
            metrics.prefix_breaks.labels(turn.change.cause).inc()
            metrics.prefix_lost_tokens.labels(turn.change.cause).inc(turn.lost_tokens)
        with self._survived("forecast"):
            self.call_durations_s = gateway.loop.gap_ended(turn, self.headers)
        if gateway.sharing is not None:
            gateway.sharing.began(turn)
        return turn

    # -- to the pod and back ---------------------------------------------------------------------

    async def _relay(self, request: TurnRequest, body: bytes) -> None:
        """Try pods until one begins to answer, then pass the answer on."""
        gateway = self.gateway
        failed: list[Pod] = []
        again: Pod | None = None
        last: PodError | None = None
        while self.attempts < gateway.settings.relay.max_attempts:
            pods = [again] if again is not None else gateway.fleet.able(request.model, failed)
            if not pods:
                break
            again = None
            self.attempts += 1
            pod = await self._admitted(request, pods)
            sent_at = time.monotonic()
            if self.trace is not None:
                self.trace.sending(self, request, sent_at)
            if self.attempts == 1:
                gateway.metrics.overhead.observe(sent_at - self.started_at - self.held_s)
            try:
                answer = await gateway.relay.open(
                    pod,
                    "POST",
                    self.dialect.path,
                    self.scope["query_string"].decode("latin-1"),
                    self._pod_headers(pod, request),
                    body,
                )
            except PodError as error:
                self._leave_pod()
                if self.trace is not None:
                    self.trace.tried_in_vain(error.reason, time.monotonic())
                last = error
                if isinstance(error, TimedOut):
                    break
                if isinstance(error, Refused):
                    gateway.fleet.lost(pod, str(error))
                elif isinstance(error, Dropped) and pod.ready and pod not in failed:
                    again = pod  # a kept connection may have been closed for age
                failed.append(pod)
                gateway.metrics.retries.labels(error.reason).inc()
                continue
            try:
                if (
                    answer.status == 503
                    and self.attempts < gateway.settings.relay.max_attempts
                    and gateway.fleet.able(request.model, [*failed, pod])
                ):
                    self._leave_pod()
                    if self.trace is not None:
                        self.trace.tried_in_vain("status_503", time.monotonic())
                    failed.append(pod)
                    gateway.metrics.retries.labels("status_503").inc()
                    continue
                await self._pass_on(answer, pod, sent_at)
            finally:
                answer.close()
            return
        raise no_answer(request.model, last)

    async def _admitted(self, request: TurnRequest, pods: Sequence[Pod]) -> Pod:
        """The pod that takes the turn, once it has a place there: `_leave_pod` or `_settle` gives
        it back. Raises `GatewayError` if it is held too long."""
        gateway = self.gateway
        ticket = self.ticket = self._arrive(self._ask(request), pods)
        if self.trace is not None:
            self.trace.routed(ticket, time.monotonic())
        gateway.loop.open.add(ticket)
        if ticket.held and gateway.loop.admission.mode == "enforce":
            await self._hold(ticket)
        self.decision = ticket.decision
        self.pod_run = gateway.loop.conductor.start(ticket, time.monotonic())
        gateway.metrics.decisions[ticket.decision.policy, ticket.decision.reason].inc()
        return ticket.decision.pod

    def _ask(self, request: TurnRequest) -> Ask:
        gateway = self.gateway
        assert self.tenant is not None
        gateway.turns_asked += 1
        if self.waiting_since is None:
            sid = self.turn.session.sid if self.turn is not None else ""
            self.waiting_since, self.spared = gateway.loop.sent_away.waited(sid, self.started_at)
        return ask_for(
            self.turn,
            request,
            self.tenant.name,
            gateway.settings.admission.tenant_weights.get(self.tenant.name, 1.0),
            self.priority,
            gateway.turns_asked,
            self.waiting_since,
            self.spared,
        )

    def _arrive(self, ask: Ask, pods: Sequence[Pod]) -> Ticket:
        """Ask admission; where it fails, choose a pod without it."""
        gateway = self.gateway
        now = time.monotonic()
        try:
            return gateway.loop.conductor.arrive(ask, pods, now)
        except QueueFull:
            gateway.loop.sent_away.add(ask.arrival.sid, ask.arrived_at or now, ask.spared, now)
            self._hold_ended("queue_full", 0.0)
            raise queue_full(gateway.turns_asked % 32 / 32) from None
        except Exception:
            self._degraded("admission")
        self._strike(ask, now)
        policy = gateway.settings.routing.policy
        try:
            decision = choose(pods, ask.arrival, policy, gateway.turns_asked)
        except Exception:
            self._degraded("route")
            pod = min(pods, key=lambda pod: pod.in_flight)
            decision = Decision(pod, policy, "fallback", 0, 1, ())
        return Ticket(ask, decision, now, -1)

    async def _hold(self, ticket: Ticket) -> None:
        """Wait for a place as the client can bear it."""
        loop = self.gateway.loop
        assert self.request is not None
        held = ticket.context = HeldTurn(self.send)
        if self.responding:
            held.began = True
        began_at = time.monotonic()
        end: HoldEnd = "failed"
        with self._survived("history"):
            self.hold = held_for(ticket, loop.admission)
        loop.waiting.add(ticket)
        try:
            await held.wait(
                patience(self.gateway.settings.admission, self.headers, self.request.stream)
            )
            end = "released"
        except GatewayError as error:
            end = HOLD_ENDS.get(error.code, "failed")
            raise
        except asyncio.CancelledError:
            end = "shutdown" if self.gateway.draining else "client_gone"
            raise
        finally:
            loop.waiting.discard(ticket)
            if held.began:
                self.responding = self.event_stream = True
                self.status = 200
            now = time.monotonic()
            self.held_s += now - began_at
            self._hold_ended(end, now - began_at)
            if self.trace is not None:
                self.trace.held(began_at, now, end)
            if end in ("too_long", "client_gone"):
                # A client that leaves by itself has patience for more tries; ours is at its end.
                spared = ticket.spared and end == "client_gone"
                loop.sent_away.add(ticket.ask.arrival.sid, ticket.arrived_at, spared, now)

    def _hold_ended(self, end: HoldEnd, held_s: float) -> None:
        self.gateway.metrics.holds[end,].observe(held_s)

    def _leave_pod(self, ended: Ended | None = None) -> None:
        """The try on this pod is over: give back all that it holds. Idempotent; must not raise."""
        ticket, run = self.ticket, self.pod_run
        self.ticket = self.pod_run = None
        if ticket is None:
            return
        loop = self.gateway.loop
        loop.open.discard(ticket)
        now = time.monotonic()
        try:
            if run is None:
                loop.admission.end(ticket, now)
                return
            self.losses = loop.conductor.end(run, now, ended)
            for cause, tokens in self.losses.items():
                self.gateway.metrics.lost_tokens[cause,].inc(tokens)
            if loop.admission.mode == "observe" and ticket.held_s > 0:
                self._hold_ended("observed", ticket.held_s)
        except Exception:
            self._degraded("admission")
            self._strike(ticket.ask, now)
            if run is not None:
                run.serving.__exit__(None, None, None)  # does nothing the second time

    def _strike(self, ask: Ask, now: float) -> None:
        """Take out what a fault may have left of the turn in admission's books."""
        with contextlib.suppress(Exception):
            self.gateway.loop.strike(ask, now)

    def _pod_headers(self, pod: Pod, request: TurnRequest) -> list[tuple[str, str]]:
        gateway = self.gateway
        session_id = self.turn.session.sid if self.turn is not None else None
        headers = gateway.relay.headers_for(pod, self.scope["headers"], session_id)
        token = gateway.settings.hints.token
        if request.hinted and token is not None:
            headers.append(("X-Kv-Hints-Token", token.get_secret_value()))
        return headers if self.trace is None else self.trace.context(headers)

    async def _pass_on(self, answer: Answer, pod: Pod, sent_at: float) -> None:
        now = time.monotonic()
        self.first_byte_s = now - sent_at
        self.first_byte_at = now
        if self.trace is not None:
            self.trace.first_byte(answer.status, now)
        self.gateway.metrics.first_byte[pod.name,].observe(now - self.started_at)
        run = self.pod_run
        assert run is not None
        if answer.event_stream and answer.status < 300 and self.turn is not None:
            self.gateway.loop.conductor.first_token(run, now)
        else:
            pod.prefilled(run.prefill)
        if self.responding and (answer.status >= 300 or not answer.event_stream):
            await self._tell_in_stream(pods_error(answer.status, answer.body))
            self.outcome = "pod_error"
            return
        self.status = answer.status
        self.event_stream = answer.event_stream
        if answer.status < 300:
            make = self.dialect.stream if answer.event_stream else self.dialect.whole
            self.observer = make()
        extra: list[tuple[bytes, bytes]] = []
        if b"x-cachewise-route" in self.headers and self.decision is not None:
            extra.append((b"x-cachewise-route", orjson.dumps(self.decision.explain())))
        begun, self.responding = self.responding, True
        observe, write = self._observing(), writer(self.scope)
        await answer.pass_on(self.send, extra, observe, self._unobserved, begun, write)
        self.outcome = "ok" if answer.status < 400 else "pod_error"

    def _observing(self) -> Callable[[bytes], None] | None:
        """What reads the copy: the observer, and once it knows why the answer ends, the loop."""
        observer = self.observer
        if observer is None or not self.event_stream:
            return observer.feed if observer is not None else None
        feed, outcome = observer.feed, observer.outcome

        def observe(chunk: bytes) -> None:
            feed(chunk)
            if outcome.stop_reason is not None and not self.told:
                self._foretell(outcome, time.monotonic())

        return observe

    def _unobserved(self) -> None:
        self.observer = None
        self._degraded("observe")

    def _foretell(self, outcome: TurnOutcome, now: float) -> None:
        """The answer asks for its tools: forecast the gap, tell the pod."""
        turn, run = self.turn, self.pod_run
        self.told = True
        if turn is None or run is None or outcome.error:
            return
        with self._survived("forecast"):
            loop = self.gateway.loop
            kind = self.gateway.sessions.idle_kind_after(turn, outcome.tool_calls)
            self.forecast = loop.gap_begins(turn.session, outcome.tool_calls, kind, run.pod, now)
            if self.trace is not None:
                self.trace.hinted(now, time.monotonic(), kind, self.forecast)

    async def _answer_error(self, error: GatewayError) -> None:
        """Say it as the dialect does. An answer that has begun and is no event stream cannot say
        it: it is left short, and the server cuts the connection."""
        self.outcome = "gateway_error"
        if self.trace is not None:
            self.trace.error = error.code
        if not self.responding:
            self.status = error.status
            await send_error(self.gateway, error, self.dialect.family, self.send)
        elif self.event_stream:
            await self._tell_in_stream(error)

    async def _tell_in_stream(self, error: GatewayError) -> None:
        last = stream_error(error, self.dialect.wire)
        await self.send({"type": "http.response.body", "body": last, "more_body": False})

    # -- closing the books -----------------------------------------------------------------------

    def _settle(self) -> None:
        """Runs once, on every exit; must not raise."""
        now = time.monotonic()
        outcome = self._finish_observer()
        gateway = self.gateway
        turn = self.turn
        if self.outcome == "client_gone" and outcome is not None and outcome.stop_reason:
            self.outcome = "ok"  # SDKs close the connection once they have read the last event
        ended: Ended | None = None
        if turn is not None:
            answered = self.outcome == "ok" and outcome is not None and not outcome.error
            try:
                gateway.sessions.end(turn, outcome if answered else None, now)
                if answered:
                    assert outcome is not None
                    if not self.told:
                        self._foretell(outcome, now)
                    ended = self._ended(turn, outcome)
                elif self.told:
                    gateway.loop.gap_is_off(turn.session)
                self._learn(turn, outcome)
                if gateway.sharing is not None and ended is not None and self.ticket is not None:
                    gateway.sharing.ended(turn, self.ticket, ended)
            except Exception:
                self._degraded("settle")
        self._leave_pod(ended)
        wire = self.dialect.wire
        client = turn.session.client if turn is not None else "other"
        gateway.metrics.turns[wire, client, self.outcome].inc()
        gateway.metrics.turn_duration[wire,].observe(now - self.started_at)
        with self._survived("history"):
            gateway.history.end(self, now, outcome)
        if gateway.recorder is not None:
            try:
                gateway.recorder.ended(self, now, outcome)
            except Exception:
                self._degraded("record")
        log_turn(self, now, outcome)
        if self.trace is not None:
            self.trace.end(self, outcome, now)

    def _finish_observer(self) -> TurnOutcome | None:
        observer = self.observer
        if observer is None:
            return None
        try:
            observer.finish()
        except Exception:
            self._degraded("observe")
            return None
        return observer.outcome

    def _ended(self, turn: Turn, outcome: TurnOutcome) -> Ended:
        """What admission needs to know of the answer."""
        usage = outcome.usage
        known = usage is not None and usage.prompt_tokens > 0
        assert turn.session.idle_kind is not None
        return Ended(
            prompt_tokens=usage.prompt_tokens if usage and known else turn.prompt_tokens,
            output_tokens=usage.output_tokens if usage and known else 0,
            cached_tokens=usage.cached_tokens if usage and known else None,
            idle_kind=turn.session.idle_kind,
            forecast=self.forecast,
        )

    def _learn(self, turn: Turn, outcome: TurnOutcome | None) -> None:
        """Note what the pod said of its work, and where the session now lives."""
        decision = self.decision
        if decision is None or self.first_byte_s is None or self.status >= 400:
            return
        metrics = self.gateway.metrics
        pod = decision.pod
        session = turn.session
        usage = outcome.usage if outcome is not None else None
        if usage is not None and usage.prompt_tokens:
            metrics.prompt_tokens[pod.name,].inc(usage.prompt_tokens)
            metrics.output_tokens[pod.name,].inc(usage.output_tokens)
            if usage.cached_tokens is not None:
                metrics.cached_tokens[pod.name,].inc(usage.cached_tokens)
                metrics.expected_cached_tokens[pod.name,].inc(decision.resident_tokens)
        if outcome is not None:
            metrics.tool_calls[session.client,].inc(len(outcome.tool_calls))
        session.pod = pod.name
        session.decision = decision

    def _begin_trace(self, tracer: Tracer) -> None:
        with self._survived("trace"):
            self.trace = tracer.turn(self.dialect.path, self.headers, self.started_at)

    @contextmanager
    def _survived(self, stage: str) -> Iterator[None]:
        """Count and log a fault within, and go on."""
        try:
            yield
        except Exception:
            self._degraded(stage)

    def _degraded(self, stage: str) -> None:
        self.gateway.metrics.degraded.labels(stage).inc()
        logger.exception("%s failed; the turn goes on as a plain relay", stage)


HOLD_ENDS: dict[str, HoldEnd] = {
    "held_too_long": "too_long",
    "no_pod_ready": "no_pod",
    "shutting_down": "shutdown",
}
