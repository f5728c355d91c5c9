"""Nothing leaks: a thousand turns at once, clients that leave, a pod that dies in the middle."""

import asyncio
import json
import random
import resource
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import anthropic
import openai
import psutil
import pytest
import uvloop

from gateway.embedded.fleet import EmbeddedFleet
from tests.served import (
    PATHS,
    WIRES,
    Reply,
    Running,
    body_of,
    events_of,
    gateway_over,
    logged,
    stream_error_of,
    until,
)

STREAMS = 1000
SPEEDUP = 0.2
FATES = ("stays",) * 6 + ("leaves at connect", "leaves waiting", "leaves mid-stream", "leaves soon")


@pytest.fixture
def many_files() -> Any:
    """Room for a thousand streams: each takes four sockets here, as everything is one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8 * STREAMS if hard == resource.RLIM_INFINITY else min(hard, 8 * STREAMS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class Client:
    """One turn and what becomes of it."""

    number: int
    gateway: Running
    session: aiohttp.ClientSession
    rng: random.Random
    result: str = ""

    async def run(self) -> None:
        rng = self.rng
        wire, stream = WIRES[self.number % 4], rng.random() < 0.7
        fate = FATES[self.number % len(FATES)]
        body = body_of(wire, "embedded", stream=stream)
        said = f"Task {self.number % 50}: " + "a long story " * rng.randint(1, 300)
        if "messages" in body:
            body["messages"] = [{"role": "user", "content": said}]
        else:
            body["prompt" if wire == "completions" else "input"] = said
        headers = {
            "x-embedded-script": json.dumps({"output_tokens": rng.randint(40, 250)}),
            "x-session-id": f"s{self.number % 300}",
            "authorization": f"Bearer k{self.number % 7}",
        }
        if fate == "leaves at connect":
            await self._leave_at_connect(PATHS[wire], json.dumps(body).encode())
            return
        patience_s = {"leaves waiting": rng.random() / 20, "leaves soon": rng.random() * 2}
        url = self.gateway.url + PATHS[wire]
        try:
            async with (
                asyncio.timeout(patience_s.get(fate)),
                self.session.post(url, json=body, headers=headers) as response,
            ):
                if fate == "leaves mid-stream":
                    await response.content.readany()
                    response.close()
                    self.result = "left"
                    return
                reply = await Reply.read(response)
        except TimeoutError:
            self.result = "left"
            return
        self.result = judge(wire, stream, reply)

    async def _leave_at_connect(self, path: str, body: bytes) -> None:
        host, port = self.gateway.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        request = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (
            path.encode(),
            len(body),
            body,
        )
        writer.write(request[: self.rng.randint(0, len(request))])
        if self.number % 2:
            writer.transport.abort()
        else:
            writer.close()
        self.result = "left"


def judge(wire: str, stream: bool, reply: Reply) -> str:
    """``complete`` or ``error``; raises where it is neither in the dialect's terms."""
    if reply.status != 200:
        assert reply.status in (502, 503, 504), reply
        assert reply.error(wire)["message"]
        return "error"
    if not stream:
        body = reply.json
        finished = body.get("status") or body.get("stop_reason")
        if "choices" in body:
            finished = body["choices"][0]["finish_reason"]
        assert finished, reply
        return "complete"
    events = events_of(reply.data)
    text = reply.text
    if '"error":{' in text or "event: error" in text:
        assert stream_error_of(wire, reply.data)
        return "error"
    name, last = events[-1]
    ended = {"messages": name == "message_stop", "responses": name == "response.completed"}
    assert ended.get(wire, last == "[DONE]"), text[-300:]
    return "complete"


def on_uvloop(main: Callable[[], Awaitable[None]]) -> None:
    """Run on the event loop that `cachewise serve` runs on."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())  # type: ignore[arg-type]


def assert_settled(gateway: Running, fleet: EmbeddedFleet) -> None:
    assert [(p.name, p.in_flight, p.queued_prefill_tokens) for p in gateway.gateway.fleet] == [
        (f"pod-{n}", 0, 0) for n in range(len(fleet.pods))
    ]
    assert [s.sid for s in gateway.gateway.sessions if s.in_flight or s.state == "running"] == []
    assert [engine.num_requests for engine in fleet.pods] == [0] * len(fleet.pods)


@pytest.mark.usefixtures("many_files")
def test_a_thousand_streams_with_leaving_clients_and_a_dying_pod_leave_nothing_behind() -> None:
    on_uvloop(soak)


async def soak() -> None:
    process = psutil.Process()
    tasks_before = asyncio.all_tasks()
    sockets_before = len(process.net_connections("inet"))
    with logged() as log:
        async with EmbeddedFleet(pods=3, speedup=SPEEDUP) as fleet:
            async with gateway_over(*fleet.urls, probe={"interval_s": 0.5}) as gateway:
                connector = aiohttp.TCPConnector(limit=0, force_close=True)
                tasks_serving = asyncio.all_tasks()
                async with aiohttp.ClientSession(connector=connector) as session:
                    clients = [
                        Client(n, gateway, session, random.Random(n)) for n in range(STREAMS)
                    ]
                    at_once = 0

                    async def die_in_the_middle() -> None:
                        nonlocal at_once
                        await until(
                            lambda: sum(c.result == "complete" for c in clients) > STREAMS // 20, 60
                        )
                        at_once = len(gateway.server.tasks)
                        assert fleet.pods[1].num_requests
                        await fleet.kill(1)

                    async with asyncio.TaskGroup() as group:
                        group.create_task(die_in_the_middle())
                        for client in clients:
                            group.create_task(client.run())

                results = Counter(client.result for client in clients)
                assert at_once > STREAMS // 2
                assert results.total() == STREAMS
                assert results["complete"] > STREAMS // 3
                assert results["error"] > 0, "the pod died when it had nothing to do"
                assert results["left"] > STREAMS // 5

                await until(lambda: not gateway.server.tasks and not gateway.server.connections)
                await until(gateway.settled)
                assert_settled(gateway, fleet)
                assert gateway.gateway.relay._client is not None
                assert not gateway.gateway.relay._client.connector._acquired  # type: ignore[union-attr]
                await until(lambda: asyncio.all_tasks() <= tasks_serving | _servers(fleet))
                assert not gateway.gateway.fleet.pods["pod-1"].ready
                reply = await gateway.post("chat", body_of("chat", "embedded"))
                assert judge("chat", False, reply) == "complete"
            await until(lambda: not any(s.state.connections for s in fleet._servers))
    await until(lambda: asyncio.all_tasks() == tasks_before)
    await until(lambda: len(process.net_connections("inet")) == sockets_before)
    assert log.errors == []


def _servers(fleet: EmbeddedFleet) -> set[asyncio.Task[Any]]:
    """What runs for the pods' own sake: idle connections of theirs have no task."""
    return {engine._stepping for engine in fleet.pods if engine._stepping is not None}


# -- the SDKs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
def test_the_sdks_get_a_whole_answer_or_a_clean_error_when_a_pod_dies(wire: str) -> None:
    async def main() -> None:
        with logged() as log:
            async with (
                EmbeddedFleet(pods=3, speedup=20) as fleet,
                gateway_over(*fleet.urls, routing={"policy": "round_robin"}) as gateway,
                openai.AsyncOpenAI(
                    base_url=gateway.url + "/v1", api_key="k", max_retries=0
                ) as openai_sdk,
                anthropic.AsyncAnthropic(
                    base_url=gateway.url, api_key="k", max_retries=0
                ) as anthropic_sdk,
            ):
                started: list[int] = []
                turns = [
                    asyncio.create_task(
                        sdk_turn(wire, openai_sdk, anthropic_sdk, stream=n % 4 > 0, started=started)
                    )
                    for n in range(24)
                ]
                await until(lambda: len(started) == 18, 20)
                await fleet.kill(0)
                results = await asyncio.gather(*turns)
                assert set(results) == {"complete", "error"}
                await until(gateway.settled)
                assert_settled(gateway, fleet)
        assert log.errors == []

    on_uvloop(main)


async def sdk_turn(
    wire: str,
    openai_sdk: openai.AsyncOpenAI,
    anthropic_sdk: anthropic.AsyncAnthropic,
    *,
    stream: bool,
    started: list[int],
) -> str:
    """One turn with the dialect's own SDK. Only the SDK's own errors of the API are expected."""
    headers = {"x-embedded-script": '{"output_tokens": 1500}'}
    said: Any = [{"role": "user", "content": "hi"}]
    sdk: Any = openai_sdk
    match wire:
        case "chat":
            call: Any = sdk.chat.completions.create(
                model="embedded", messages=said, stream=stream, extra_headers=headers
            )
        case "completions":
            call = sdk.completions.create(
                model="embedded", prompt="hi", stream=stream, extra_headers=headers, max_tokens=1500
            )
        case "responses":
            call = sdk.responses.create(
                model="embedded", input="hi", stream=stream, extra_headers=headers
            )
        case _:
            sdk = anthropic_sdk
            call = sdk.messages.create(
                model="embedded",
                messages=said,
                max_tokens=1500,
                stream=stream,
                extra_headers=headers,
            )
    last: Any = None
    try:
        answer = await call
        if stream:
            async for event in answer:
                if last is None:
                    started.append(1)
                last = event
    except (openai.APIStatusError, anthropic.APIStatusError) as error:
        if error.status_code < 500 and not stream:
            raise
        return "error"
    except openai.APIConnectionError:
        raise
    except openai.APIError as error:
        if "pod" not in error.message:
            raise
        return "error"
    if not stream:
        assert answer.id
        return "complete"
    if wire in ("responses", "messages"):
        assert last.type in ("response.completed", "message_stop")
    else:
        assert last.choices == [] or last.choices[0].finish_reason is not None
    return "complete"
