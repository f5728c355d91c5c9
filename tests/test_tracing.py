"""Traces of turns, as a collector gets them: a real OTLP receiver behind a real gateway."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from gateway import tracing
from gateway.config import Settings
from gateway.embedded.fleet import EmbeddedFleet
from gateway.gateway import Gateway
from tests.crowded import ENGINE, agent_body, of
from tests.served import Exchange, Pod, Running, body_of, events_of, gateway_over, until

ROOT = Path(__file__).resolve().parents[1]
SECRET = "the-secret-of-the-prompt"
TOOL = {"name": "bash", "arguments": {"command": f"echo {SECRET}"}}
CLIENT = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


class Span:
    """A span as it came over the wire."""

    def __init__(self, raw: trace_pb2.Span) -> None:
        self.raw = raw
        self.name = raw.name
        self.trace_id = raw.trace_id.hex()
        self.id = raw.span_id.hex()
        self.parent = raw.parent_span_id.hex()
        self.kind = trace_pb2.Span.SpanKind.Name(raw.kind).removeprefix("SPAN_KIND_")
        self.failed = raw.status.code == trace_pb2.Status.STATUS_CODE_ERROR
        self.attributes = {pair.key: plain(pair.value) for pair in raw.attributes}
        self.start_s, self.end_s = raw.start_time_unix_nano / 1e9, raw.end_time_unix_nano / 1e9


def plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(one) for one in value.array_value.values]
    return getattr(value, kind or "string_value")


class Collector:
    """An OTLP/HTTP receiver that keeps all spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.posts = 0
        self.status = 200
        self.stuck: asyncio.Event | None = None
        """While set and not fired, no post is answered."""

    async def take(self, request: web.Request) -> web.Response:
        self.posts += 1
        if self.stuck is not None:
            await self.stuck.wait()
        assert request.content_type == "application/x-protobuf"
        message = ExportTraceServiceRequest.FromString(await request.read())
        if self.status == 200:
            for group in message.resource_spans:
                self.resources.append({a.key: plain(a.value) for a in group.resource.attributes})
                for scope in group.scope_spans:
                    self.spans += map(Span, scope.spans)
        return web.Response(status=self.status)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/traces", self.take)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            if self.stuck is not None:
                self.stuck.set()
            await runner.cleanup()

    async def turn(self, timeout_s: float = 10.0) -> Turn:
        """The spans of the one turn so far, once its root has come."""
        await until(lambda: any(s.kind == "SERVER" for s in self.spans), timeout_s)
        return Turn(self.spans)


class Turn:
    """The spans of one turn, as a tree."""

    def __init__(self, spans: list[Span]) -> None:
        (self.root,) = (span for span in spans if span.kind == "SERVER")
        assert {span.trace_id for span in spans} == {self.root.trace_id}
        self.spans = spans
        self.tries = [span for span in spans if span.kind == "CLIENT"]

    def children(self, of_span: Span) -> dict[str, Span]:
        found = [span for span in self.spans if span.parent == of_span.id]
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}

    @property
    def steps(self) -> dict[str, Span]:
        """What the gateway did: the root's children but for the tries."""
        return {n: s for n, s in self.children(self.root).items() if s.kind == "INTERNAL"}


@asynccontextmanager
async def traced(collector: Collector, *pods: Pod | str, **settings: Any) -> AsyncIterator[Running]:
    async with collector.serving() as url:
        async with gateway_over(*pods, tracing={"endpoint": url}, **settings) as running:
            yield running


@pytest.fixture(autouse=True)
def _spans_are_sent_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "SEND_S", 0.05)


def script(**turn: Any) -> dict[str, str]:
    return {"x-embedded-script": json.dumps({"turns": [turn]})}


def shown_inside(inner: Span, outer: Span) -> bool:
    slack_s = 0.001
    return outer.start_s - slack_s <= inner.start_s <= inner.end_s <= outer.end_s + slack_s


async def test_a_turn_is_a_tree_of_spans_with_names_and_counts() -> None:
    collector = Collector()
    began = time.time()
    async with EmbeddedFleet(pods=1, model="m", speedup=50) as fleet:
        async with traced(collector, *fleet.urls) as running:
            await until(lambda: all(pod.takes_hints for pod in running.gateway.fleet))
            body = agent_body("messages", SECRET, stream=True, max_tokens=500)
            headers = of("s") | script(tool_calls=[TOOL], output_tokens=80)
            reply = await running.post("messages", body, headers=headers)
            assert reply.status == 200
            turn = await collector.turn()
            sid = next(iter(running.gateway.sessions)).sid
    root = turn.root
    assert root.name == "POST /v1/messages"
    assert root.parent == ""
    assert root.attributes | {"gen_ai.conversation.id": sid} == root.attributes
    assert root.attributes["http.route"] == "/v1/messages"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["cachewise.outcome"] == "ok"
    assert root.attributes["cachewise.tenant"] == "default"
    assert not root.failed
    assert began <= root.start_s <= root.end_s <= time.time()

    (attempt,) = turn.tries
    usage = events_of(reply.data)[-2][1]["usage"]
    assert attempt.name == "chat m"
    assert attempt.parent == root.id
    assert attempt.attributes["gen_ai.operation.name"] == "chat"
    assert attempt.attributes["gen_ai.provider.name"] == "vllm"
    assert attempt.attributes["gen_ai.request.model"] == "m"
    assert attempt.attributes["gen_ai.request.stream"] is True
    assert attempt.attributes["gen_ai.conversation.id"] == sid
    assert attempt.attributes["gen_ai.response.finish_reasons"] == ["tool_use"]
    assert attempt.attributes["gen_ai.usage.output_tokens"] == usage["output_tokens"] == 80
    assert attempt.attributes["gen_ai.usage.input_tokens"] > 1000
    assert attempt.attributes["gen_ai.usage.cache_read.input_tokens"] == 0
    assert attempt.attributes["server.address"] == "127.0.0.1"
    assert f":{attempt.attributes['server.port']}" in fleet.urls[0]
    assert attempt.attributes["cachewise.pod"] == "pod-0"
    assert attempt.attributes["cachewise.tools"] == ["bash"]
    assert attempt.attributes["http.response.status_code"] == 200

    steps, within = turn.steps, turn.children(attempt)
    assert set(steps) == {"parse", "route", "hint"}
    assert set(within) == {"first byte", "stream"}
    assert steps["hint"].attributes["cachewise.idle_kind"] == "tool"
    assert 0 < steps["hint"].attributes["cachewise.p_return"] <= 1
    assert steps["route"].attributes["cachewise.pod"] == "pod-0"
    assert all(shown_inside(span, root) for span in turn.spans)
    assert all(shown_inside(span, attempt) for span in within.values())
    assert steps["parse"].end_s <= steps["route"].start_s <= attempt.start_s + 1e-3
    assert within["first byte"].end_s == within["stream"].start_s
    waited_s = attempt.attributes["gen_ai.response.time_to_first_chunk"]
    assert within["first byte"].end_s - attempt.start_s == pytest.approx(waited_s, abs=1e-3)
    assert collector.resources[0]["service.name"] == "cachewise-gateway"


async def test_no_text_no_argument_and_no_key_is_in_a_span() -> None:
    collector = Collector()
    key = "a-key-of-a-client-1234"
    headers = of("s") | script(text=SECRET, tool_calls=[TOOL]) | {"x-api-key": key}
    async with EmbeddedFleet(pods=1, model="m", speedup=50) as fleet:
        async with traced(collector, *fleet.urls, access={"api_keys": {"team": [key]}}) as running:
            query = "/v1/chat/completions?api_key=" + SECRET
            await running.post(query, agent_body("chat", SECRET), headers=headers)
            turn = await collector.turn()
    sent = "".join(str(span.raw) for span in turn.spans) + str(collector.resources)
    assert turn.root.attributes["cachewise.tenant"] == "team"
    assert SECRET not in sent
    assert key not in sent
    assert "echo" not in sent


async def test_the_trace_goes_on_from_the_client_to_the_pod() -> None:
    collector = Collector()
    async with Pod() as pod, traced(collector, pod) as running:
        headers = {"traceparent": f"00-{'-'.join(CLIENT)}-01", "tracestate": "vendor=x"}
        await running.post("chat", headers=headers)
        turn = await collector.turn()
    assert (turn.root.trace_id, turn.root.parent) == CLIENT
    (attempt,) = turn.tries
    (exchange,) = pod.turns
    (traceparent,) = exchange.header(b"traceparent")
    assert traceparent.decode() == f"00-{CLIENT[0]}-{attempt.id}-01"
    assert exchange.header(b"tracestate") == [b"vendor=x"]


async def test_a_trace_that_the_client_does_not_keep_is_not_kept_and_still_goes_on() -> None:
    collector = Collector()
    async with Pod() as pod, traced(collector, pod) as running:
        headers = {"traceparent": f"00-{'-'.join(CLIENT)}-00"}
        await running.post("chat", headers=headers)
        await running.post("chat")
        turn = await collector.turn()
    assert turn.root.trace_id != CLIENT[0]
    (traceparent,) = pod.turns[0].header(b"traceparent")
    assert traceparent.startswith(f"00-{CLIENT[0]}-".encode())
    assert traceparent.endswith(b"-00")


@pytest.mark.parametrize("ratio", [0.0, 1.0])
async def test_of_traces_that_begin_here_the_given_share_is_kept(ratio: float) -> None:
    collector = Collector()
    async with collector.serving() as url, Pod() as pod:
        tracing_settings = {"endpoint": url, "sample_ratio": ratio}
        async with gateway_over(pod, tracing=tracing_settings) as running:
            for _ in range(3):
                await running.post("chat")
            await asyncio.sleep(0.2)
    assert sum(span.kind == "SERVER" for span in collector.spans) == 3 * ratio
    sampled = {int(turn.header(b"traceparent")[0][-2:], 16) & 1 for turn in pod.turns}
    assert sampled == {int(ratio)}


async def test_without_tracing_the_clients_context_passes_untouched() -> None:
    async with Pod() as pod, gateway_over(pod) as running:
        await running.post("chat", headers={"traceparent": f"00-{'-'.join(CLIENT)}-01"})
    assert pod.turns[0].header(b"traceparent") == [f"00-{'-'.join(CLIENT)}-01".encode()]


async def test_an_error_of_the_gateways_own_is_told() -> None:
    collector = Collector()
    async with Pod() as pod, traced(collector, pod) as running:
        assert (await running.post("chat", b"{")).status == 400
        turn = await collector.turn()
    assert turn.root.attributes["error.type"] == "invalid_request"
    assert turn.root.attributes["http.response.status_code"] == 400
    assert turn.root.attributes["cachewise.outcome"] == "gateway_error"
    assert not turn.root.failed, "a client's mistake is no failure of the server"
    assert turn.tries == []


async def test_each_try_on_a_pod_is_a_span_with_its_own_error() -> None:
    async def drop(exchange: Exchange) -> None:
        exchange.die()

    collector = Collector()
    async with Pod(drop) as pod, traced(collector, pod) as running:
        assert (await running.post("chat")).status == 502
        turn = await collector.turn()
    assert [t.attributes["error.type"] for t in turn.tries] == ["disconnected"] * len(turn.tries)
    assert [t.attributes.get("http.request.resend_count") for t in turn.tries] == [None, 1]
    assert all(one.failed for one in turn.tries)
    assert turn.root.failed
    assert turn.root.attributes["error.type"] == "pod_unreachable"


async def test_an_answer_that_breaks_off_and_a_pods_error_are_failures() -> None:
    async with EmbeddedFleet(pods=1, model="m", speedup=50) as fleet:
        collector = Collector()
        async with traced(collector, *fleet.urls) as running:
            fail = {"status": "disconnect", "after_chunks": 2}
            headers = script(output_tokens=200, fail=fail)
            await running.post("chat", body_of("chat", stream=True), headers=headers)
            turn = await collector.turn()
            assert turn.root.attributes["cachewise.outcome"] == "broken_off"
            assert turn.root.failed
            assert turn.tries[0].failed
            assert set(turn.children(turn.tries[0])) == {"first byte", "stream"}

        collector = Collector()
        async with traced(collector, *fleet.urls) as running:
            headers = script(fail={"status": 500})
            assert (await running.post("chat", headers=headers)).status == 500
            turn = await collector.turn()
            assert turn.root.attributes["cachewise.outcome"] == "pod_error"
            assert turn.tries[0].attributes["error.type"] == "500"
            assert turn.tries[0].failed


async def test_a_client_that_leaves_ends_its_trace() -> None:
    collector = Collector()
    async with EmbeddedFleet(pods=1, model="m", speedup=1) as fleet:
        async with traced(collector, *fleet.urls) as running:
            body = body_of("chat", stream=True)
            url = f"{running.url}/v1/chat/completions"
            headers = script(output_tokens=4000)
            async with running.client.post(url, json=body, headers=headers) as response:
                await response.content.readany()
            turn = await collector.turn()
            await until(running.settled)
    assert turn.root.attributes["cachewise.outcome"] == "client_gone"
    assert not turn.root.failed
    assert set(turn.children(turn.tries[0])) == {"first byte", "stream"}


async def test_a_hold_is_a_span_of_its_own() -> None:
    collector = Collector()
    async with EmbeddedFleet(pods=1, model="m", speedup=1, config=ENGINE) as fleet:
        async with traced(collector, *fleet.urls, hints={"enabled": False}) as running:
            await until(lambda: all(p.residency.capacity_tokens for p in running.gateway.fleet))
            first = asyncio.create_task(
                running.post("chat", agent_body("chat", "first"), headers=of("first", final=True))
            )
            await until(lambda: any(p.in_flight for p in running.gateway.fleet))
            headers = {"traceparent": f"00-{'-'.join(CLIENT)}-01"} | of("second", final=True)
            second = await running.post("chat", agent_body("chat", "second"), headers=headers)
            assert (await first).status == second.status == 200
            await until(lambda: sum(s.kind == "SERVER" for s in collector.spans) == 2)
    turn = Turn([span for span in collector.spans if span.trace_id == CLIENT[0]])
    hold, route = turn.steps["hold"], turn.steps["route"]
    assert route.attributes["cachewise.held"] is True
    assert hold.attributes["cachewise.hold_end"] == "released"
    assert route.end_s - 1e-3 <= hold.start_s < hold.end_s <= turn.tries[0].start_s + 1e-3
    assert turn.root.attributes["cachewise.held_s"] == pytest.approx(
        hold.end_s - hold.start_s, abs=1e-3
    )


async def test_a_collector_that_is_away_or_ill_or_stuck_touches_no_turn() -> None:
    async with Pod() as pod:
        gone = {"endpoint": "http://127.0.0.1:9"}
        async with gateway_over(pod, tracing=gone) as running:
            for _ in range(5):
                assert (await running.post("chat")).status == 200
            assert await running.metric('cachewise_degraded_total{stage="trace"}') == 0
        collector = Collector()
        collector.status = 500
        async with traced(collector, pod) as running:
            assert (await running.post("chat")).status == 200
            await until(lambda: collector.posts > 0)
            assert (await running.post("chat")).status == 200


async def test_spans_that_cannot_be_sent_are_bounded_and_do_not_delay_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "MAX_QUEUED_SPANS", 512)
    monkeypatch.setattr(tracing, "STOP_S", 0.3)
    collector = Collector()
    collector.stuck = asyncio.Event()
    turns = 300
    async with collector.serving() as url, Pod() as pod:
        async with gateway_over(pod, tracing={"endpoint": url}) as running:
            for _ in range(turns):
                assert (await running.post("chat")).status == 200
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 2
        collector.stuck.set()
        await until(lambda: len(collector.spans) >= 512)
        await asyncio.sleep(0.3)
    made = 4 * turns
    assert len(collector.spans) <= 2 * 512 < made


async def test_a_fault_of_tracing_is_counted_and_harms_no_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Pod() as pod:
        tracing_settings = {"endpoint": "http://127.0.0.1:9"}
        async with gateway_over(pod, tracing=tracing_settings) as running:
            tracer = running.gateway.tracer
            assert tracer is not None

            def broken(*_: Any, **__: Any) -> None:
                raise RuntimeError("broken")

            monkeypatch.setattr(tracer.tracer, "start_span", broken)
            assert (await running.post("chat")).status == 200
            assert await running.metric('cachewise_degraded_total{stage="trace"}') == 1
            monkeypatch.undo()
            monkeypatch.setattr(tracing.TurnTrace, "_child", broken)
            assert (await running.post("chat")).status == 200
            assert await running.metric('cachewise_degraded_total{stage="trace"}') > 1


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_without_tracing_nothing_of_opentelemetry_is_imported() -> None:
    ended = run(
        """
        import asyncio, sys
        from tests.served import Pod, gateway_over

        async def main():
            async with Pod() as pod, gateway_over(pod) as running:
                assert (await running.post("chat")).status == 200
                assert running.gateway.tracer is None

        asyncio.run(main())
        print([name for name in sys.modules if name.startswith("opentelemetry")])
        """
    )
    assert ended.stdout == "[]\n", ended.stderr


def test_without_the_extra_it_is_a_configuration_error() -> None:
    ended = run(
        """
        import os, sys
        sys.modules["opentelemetry"] = None
        os.environ["CACHEWISE_TRACING__ENDPOINT"] = "http://127.0.0.1:4318"
        from gateway.cli import main
        main()
        """,
        *("serve", "--port", "0"),
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        "cachewise: tracing.endpoint: is set and OpenTelemetry is not installed; allowed: unset,"
        " or a URL after pip install 'cachewise-gateway[otel]'\n"
    )


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/api/otlp/v1/traces", "https://c/api/otlp/v1/traces"),
    ],
)
def test_the_address_of_the_collector(given: str, asked: str) -> None:
    settings = Settings(tracing={"endpoint": given})  # type: ignore[arg-type]
    assert settings.tracing.traces_url == asked


def test_a_gateway_that_only_was_made_has_no_thread() -> None:
    before = threading.active_count()
    gateway = Gateway(Settings(tracing={"endpoint": "http://c:4318"}))  # type: ignore[arg-type]
    assert gateway.tracer is not None
    assert threading.active_count() == before
