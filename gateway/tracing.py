"""Spans of turns, sent by OTLP over HTTP (docs/tracing.md). Imported only where tracing is on.

A turn is a SERVER span. What the gateway does within it are INTERNAL children; each try on a pod is
a CLIENT child, whose W3C context the pod gets. Names and counts go into spans, no text of a
conversation, no argument of a tool, no key.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec, TypeAlias
from urllib.parse import urlsplit

from gateway import __version__
from gateway.config import ConfigError, TracingSettings

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    from opentelemetry.trace import Span, SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    raise ConfigError(
        "tracing.endpoint: is set and OpenTelemetry is not installed; allowed: unset, or a URL"
        " after pip install 'cachewise-gateway[otel]'"
    ) from None

if TYPE_CHECKING:
    from gateway.admission import GapForecast, Ticket
    from gateway.dialects.turn import TurnOutcome, TurnRequest
    from gateway.idle import IdleKind
    from gateway.routing import Decision
    from gateway.turns import TurnFlow

logger = logging.getLogger("gateway.tracing")

MAX_QUEUED_SPANS: Final = 8_192
"""Ended spans that wait to be sent; beyond it the oldest are dropped."""
SEND_S: Final = 1.0
"""Spans wait this long for others to go with them."""
TIMEOUT_S: Final = 5.0
STOP_S: Final = 3.0
"""At shutdown the last spans have this long to be sent."""
CONTEXT_HEADERS: Final = frozenset(("traceparent", "tracestate"))
OPERATIONS: Final = {"completions": "text_completion"}
FAILED: Final = frozenset(("broken_off", "failed", "cancelled"))

Attributes: TypeAlias = dict[str, str | int | float | bool | list[str]]
_P = ParamSpec("_P")
_propagator = TraceContextTextMapPropagator()


class Tracer:
    """Makes the spans of turns and sends them in the background. Enter `running` to send."""

    def __init__(self, settings: TracingSettings, fault: Callable[[], None]) -> None:
        """``fault`` counts what went wrong with a span; no turn notices."""
        self.fault = fault
        self._settings = settings
        made = Resource({"service.name": "cachewise-gateway", "service.version": __version__})
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=made.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        self.tracer = self._provider.get_tracer("gateway", __version__)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send spans from a thread of their own, as long as the context lasts."""
        exporter = OTLPSpanExporter(endpoint=self._settings.traces_url, timeout=TIMEOUT_S)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter, max_queue_size=MAX_QUEUED_SPANS, schedule_delay_millis=1000 * SEND_S
            )
        )
        try:
            yield
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """Send what is left, in a thread that nobody waits for longer than `STOP_S`."""
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()

        def stop() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(stopped.set)

        threading.Thread(target=stop, name="last spans", daemon=True).start()
        try:
            async with asyncio.timeout(STOP_S):
                await stopped.wait()
        except TimeoutError:
            logger.warning("the last spans could not be sent in %.0f s", STOP_S)

    def turn(self, path: str, headers: Mapping[bytes, bytes], now: float) -> TurnTrace:
        """The trace of a turn that arrived at ``now``, within the client's own if it has one."""
        carrier = {
            name: headers[name.encode()].decode("latin-1")
            for name in CONTEXT_HEADERS
            if name.encode() in headers
        }
        return TurnTrace(self, path, _propagator.extract(carrier, Context()), now)


def harmless(
    method: Callable[Concatenate[TurnTrace, _P], None],
) -> Callable[Concatenate[TurnTrace, _P], None]:
    """A fault within is counted and logged, and harms nobody."""

    @functools.wraps(method)
    def guarded(self: TurnTrace, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            self.owner.fault()
            logger.exception("a span is lost")

    return guarded


class TurnTrace:
    """The spans of one turn; `end` ends them all. Times are those of the monotonic clock."""

    def __init__(self, owner: Tracer, path: str, context: Context, now: float) -> None:
        self.owner = owner
        self._tracer = owner.tracer
        self._epoch_s = time.time() - time.monotonic()
        self._root = self._tracer.start_span(
            f"POST {path}",
            context,
            SpanKind.SERVER,
            {"http.request.method": "POST", "http.route": path, "url.path": path},
            start_time=self._ns(now),
        )
        self._within = trace.set_span_in_context(self._root, Context())
        self._try: Span | None = None
        self._within_try = self._within
        self._routing_since = self._sent_at = now
        self._first_byte_at: float | None = None
        self._pod_status = 0
        self.error: str | None = None
        """The code of the error that the gateway itself answered."""

    def _ns(self, at: float) -> int:
        return round((at + self._epoch_s) * 1e9)

    def _child(
        self, name: str, context: Context, start: float, end: float, attributes: Attributes
    ) -> None:
        if self._root.is_recording():
            span = self._tracer.start_span(
                name, context, SpanKind.INTERNAL, attributes, start_time=self._ns(start)
            )
            span.end(self._ns(end))

    @harmless
    def parsed(self, start: float, end: float) -> None:
        """The body is understood and its session found."""
        self._routing_since = end
        self._child("parse", self._within, start, end, {})

    @harmless
    def held(self, start: float, end: float, hold_end: str) -> None:
        self._child("hold", self._within, start, end, {"cachewise.hold_end": hold_end})

    @harmless
    def routed(self, ticket: Ticket, end: float) -> None:
        """Admission and routing have decided; a turn that is held may go elsewhere in the end."""
        self._child(
            "route",
            self._within,
            self._routing_since,
            end,
            _decided(ticket.decision)
            | {
                "cachewise.held": ticket.held,
                "cachewise.prompt_tokens_estimated": ticket.decision.prompt_tokens,
            },
        )

    @harmless
    def sending(self, flow: TurnFlow, request: TurnRequest, now: float) -> None:
        """A try on a pod begins; see `context`."""
        assert flow.decision is not None
        operation = OPERATIONS.get(request.wire, "chat")
        address = urlsplit(flow.decision.pod.url)
        attributes = _decided(flow.decision) | {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": request.model[:128],
            "gen_ai.request.stream": request.stream,
            "http.request.method": "POST",
            "server.address": address.hostname or "",
            "server.port": address.port or (443 if address.scheme == "https" else 80),
        }
        if flow.attempts > 1:
            attributes["http.request.resend_count"] = flow.attempts - 1
        self._try = self._tracer.start_span(
            f"{operation} {request.model[:128]}",
            self._within,
            SpanKind.CLIENT,
            attributes,
            start_time=self._ns(now),
        )
        self._within_try = trace.set_span_in_context(self._try, Context())
        self._sent_at = now

    def context(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Headers for the pod with the context of the try in place of the client's."""
        try:
            carrier: dict[str, str] = {}
            _propagator.inject(carrier, self._within_try)
        except Exception:
            self.owner.fault()
            logger.exception("a span's context is lost")
            return headers
        kept = [(name, value) for name, value in headers if name.lower() not in CONTEXT_HEADERS]
        return [*kept, *carrier.items()]

    @harmless
    def tried_in_vain(self, reason: str, now: float) -> None:
        """The pod did not answer; ``reason`` as in `cachewise_retries_total`."""
        self._routing_since = now
        if self._try is not None:
            self._try.set_attribute("error.type", reason)
            self._try.set_status(StatusCode.ERROR)
            self._try.end(self._ns(now))
            self._try = None

    @harmless
    def first_byte(self, status: int, now: float) -> None:
        """The pod begins to answer, with an HTTP status."""
        self._first_byte_at = now
        self._pod_status = status
        self._child("first byte", self._within_try, self._sent_at, now, {})

    @harmless
    def hinted(
        self, start: float, end: float, idle_kind: IdleKind, forecast: GapForecast | None
    ) -> None:
        """The gap that follows is forecast, and the pod's hint queued."""
        attributes: Attributes = {"cachewise.idle_kind": idle_kind}
        if forecast is not None:
            attributes["cachewise.p_return"] = forecast.p_return
        self._child("hint", self._within, start, end, attributes)

    @harmless
    def end(self, flow: TurnFlow, outcome: TurnOutcome | None, now: float) -> None:
        """The turn is over, however it ended."""
        if self._root.is_recording():
            self._describe(flow, outcome, now)
        if self._try is not None:
            self._try.end(self._ns(now))
        self._root.end(self._ns(now))

    def _describe(self, flow: TurnFlow, outcome: TurnOutcome | None, now: float) -> None:
        root: Attributes = {"cachewise.outcome": flow.outcome}
        attempt: Attributes = {}
        if flow.status:
            root["http.response.status_code"] = flow.status
        if flow.tenant is not None:
            root["cachewise.tenant"] = flow.tenant.name
        if flow.held_s:
            root["cachewise.held_s"] = flow.held_s
        if flow.turn is not None:
            session = flow.turn.session
            attempt["gen_ai.conversation.id"] = session.sid
            root |= {
                "gen_ai.conversation.id": session.sid,
                "cachewise.client": session.client,
                "cachewise.request_class": flow.turn.request_class,
                "cachewise.identified_by": flow.turn.identified_by,
            }
            if flow.turn.gap is not None:
                root["cachewise.gap_s"] = flow.turn.gap.seconds
                root["cachewise.gap_kind"] = flow.turn.gap.kind
            if flow.turn.change.cause is not None:
                root["cachewise.prefix_break"] = flow.turn.change.cause
        if outcome is not None:
            attempt |= _answered(outcome)
        pod_error = str(self._pod_status) if flow.outcome == "pod_error" else None
        error = self.error or pod_error or (flow.outcome if flow.outcome in FAILED else None)
        if error is not None:
            root["error.type"] = error
            told_in_stream = flow.status < 400
            if flow.status >= 500 or flow.outcome in FAILED or told_in_stream:
                self._root.set_status(StatusCode.ERROR)
        if self._try is not None:
            if self._first_byte_at is not None:
                attempt["http.response.status_code"] = self._pod_status
                seconds = self._first_byte_at - self._sent_at
                attempt["gen_ai.response.time_to_first_chunk"] = seconds
                self._child("stream", self._within_try, self._first_byte_at, now, {})
            if error is not None:
                attempt["error.type"] = error
                self._try.set_status(StatusCode.ERROR)
            self._try.set_attributes(attempt)
        self._root.set_attributes(root)


def _decided(decision: Decision) -> Attributes:
    return {
        "cachewise.pod": decision.pod.name,
        "cachewise.route_reason": decision.reason,
        "cachewise.resident_tokens": decision.resident_tokens,
    }


def _answered(outcome: TurnOutcome) -> Attributes:
    """What the answer said of itself."""
    found: Attributes = {}
    if outcome.stop_reason is not None:
        found["gen_ai.response.finish_reasons"] = [outcome.stop_reason[:64]]
    if outcome.tool_calls:
        found["cachewise.tools"] = [call.name[:64] for call in outcome.tool_calls[:8]]
    if outcome.usage is not None:
        found["gen_ai.usage.input_tokens"] = outcome.usage.prompt_tokens
        found["gen_ai.usage.output_tokens"] = outcome.usage.output_tokens
        if outcome.usage.cached_tokens is not None:
            found["gen_ai.usage.cache_read.input_tokens"] = outcome.usage.cached_tokens
    return found
