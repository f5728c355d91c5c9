"""One turn, from arrival to last byte: the flow of the design, top to bottom.

    access → body → parse → sessions.begin → route → relay (an observer reads a copy) → sessions.end

What is clever may fail and the turn goes on as a plain relay: such a fault is counted in
``cachewise_degraded_total`` and logged once a turn. Every count that a turn raises is lowered again
on every exit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import orjson

from gateway.access import Tenant, Unauthorized
from gateway.decompress import decompress
from gateway.dialects import (
    Dialect,
    MalformedRequestError,
    parse,
    read_model,
    splice_model,
)
from gateway.dialects.turn import Observer, TurnOutcome, TurnRequest
from gateway.errors import Dialect as Family
from gateway.errors import GatewayError, render, stream_error
from gateway.fleet.pod import Pod
from gateway.gateway import Gateway, scope_of
from gateway.logs import turn_logged
from gateway.relay import (
    Answer,
    BrokenOffError,
    ClientGoneError,
    Departure,
    Dropped,
    PodError,
    Refused,
    TimedOut,
    read_body,
    too_large,
)
from gateway.routing import Arrival, Decision, choose
from gateway.sessions import Turn

logger = logging.getLogger("gateway.turns")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[Any], Awaitable[None]]

LARGE_BODY_BYTES = 256 * 1024
"""Compressed bodies above this unfold in a thread, not on the event loop."""
HEAD_SEGMENTS = (3, 2, 1)
"""Prefix links under which a prompt's beginning is shared between sessions: up to the second
message, the first message, the system prompt."""


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
        self.tenant: Tenant | None = None
        self.request: TurnRequest | None = None
        self.turn: Turn | None = None
        self.decision: Decision | None = None
        self.observer: Observer | None = None
        self.responding = False
        self.event_stream = False
        self.outcome = "failed"
        self.status = 0
        self.attempts = 0
        self.first_byte_s: float | None = None
        self.tokens_ahead = 0

    async def run(self) -> None:
        """Serve the turn; whatever happens, the client gets an answer and the books balance."""
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
        except BrokenOffError as error:
            await self._answer_error(
                GatewayError(
                    502, "pod_failed", f"The pod failed in the middle of its answer ({error})."
                )
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
        body = await request_body(gateway, self.headers, self.receive)
        arrived_at = time.monotonic()
        try:
            request = parse(self.dialect, body)
        except MalformedRequestError as error:
            raise GatewayError(400, "invalid_request", str(error)) from None
        self.request = request
        served = gateway.served_model(request.model)
        if served != request.model:
            body = map_model(body, request.model, served)
            request.model = served
        self.turn = self._begin(request, arrived_at)
        async with Departure(self.receive):
            await self._relay(request, body)

    def _begin(self, request: TurnRequest, now: float) -> Turn | None:
        gateway = self.gateway
        assert self.tenant is not None
        if len(request.segments) <= 2:
            return None  # not of its dialect's shape: the pod will say so
        try:
            turn = gateway.sessions.begin(
                self.headers, request, self.tenant.name, scope_of(self.tenant), now
            )
        except Exception:
            self._degraded("session")
            return None
        metrics = gateway.metrics
        metrics.identified[turn.identified_by,].inc()
        try:
            gap_s = turn.gap.seconds if turn.gap is not None else None
            gateway.foresight.came_back(turn.session, gap_s, self.headers)
        except Exception:
            self._degraded("forecast")
        if turn.gap is not None:
            metrics.gaps[turn.gap.kind,].observe(turn.gap.seconds)
        if turn.change.cause is not None:
            metrics.prefix_breaks.labels(turn.change.cause).inc()
            metrics.prefix_lost_tokens.labels(turn.change.cause).inc(turn.lost_tokens)
        return turn

    def _route(self, pods: Sequence[Pod], request: TurnRequest) -> Decision:
        gateway = self.gateway
        gateway.turns_routed += 1
        policy = gateway.settings.routing.policy
        try:
            decision = choose(pods, self._arrival(), policy, gateway.turns_routed)
        except Exception:
            self._degraded("route")
            pod = min(pods, key=lambda pod: pod.in_flight)
            decision = Decision(pod, policy, "fallback", 0, 1, ())
        gateway.metrics.decisions[decision.policy, decision.reason].inc()
        return decision

    def _arrival(self) -> Arrival:
        turn = self.turn
        if turn is None:
            return Arrival(sid="", prompt_tokens=1, same_tokens=0, heads=[])
        session = turn.session
        return Arrival(
            sid=session.sid,
            prompt_tokens=turn.prompt_tokens,
            same_tokens=turn.same_tokens,
            heads=turn.heads(HEAD_SEGMENTS),
            home=session.pod,
            relative=turn.forked_from,
        )

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
            decision = self.decision = self._route(pods, request)
            pod = decision.pod
            uncached_tokens = decision.prompt_tokens - decision.resident_tokens
            with pod.serving(uncached_tokens) as prefill:
                self.tokens_ahead = pod.queued_prefill_tokens - uncached_tokens
                sent_at = time.monotonic()
                if self.attempts == 1:
                    gateway.metrics.overhead.observe(sent_at - self.started_at)
                try:
                    answer = await gateway.relay.open(
                        pod,
                        "POST",
                        self.dialect.path,
                        self.scope["query_string"].decode("latin-1"),
                        gateway.relay.headers_for(
                            pod,
                            self.scope["headers"],
                            self.turn.session.sid if self.turn is not None else None,
                        ),
                        body,
                    )
                except PodError as error:
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
                    pod.prefilled(prefill)
                    if (
                        answer.status == 503
                        and self.attempts < gateway.settings.relay.max_attempts
                        and gateway.fleet.able(request.model, [*failed, pod])
                    ):
                        failed.append(pod)
                        gateway.metrics.retries.labels("status_503").inc()
                        continue
                    await self._pass_on(answer, pod, sent_at)
                finally:
                    answer.close()
                return
        raise no_answer(request.model, last)

    async def _pass_on(self, answer: Answer, pod: Pod, sent_at: float) -> None:
        self.first_byte_s = time.monotonic() - sent_at
        self.gateway.metrics.first_byte[pod.name,].observe(time.monotonic() - self.started_at)
        self.status = answer.status
        self.event_stream = answer.event_stream
        if answer.status < 300:
            make = self.dialect.stream if answer.event_stream else self.dialect.whole
            self.observer = make()
        extra: list[tuple[bytes, bytes]] = []
        if b"x-cachewise-route" in self.headers and self.decision is not None:
            extra.append((b"x-cachewise-route", orjson.dumps(self.decision.explain())))
        self.responding = True
        feed = self.observer.feed if self.observer is not None else None
        await answer.pass_on(self.send, extra, feed, self._unobserved)
        self.outcome = "ok" if answer.status < 400 else "pod_error"

    def _unobserved(self) -> None:
        self.observer = None
        self._degraded("observe")

    async def _answer_error(self, error: GatewayError) -> None:
        """Say it as the dialect does. An answer that has begun and is no event stream cannot say
        it: it is left short, and the server cuts the connection."""
        self.outcome = "gateway_error"
        if not self.responding:
            self.status = error.status
            await send_error(self.gateway, error, self.dialect.family, self.send)
        elif self.event_stream:
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
        answered = False
        if turn is not None:
            try:
                answered = self.outcome == "ok" and outcome is not None and not outcome.error
                gateway.sessions.end(turn, outcome if answered else None, now)
                self._learn(turn, outcome)
            except Exception:
                self._degraded("settle")
            if answered and outcome is not None:
                self._foresee(turn, outcome)
        wire = self.dialect.wire
        client = turn.session.client if turn is not None else "other"
        gateway.metrics.turns[wire, client, self.outcome].inc()
        gateway.metrics.turn_duration[wire,].observe(now - self.started_at)
        self._log(now, outcome)

    def _foresee(self, turn: Turn, outcome: TurnOutcome) -> None:
        """When the session will be back, now that it is idle."""
        try:
            self.gateway.foresight.fell_idle(turn.session, outcome.tool_calls)
        except Exception:
            self._degraded("forecast")

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

    def _learn(self, turn: Turn, outcome: TurnOutcome | None) -> None:
        """What the answer says about the pod: its prefill rate, what its cache held."""
        decision = self.decision
        if decision is None or self.first_byte_s is None or self.status >= 400:
            return
        metrics = self.gateway.metrics
        pod = decision.pod
        session = turn.session
        usage = outcome.usage if outcome is not None else None
        prompt_tokens = turn.prompt_tokens
        output_tokens = 0
        cached_tokens = None
        if usage is not None and usage.prompt_tokens:
            prompt_tokens, output_tokens = usage.prompt_tokens, usage.output_tokens
            cached_tokens = usage.cached_tokens
            metrics.prompt_tokens[pod.name,].inc(prompt_tokens)
            metrics.output_tokens[pod.name,].inc(output_tokens)
        if cached_tokens is not None:
            metrics.cached_tokens[pod.name,].inc(cached_tokens)
            metrics.expected_cached_tokens[pod.name,].inc(decision.resident_tokens)
            pod.residency.learn(decision.resident_tokens, cached_tokens)
        if self.event_stream:
            known = cached_tokens if cached_tokens is not None else decision.resident_tokens
            pod.rate.learn(self.tokens_ahead + max(1, prompt_tokens - known), self.first_byte_s)
        if outcome is not None:
            metrics.tool_calls[session.client,].inc(len(outcome.tool_calls))
        session.pod = pod.name
        session.decision = decision
        pod.residency.touch(session.sid, prompt_tokens + output_tokens, turn.heads(HEAD_SEGMENTS))

    def _degraded(self, stage: str) -> None:
        self.gateway.metrics.degraded.labels(stage).inc()
        logger.exception("%s failed; the turn goes on as a plain relay", stage)

    def _log(self, now: float, outcome: TurnOutcome | None) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {
            "wire": self.dialect.wire,
            "status": self.status,
            "outcome": self.outcome,
            "duration_s": round(now - self.started_at, 4),
        }
        if self.tenant is not None:
            fields["tenant"] = self.tenant.name
        if self.request is not None:
            fields["model"] = self.request.model[:128]
        if self.decision is not None:
            fields["pod"] = self.decision.pod.name
            fields["reason"] = self.decision.reason
        if self.attempts > 1:
            fields["attempts"] = self.attempts
        if self.first_byte_s is not None:
            fields["first_byte_s"] = round(self.first_byte_s, 4)
        if self.turn is not None:
            session = self.turn.session
            fields |= {
                "session": session.sid,
                "client": session.client,
                "class": self.turn.request_class,
                "turn": session.turns,
            }
            if self.turn.gap is not None:
                fields["gap_s"] = round(self.turn.gap.seconds, 3)
                fields["gap_kind"] = self.turn.gap.kind
            if self.turn.change.cause is not None:
                fields["prefix_break"] = self.turn.change.cause
        if outcome is not None:
            if outcome.usage is not None:
                fields["prompt_tokens"] = outcome.usage.prompt_tokens
                fields["cached_tokens"] = outcome.usage.cached_tokens
                fields["output_tokens"] = outcome.usage.output_tokens
            if outcome.tool_calls:
                fields["tools"] = [call.name[:64] for call in outcome.tool_calls[:8]]
        turn_logged(logger, **fields)


class CountTokensEndpoint:
    """``/v1/messages/count_tokens``: passed to any pod with the model; no turn, no session."""

    def __init__(self, gateway: Gateway, path: str, family: Family) -> None:
        self.gateway = gateway
        self.path = path
        self.family = family

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self.gateway
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            authenticate(gateway, scope)
            body = await request_body(gateway, headers, receive)
            try:
                model, _ = read_model(body)
            except MalformedRequestError as error:
                raise GatewayError(400, "invalid_request", str(error)) from None
            served = gateway.served_model(model)
            if served != model:
                body = map_model(body, model, served)
            async with Departure(receive):
                await self._relay(served, scope, body, send)
        except GatewayError as error:
            await send_error(gateway, error, self.family, send)
        except (ClientGoneError, BrokenOffError):
            return

    async def _relay(self, model: str, scope: Scope, body: bytes, send: Send) -> None:
        gateway = self.gateway
        pods = sorted(gateway.fleet.able(model), key=lambda pod: pod.in_flight)
        last: PodError | None = None
        for pod in [*pods[:1], *pods]:  # a kept connection may have been closed for age
            if not pod.ready:
                continue
            headers = gateway.relay.headers_for(pod, scope["headers"], None)
            query = scope["query_string"].decode("latin-1")
            try:
                answer = await gateway.relay.open(pod, "POST", self.path, query, headers, body)
            except PodError as error:
                last = error
                if isinstance(error, TimedOut):
                    break
                if isinstance(error, Refused):
                    gateway.fleet.lost(pod, str(error))
                continue
            try:
                await answer.pass_on(send)
            finally:
                answer.close()
            return
        raise no_answer(model, last)


def no_answer(model: str, last: PodError | None) -> GatewayError:
    """Why no pod answered; ``last`` is how the last one tried failed."""
    if isinstance(last, TimedOut):
        return GatewayError(504, "pod_timeout", f"The pod gave {last}.")
    if last is not None:
        return GatewayError(
            502, "pod_unreachable", f"No pod could take the turn: {last}.", retry_after_s=2
        )
    return GatewayError(
        503,
        "no_pod_ready",
        f"No pod that serves {model[:128]!r} is ready; try again shortly.",
        retry_after_s=2,
    )


def shutting_down() -> GatewayError:
    return GatewayError(503, "shutting_down", "The gateway is shutting down.", retry_after_s=1)


def authenticate(gateway: Gateway, scope: Scope) -> Tenant:
    """The caller's tenant. Raises `GatewayError` 401."""
    try:
        return gateway.access.authenticate(scope["headers"])
    except Unauthorized as error:
        raise GatewayError(401, "invalid_api_key", str(error)) from None


async def request_body(gateway: Gateway, headers: dict[bytes, bytes], receive: Receive) -> bytes:
    """The whole body, decompressed."""
    limit_bytes = gateway.settings.relay.max_body_bytes
    if int(headers.get(b"content-length", 0)) > limit_bytes:
        raise too_large(limit_bytes)
    body = await read_body(receive, limit_bytes)
    coding = headers.get(b"content-encoding")
    if coding is None:
        return body
    name = coding.decode("latin-1")
    if len(body) > LARGE_BODY_BYTES:
        return await asyncio.to_thread(decompress, body, name, limit_bytes)
    return decompress(body, name, limit_bytes)


def map_model(body: bytes, model: str, served: str) -> bytes:
    """The body with its model's name mapped. Raises `GatewayError` 400."""
    try:
        return splice_model(body, model, served)
    except MalformedRequestError as error:
        raise GatewayError(400, "invalid_request", str(error)) from None


async def send_error(gateway: Gateway, error: GatewayError, family: Family, send: Send) -> None:
    """Answer with an error of the gateway's own, in the caller's dialect."""
    gateway.metrics.errors.labels(str(error.status)).inc()
    status, headers, body = render(error, family)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
