"""The inspector's feed: what a watcher has put together is what there is; nothing grows, nothing is
left; the page and its data are served as they should be."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from gateway import connect
from gateway.config import Settings
from gateway.dialects import DIALECTS, parse
from gateway.dialects.turn import ToolCall, TurnOutcome, Usage
from gateway.embedded.fleet import EmbeddedFleet
from gateway.fleet.pod import Pod
from gateway.gateway import Gateway
from gateway.inspector import endpoints, feed
from gateway.inspector.feed import Feed, Watcher
from gateway.inspector.rows import Whereabouts, session_row
from tests.crowded import ENGINE, Gate, SmallPod, agent_body, held, occupied, of
from tests.served import Running, body_of, gateway_over, until

EVENTS = "/v1/cachewise/events"


@dataclass
class View:
    """What a reader of the feed makes of it, as the page does."""

    sessions: dict[str, Any] = field(default_factory=dict)
    pods: dict[str, Any] = field(default_factory=dict)
    turns: list[Any] = field(default_factory=list)
    gateway: Any = None
    complete: bool = False
    missed: bool = False
    frames: int = 0

    def take(self, frame: dict[str, Any]) -> None:
        self.frames += 1
        for row in frame.get("sessions", ()):
            self.sessions[row["id"]] = row
        for sid in frame.get("gone", ()):
            self.sessions.pop(sid, None)
        for row in frame.get("pods", ()):
            self.pods[row["name"]] = row
        for name in frame.get("gone_pods", ()):
            self.pods.pop(name, None)
        self.turns += frame.get("turns", ())
        self.gateway = frame.get("gateway", self.gateway)
        self.missed = self.missed or frame.get("missed", False)
        self.complete = self.complete or frame.get("complete", False)


@asynccontextmanager
async def watching(gateway: Running, **headers: str) -> AsyncIterator[View]:
    """A reader of the stream, for as long as the context lasts."""
    view = View()

    async def read(response: aiohttp.ClientResponse) -> None:
        async for line in response.content:
            if line.startswith(b"data: "):
                data = json.loads(line[6:])
                if "at" in data:
                    view.take(data)

    async with aiohttp.ClientSession(read_bufsize=1 << 22) as session:
        async with session.get(gateway.url + EVENTS, headers=headers) as response:
            assert response.status == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            reading = asyncio.create_task(read(response))
            try:
                yield view
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)


def as_it_is(gateway: Gateway) -> dict[str, Any]:
    where = Whereabouts.of(gateway)
    return {
        s.sid: json.loads(orjson.dumps(session_row(gateway, s, where))) for s in gateway.sessions
    }


# -- consistent and bounded ---------------------------------------------------------------------


def request_of(name: str, words: str) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": f"{name} {words}"}]}
    return parse(DIALECTS[0], json.dumps(body).encode())


class FeedMachine(RuleBasedStateMachine):
    """Sessions come, work and go, KV moves between pods; a watcher reads now and then."""

    MAX_ROWS = 6

    def __init__(self) -> None:
        super().__init__()
        self.gateway = Gateway(Settings(sessions={"max_sessions": 8, "ttl_s": 50}))
        self.pods = [Pod(name=f"pod-{n}", url="", ready=True) for n in range(2)]
        for pod in self.pods:
            pod.residency.set_capacity(1_000)
            self.gateway.fleet.pods[pod.name] = pod
        self.feed = Feed(self.gateway, max_rows=self.MAX_ROWS)
        self.watcher = Watcher(self.feed)
        self.feed.watchers.add(self.watcher)
        self.view = View()
        self.now = 100.0
        self.running: list[Any] = []
        self.crowded = False
        """Whether there were more sessions than rows; one left out stays out until it is seen."""

    @rule(names=st.lists(st.integers(0, 11), min_size=1, max_size=6))
    def begin(self, names: list[int]) -> None:
        for name in names:
            self.now += 0.1
            headers = {b"x-session-id": b"%d" % name}
            request = request_of(str(name), "x")
            turn = self.gateway.sessions.begin(headers, request, "default", 1, self.now)
            self.running.append(turn)

    @rule(number=st.integers(1, 8), answered=st.booleans(), tools=st.integers(0, 3))
    def end(self, number: int, answered: bool, tools: int) -> None:
        while self.running and number:
            number -= 1
            self.now += 0.1
            calls = [ToolCall.of(f"call-{n}", "bash", "{}") for n in range(tools)]
            outcome = TurnOutcome("id", calls, "stop", Usage(100, 10, 50))
            turn = self.running.pop(0)
            self.gateway.sessions.end(turn, outcome if answered else None, self.now)

    @rule(place=st.integers(0, 7), pod=st.integers(0, 1), tokens=st.integers(1, 600))
    def cache(self, place: int, pod: int, tokens: int) -> None:
        for session in list(self.gateway.sessions)[place : place + 1]:
            self.pods[pod].residency.touch(session.sid, tokens, [])

    @rule()
    def forget(self) -> None:
        self.now += 51
        self.gateway.sessions.expire(self.now)

    @rule()
    def refresh(self) -> None:
        self.now += 1
        self.crowded = self.crowded or len(self.gateway.sessions) > self.MAX_ROWS
        asyncio.run(self.feed.refresh(self.now))

    @rule()
    def read(self) -> None:
        self.view.take(json.loads(orjson.dumps(self.watcher.frame(self.now))))

    @rule()
    def settle(self) -> None:
        """After a refresh, once all is read, the view is right."""
        self.refresh()
        while self.watcher.pending:
            self.read()
        there = as_it_is(self.gateway)
        assert self.view.complete
        assert {sid: there.get(sid) for sid in self.view.sessions} == self.view.sessions
        assert len(self.view.sessions) <= self.MAX_ROWS
        if not self.crowded:
            assert self.view.sessions.keys() == there.keys()
        latest = [session.sid for session in reversed(self.gateway.sessions)]
        assert self.view.sessions.keys() >= set(latest[:1])
        assert self.view.pods.keys() == {pod.name for pod in self.pods}
        for pod in self.pods:
            assert self.view.pods[pod.name]["resident_tokens"] == pod.residency.total_tokens

    def teardown(self) -> None:
        self.settle()


FeedMachine.TestCase.settings = hypothesis_settings(
    max_examples=40, stateful_step_count=25, deadline=None
)
TestFeed = FeedMachine.TestCase


async def test_a_watcher_of_a_working_gateway_ends_with_what_there_is() -> None:
    script = {"turns": [{"tool_calls": [{"name": "bash", "arguments": {}}]}, {"text": "done"}]}

    async def work(gateway: Running, number: int) -> None:
        body = agent_body("chat", f"s{number}", "embedded", tokens=6_000, stream=True)
        headers = of(f"s{number}") | {"x-embedded-script": json.dumps(script)}
        call = {"id": f"c{number}", "type": "function"}
        for _ in range(3):
            answer = await gateway.post("chat", body, headers=headers)
            assert answer.status == 200
            body["messages"] += [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [call | {"function": {"name": "bash", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": f"c{number}", "content": "x" * 400},
            ]

    async with (
        EmbeddedFleet(pods=2, config=ENGINE, speedup=50) as fleet,
        gateway_over(*fleet.urls) as gateway,
        watching(gateway) as early,
    ):
        await asyncio.gather(*(work(gateway, n) for n in range(12)))
        async with watching(gateway) as late:
            await until(lambda: late.complete and early.complete)
            await until(lambda: early.sessions == as_it_is(gateway.gateway) == late.sessions)
            assert early.pods == late.pods
        assert len(early.turns) == 36
        assert {"held"} & {key for _, turn in early.turns for key in turn}
        shown = {name: pod["resident_tokens"] for name, pod in early.pods.items()}
        assert shown == {p.name: p.residency.total_tokens for p in gateway.gateway.fleet}
        assert early.gateway["sessions"] == 12


async def test_a_held_session_is_shown_with_its_reason_and_no_more_once_it_is_released() -> None:
    gate = Gate()
    async with (
        SmallPod(gate) as pod,
        gateway_over(pod) as gateway,
        occupied(gateway),
        watching(gateway) as view,
    ):
        second = asyncio.create_task(
            gateway.post("chat", agent_body("chat", "second"), headers=of("second"))
        )
        await until(lambda: any(row["state"] == "held" for row in view.sessions.values()))
        row = next(row for row in view.sessions.values() if row["state"] == "held")
        assert row["held"]["reason"] == "no_room"
        assert row["now"][0]["phase"] == "held"
        assert view.gateway["held"] == held(gateway) == 1
        gate.open("first", "second")
        await second
        await until(
            lambda: view.sessions[row["id"]].get("held") is None and view.gateway["held"] == 0
        )


async def test_ended_turns_that_a_slow_watcher_was_not_sent_are_bounded_and_told_as_missed() -> (
    None
):
    gateway = Gateway(Settings())
    one = Feed(gateway)
    with one.watching() as watcher:
        await one.warm()
        for number in range(feed.MAX_TURNS + 10):
            gateway.history.ended and gateway.history.ended("sid", b'{"n":%d}' % number)
        frame = watcher.frame(0.0)
    assert len(frame["turns"]) == feed.MAX_TURNS
    assert frame["missed"] is True
    assert gateway.history.ended is None


# -- watchers come and go -----------------------------------------------------------------------


async def test_nothing_runs_and_nothing_is_kept_while_nobody_watches() -> None:
    async with EmbeddedFleet(pods=1) as fleet, gateway_over(*fleet.urls) as gateway:
        await gateway.post("chat", body_of("chat", "embedded"))
        feed = gateway.inspector.feed
        assert not inspector_tasks()
        async with watching(gateway) as view:
            await until(lambda: view.complete)
            assert len(inspector_tasks()) == 1
            assert feed.sessions
        await until(lambda: not feed.watchers)
        assert not feed.sessions
        assert not feed.pods
        assert gateway.gateway.history.ended is None
        await until(lambda: not inspector_tasks())


def inspector_tasks() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "inspector"]


async def test_a_watcher_that_does_not_read_is_dropped_and_costs_no_other_a_thing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoints, "STALL_S", 2.0)
    async with gateway_over("http://127.0.0.1:9") as gateway:
        watchers = gateway.inspector.feed.watchers
        host, port = gateway.url.removeprefix("http://").split(":")
        with socket.socket() as idle:
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            idle.connect((host, int(port)))
            idle.sendall(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % EVENTS.encode())
            await until(lambda: len(watchers) == 1)
            [stalled], [connection] = watchers, gateway.server.connections
            connection.transport.get_extra_info("socket").setsockopt(  # type: ignore[union-attr]
                socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096
            )
            async with watching(gateway) as view:
                turns = 0
                while stalled in watchers:  # until the system's buffers are full
                    if turns < 20:
                        fill(gateway.gateway, 500)
                        turns += 1
                    await asyncio.sleep(0.3)
                await until(lambda: len(view.sessions) == 500)
                await until(lambda: {r["turns"] for r in view.sessions.values()} == {turns})
            await until(lambda: not watchers)
            idle.settimeout(5)
            received = read_out(idle)
            assert received.startswith(b"HTTP/1.1 200")
            assert not received.endswith(b"0\r\n\r\n"), "the response has an end"


def read_out(connection: socket.socket) -> bytes:
    """What was on its way when the connection was dropped."""
    received = bytearray()
    while piece := connection.recv(1 << 20):
        received += piece
    return bytes(received)


async def test_no_more_than_so_many_may_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MAX_WATCHERS", 2)
    async with gateway_over("http://127.0.0.1:9") as gateway:
        async with watching(gateway), watching(gateway):
            await until(lambda: len(gateway.inspector.feed.watchers) == 2)
            refused = await gateway.get(EVENTS)
            assert refused.status == 503
            assert refused.json["error"]["code"] == "too_many_watchers"
            assert "retry-after" in refused.headers
        await until(lambda: not gateway.inspector.feed.watchers)
        async with watching(gateway) as view:
            await until(lambda: view.complete)


async def test_the_stream_ends_when_the_gateway_shuts_down() -> None:
    async with gateway_over("http://127.0.0.1:9") as gateway:
        async with gateway.client.get(gateway.url + EVENTS) as response:
            assert (await response.content.readline()).startswith(b"event: hello")
            gateway.gateway.shut_down()
            await asyncio.wait_for(response.content.read(), 5)


async def test_a_fault_in_a_refresh_is_counted_and_the_next_one_shows_what_was_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = [True]
    rendered = feed.session_row

    def render(*arguments: Any) -> Any:
        if broken[0]:
            raise RuntimeError("no")
        return rendered(*arguments)

    monkeypatch.setattr(feed, "session_row", render)
    async with gateway_over("http://127.0.0.1:9") as gateway, watching(gateway) as view:
        await until(lambda: view.complete)
        fill(gateway.gateway, 3)
        sample = 'cachewise_degraded_total{stage="inspector"}'
        async with asyncio.timeout(10):
            while not await gateway.metric(sample):  # noqa: ASYNC110 (asked for, not told)
                await asyncio.sleep(0.05)
        assert not view.sessions
        broken[0] = False
        await until(lambda: len(view.sessions) == 3)


def fill(gateway: Gateway, number: int, tool: str = "bash") -> None:
    """So many sessions that wait for a tool."""
    now = time.monotonic()
    for n in range(number):
        request = request_of(str(n), "hello")
        headers = {b"x-session-id": b"filled-%d" % n, b"user-agent": b"opencode/1"}
        turn = gateway.sessions.begin(headers, request, "default", 1, now)
        calls = [ToolCall.of(f"c{n}", tool, "{}")]
        outcome = TurnOutcome(f"r{n}", calls, "tool_calls", Usage(1_000 + n, 10, 0))
        gateway.sessions.end(turn, outcome, now)


async def test_a_refresh_of_thousands_of_idle_sessions_touches_only_what_changed() -> None:
    gateway = Gateway(Settings())
    fill(gateway, 3_000)
    one = Feed(gateway)
    await one.refresh(time.monotonic())
    watcher = Watcher(one)
    one.watchers.add(watcher)
    while watcher.pending:
        watcher.frame(0.0)
    fill(gateway, 1)
    await one.refresh(time.monotonic())
    frame = json.loads(orjson.dumps(watcher.frame(0.0)))
    assert [row["turns"] for row in frame["sessions"]] == [2]


# -- who may see it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        EVENTS,
        "/v1/cachewise/turns?session=x",
        "/v1/cachewise/sessions/x/turns",
        "/v1/cachewise/connect",
    ],
)
async def test_what_the_page_reads_asks_for_the_admin_token(path: str) -> None:
    access = {"admin_token": "let-me-in-please"}
    async with gateway_over("http://127.0.0.1:9", access=access) as gateway:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            refused = await gateway.get(path, headers=headers)
            assert refused.status == 401
            assert refused.json["error"]["code"] == "invalid_admin_token"
        assert (
            await gateway.get(path + ("&" if "?" in path else "?") + "token=let-me-in-please")
        ).status == 401
        if path != EVENTS:
            allowed = await gateway.get(path, headers={"authorization": "Bearer let-me-in-please"})
            assert allowed.status in (200, 404)
        else:
            async with watching(gateway, authorization="Bearer let-me-in-please") as view:
                await until(lambda: view.complete)


async def test_the_page_loads_without_a_token_and_says_what_it_may_load() -> None:
    access = {"admin_token": "let-me-in-please"}
    async with gateway_over("http://127.0.0.1:9", access=access) as gateway:
        async with gateway.client.get(gateway.url + "/ui", allow_redirects=False) as answer:
            assert answer.status == 307
            assert answer.headers["location"] == "ui/"
        page = await gateway.get("/ui")
        assert page.status == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        again = await gateway.get("/ui/", headers={"if-none-match": page.headers["etag"]})
        assert (again.status, again.data) == (304, b"")
        for path in sorted(endpoints.PAGE.iterdir()):
            served = await gateway.get(f"/ui/{path.name}")
            assert (served.status, served.data) == (200, path.read_bytes())
            assert served.headers["content-security-policy"] == policy
        for outside in ("/ui/..%2fendpoints.py", "/ui/%2e%2e/feed.py", "/ui/nothing.js"):
            assert (await gateway.get(outside)).status == 404
        assert (await gateway.post("/ui/", b"")).status == 405


def test_the_page_holds_no_script_no_style_and_no_address_of_its_own() -> None:
    for path in endpoints.PAGE.iterdir():
        text = path.read_text()
        assert "://" not in text.replace("http://www.w3.org/", ""), path.name
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text
    page = (endpoints.PAGE / "index.html").read_text()
    assert " style=" not in page
    assert "<script>" not in page
    assert " onclick=" not in page


def test_the_wheel_has_the_page(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    root = Path(__file__).resolve().parents[1]
    [wheel] = WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in endpoints.PAGE.iterdir():
        assert f"gateway/inspector/page/{path.name}" in names


async def test_the_snippets_are_those_of_the_guide() -> None:
    async with EmbeddedFleet(pods=1) as fleet, gateway_over(*fleet.urls) as gateway:
        found = (await gateway.get("/v1/cachewise/connect")).json
    assert found["models"] == ["embedded"]
    assert found["keys_required"] is False
    guide = connect.guide("http://here:1", "some-model", "a-key")
    assert len(found["clients"]) == len(connect.CLIENTS)
    for client in found["clients"]:
        text = client["setup"]
        for blank, value in (("url", "http://here:1"), ("model", "some-model"), ("key", "a-key")):
            text = text.replace("{" + blank + "}", value)
        assert text in guide


async def test_turns_are_asked_for_by_session_and_not_by_too_many() -> None:
    async with EmbeddedFleet(pods=1) as fleet, gateway_over(*fleet.urls) as gateway:
        await gateway.post("chat", body_of("chat", "embedded"))
        sid = next(iter(gateway.gateway.sessions)).sid
        found = (await gateway.get(f"/v1/cachewise/turns?session={sid}&session=unknown")).json
        assert [turn["n"] for turn in found["data"][sid]] == [1]
        assert found["data"]["unknown"] == []
        assert (await gateway.get("/v1/cachewise/turns")).status == 400
        many = "&".join(["session=x"] * 101)
        assert (await gateway.get(f"/v1/cachewise/turns?{many}")).status == 400
        assert (await gateway.get("/v1/cachewise/sessions/unknown/turns")).status == 404
        async with gateway.client.head(gateway.url + EVENTS) as answer:
            assert answer.status == 200
