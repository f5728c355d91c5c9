"""Held turns, over real sockets: their clients wait and notice nothing else."""

import asyncio
import json
import socket
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from gateway import cli
from gateway.admission import Admission
from gateway.app import create_app
from gateway.config import Settings
from gateway.embedded.fleet import EmbeddedFleet
from gateway.hold import Patience, patience
from tests.crowded import (
    AGENT_WIRES,
    ENGINE,
    Gate,
    SmallPod,
    agent_body,
    held,
    nothing_left,
    occupied,
    of,
    place_of,
)
from tests.served import (
    EVENTS,
    PATHS,
    Exchange,
    Reply,
    body_of,
    events_of,
    gateway_over,
    stream_error_of,
    until,
)

QUICK = {"heartbeat_s": 0.2}


def turn(gateway: Any, name: str, wire: str = "chat", **more: Any) -> asyncio.Task[Reply]:
    headers = of(name, **more.pop("headers", {}))
    return asyncio.create_task(gateway.post(wire, agent_body(wire, name, **more), headers=headers))


# -- what a client sees ----------------------------------------------------------------------------


async def test_a_turn_that_does_not_fit_waits_until_it_does() -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, gateway_over(pod) as gateway:
        async with occupied(gateway) as first:
            second = turn(gateway, "second")
            await until(lambda: held(gateway) == 1)
            await asyncio.sleep(0.05)
            assert gate.seen == ["first"]
            gate.open("first", "second")
            assert (await first).status == 200
            reply = await second
            assert (reply.status, reply.json["id"]) == (200, "second")
        await until(lambda: nothing_left(gateway))
        assert place_of(gateway, "first") is None
        assert place_of(gateway, "second") is not None
        assert await gateway.metric('cachewise_hold_seconds_count{hold_end="released"}') == 1


@pytest.mark.parametrize("wire", AGENT_WIRES)
async def test_the_sdks_read_a_stream_that_was_held_behind_comments(wire: str) -> None:
    script = {"x-embedded-script": '{"output_tokens": 60}'}
    async with (
        EmbeddedFleet(pods=1, speedup=1, config=ENGINE) as fleet,
        gateway_over(*fleet.urls, admission=QUICK) as gateway,
        openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="k", max_retries=0) as sdk,
        anthropic.AsyncAnthropic(base_url=gateway.url, api_key="k", max_retries=0) as claude,
    ):
        model = "embedded"
        long = of("first", final=True) | {"x-embedded-script": '{"output_tokens": 60}'}
        first = asyncio.create_task(
            gateway.post("chat", agent_body("chat", "first", model), headers=long)
        )
        await until(lambda: any(p.in_flight for p in gateway.gateway.fleet))
        body = agent_body(wire, "second", model, stream=True)
        call: Any
        match wire:
            case "chat":
                call = sdk.chat.completions.create(**body, extra_headers=of("second") | script)
            case "responses":
                call = sdk.responses.create(**body, extra_headers=of("second") | script)
            case _:
                call = claude.messages.create(**body, extra_headers=of("second") | script)
        stream = await call
        assert held(gateway) == 1, "the headers come while the turn is held"
        events = [event async for event in stream]
        last = events[-1]
        assert len(events) > 5
        if wire == "chat":
            assert any(e.choices and e.choices[0].finish_reason for e in events)
        else:
            assert last.type in ("response.completed", "message_stop")
        assert (await first).status == 200
        await until(lambda: nothing_left(gateway))


@pytest.mark.parametrize("wire", AGENT_WIRES)
async def test_the_pods_stream_follows_the_comments_untouched(wire: str) -> None:
    gate = Gate()

    async def answer(exchange: Exchange) -> None:
        if exchange.header(b"x-name") == [b"first"]:
            await gate(exchange)
            return
        exchange.begin_stream()
        exchange.chunk(EVENTS[wire] * 3)
        exchange.end_stream()

    async with SmallPod(answer) as pod, gateway_over(pod, admission=QUICK) as gateway:
        async with occupied(gateway):
            second = turn(gateway, "second", wire, stream=True)
            await until(lambda: held(gateway) == 1)
            await asyncio.sleep(0.5)
            gate.open("first")
            reply = await second
        assert reply.headers["content-type"].startswith("text/event-stream")
        comments, _, rest = reply.data.rpartition(b": held\n\n")
        assert comments.count(b": held\n\n") >= 1
        assert rest == EVENTS[wire] * 3


async def test_a_turn_released_at_once_is_like_any_other() -> None:
    gate = Gate()

    async def answer(exchange: Exchange) -> None:
        if exchange.header(b"x-name") == [b"first"]:
            await gate(exchange)
            return
        exchange.begin_stream(("x-pods-own", "1"))
        exchange.chunk(EVENTS["chat"])
        exchange.end_stream()

    async with SmallPod(answer) as pod, gateway_over(pod) as gateway, occupied(gateway):
        second = turn(gateway, "second", stream=True)
        await until(lambda: held(gateway) == 1)
        gate.open("first")
        reply = await second
        assert (reply.data, reply.headers["x-pods-own"]) == (EVENTS["chat"], "1")


@pytest.mark.parametrize("wire", AGENT_WIRES)
@pytest.mark.parametrize("body", [b'{"error": {"message": "too hot", "code": "x"}}', b"oops"])
async def test_a_pods_error_after_the_headers_is_told_in_the_stream(wire: str, body: bytes) -> None:
    gate = Gate()

    async def answer(exchange: Exchange) -> None:
        if exchange.header(b"x-name") == [b"first"]:
            await gate(exchange)
        else:
            exchange.whole(body, 400)

    async with SmallPod(answer) as pod, gateway_over(pod, admission=QUICK) as gateway:
        async with occupied(gateway):
            second = turn(gateway, "second", wire, stream=True)
            await until(lambda: held(gateway) == 1)
            await asyncio.sleep(0.3)
            gate.open("first")
            reply = await second
        assert reply.status == 200
        message = stream_error_of(wire, reply.data)
        assert ("too hot" if body[:1] == b"{" else "400") in message
        await until(lambda: nothing_left(gateway))


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", AGENT_WIRES)
async def test_who_does_not_stream_is_asked_to_come_again(wire: str) -> None:
    options = {"max_hold_unstreamed_s": 0.1}
    async with SmallPod(Gate()) as pod, gateway_over(pod, admission=options) as gateway:
        async with occupied(gateway):
            reply = await turn(gateway, "second", wire)
            assert reply.status == 503
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert "held" in reply.error(wire)["message"]
            assert held(gateway) == 0
            assert await gateway.metric('cachewise_hold_seconds_count{hold_end="too_long"}') == 1


@pytest.mark.parametrize("wire", AGENT_WIRES)
async def test_a_stream_held_too_long_ends_with_an_error_event(wire: str) -> None:
    options = QUICK | {"max_hold_s": 0.3}
    async with SmallPod(Gate()) as pod, gateway_over(pod, admission=options) as gateway:
        async with occupied(gateway):
            reply = await turn(gateway, "second", wire, stream=True)
            assert reply.status == 200
            assert "held" in stream_error_of(wire, reply.data)


async def test_what_a_turn_has_waited_counts_when_it_comes_again() -> None:
    options = {"max_hold_unstreamed_s": 0.2}
    async with SmallPod(Gate()) as pod, gateway_over(pod, admission=options) as gateway:
        async with occupied(gateway):
            again = turn(gateway, "again")
            await until(lambda: held(gateway) == 1)
            (ticket,) = gateway.gateway.loop.admission.held
            arrived_at = ticket.arrived_at
            assert (await again).status == 503
            again = turn(gateway, "again")
            await until(lambda: held(gateway) == 1)
            (ticket,) = gateway.gateway.loop.admission.held
            assert ticket.arrived_at == arrived_at
            assert (await again).status == 503


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "is sent away"])
async def test_a_spared_turn_is_spared_still_if_its_client_left_by_itself(leaves: bool) -> None:
    options = QUICK | ({} if leaves else {"max_hold_s": 0.3})
    async with SmallPod(Gate()) as pod, gateway_over(pod, admission=options) as gateway:
        admission = gateway.gateway.loop.admission
        async with occupied(gateway):
            again = turn(gateway, "again", stream=True)
            await until(lambda: held(gateway) == 1)
            (ticket,) = admission.held
            admission._spare(ticket)
            due_from = ticket.due_from
            if leaves:
                again.cancel()
            await until(lambda: held(gateway) == 0)
            await asyncio.gather(again, return_exceptions=True)
            again = turn(gateway, "again", stream=True)
            await until(lambda: held(gateway) == 1)
            (ticket,) = admission.held
            assert ticket.spared is leaves
            assert ticket.due_from == (due_from if leaves else ticket.arrived_at)
            again.cancel()
            await until(lambda: held(gateway) == 0)
        assert admission._spared == 0


@pytest.mark.parametrize("wire", AGENT_WIRES)
async def test_a_full_queue_answers_429(wire: str) -> None:
    async with SmallPod(Gate()) as pod, gateway_over(pod, admission={"max_held": 1}) as gateway:
        async with occupied(gateway):
            second = turn(gateway, "second")
            await until(lambda: held(gateway) == 1)
            reply = await turn(gateway, "third", wire)
            assert reply.status == 429
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert reply.error(wire)["type"] == "rate_limit_error"
            second.cancel()
            await until(lambda: held(gateway) == 0)


def test_the_clients_own_timeout_bounds_the_hold() -> None:
    settings = Settings().admission
    assert patience(settings, {}, stream=True) == Patience(7200, 5, 10)
    assert patience(settings, {}, stream=False).limit_s == 120
    for name in (b"x-stainless-timeout", b"x-stainless-read-timeout"):
        assert patience(settings, {name: b"60"}, stream=False).limit_s == 30
        assert patience(settings, {name: b"9.0"}, stream=True) == Patience(7200, 1.5, 3)
        for odd in (b"", b"x", b"-1", b"0", b"nan", b"inf"):
            assert patience(settings, {name: odd}, stream=True) == Patience(7200, 5, 10)


async def test_codex_which_counts_events_alone_is_kept_waiting_by_events() -> None:
    async with SmallPod(Gate({"second"})) as pod, gateway_over(pod, admission=QUICK) as gateway:
        async with occupied(gateway) as first:
            headers = {"user-agent": "codex_exec/0.169.0 (Debian 12; x86_64)"}
            second = turn(gateway, "second", "responses", stream=True, headers=headers)
            await until(lambda: held(gateway) == 1)
            await asyncio.sleep(0.5)
            first.cancel()
            reply = await second
        events = events_of(reply.data)
        assert events[0] == ("keepalive", {"type": "keepalive"})
        assert b": held" not in reply.data


# -- ways out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_held_frees_its_place_at_once(stream: bool) -> None:
    async with SmallPod(Gate()) as pod, gateway_over(pod, admission=QUICK) as gateway:
        async with occupied(gateway):
            second = turn(gateway, "second", stream=stream)
            await until(lambda: held(gateway) == 1)
            await asyncio.sleep(0.15)
            second.cancel()
            await until(lambda: held(gateway) == 0, 1)
            await until(
                lambda: all(
                    s.in_flight == 0 for s in gateway.gateway.sessions if s.key.endswith(":second")
                )
            )
            assert await gateway.metric('cachewise_hold_seconds_count{hold_end="client_gone"}') == 1


async def test_when_a_pod_dies_its_turns_wait_for_a_place_elsewhere() -> None:
    """Those it ran are sent again and held, and so are those that were held for it."""
    gates = Gate(), Gate()
    probe = {"interval_s": 0.1, "unhealthy_after": 1}
    final = {"final": True}
    async with (
        SmallPod(gates[0]) as one,
        SmallPod(gates[1]) as two,
        gateway_over(one, two, probe=probe) as gateway,
    ):
        turns = [turn(gateway, name, headers=final) for name in ("a", "b", "c")]
        await until(lambda: held(gateway) == 1 and len(gates[0].seen) + len(gates[1].seen) == 2)
        await one.stop()
        await until(lambda: held(gateway) == 2)
        assert list(gateway.gateway.loop.admission.books) == ["pod-1"]
        gates[1].open("a", "b", "c")
        assert [reply.status for reply in await asyncio.gather(*turns)] == [200] * 3
        assert sorted(gates[1].seen) == ["a", "b", "c"]
        await until(lambda: nothing_left(gateway))


async def test_held_turns_are_refused_when_no_pod_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.hold.NO_POD_GRACE_S", 0.1)
    probe = {"interval_s": 0.1, "unhealthy_after": 1}
    async with SmallPod(Gate()) as pod, gateway_over(pod, probe=probe) as gateway:
        async with occupied(gateway):
            second = turn(gateway, "second")
            await until(lambda: held(gateway) == 1)
            await pod.stop()
            reply = await second
            assert (reply.status, reply.error("chat")["code"]) == (503, "no_pod_ready")
        await until(lambda: nothing_left(gateway))


@pytest.mark.parametrize("stream", [False, True])
async def test_at_shutdown_held_turns_get_a_clean_503_and_running_ones_go_on(
    stream: bool,
) -> None:
    """With the server that `cachewise serve` runs."""
    gate = Gate()
    async with SmallPod(gate) as pod:
        pods = [{"url": pod.url, "name": "pod-0"}]
        settings = Settings(pods=pods, admission=QUICK, shutdown_grace_s=20)  # type: ignore[arg-type]
        app = create_app(settings)
        server = cli.server(settings, app)
        listening = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}" + PATHS["chat"]
        serving = asyncio.create_task(server._serve([listening]))
        await until(lambda: server.started)
        admission = app.gateway.loop.admission

        async with aiohttp.ClientSession() as client:

            async def ask(name: str, **more: Any) -> Reply:
                body = agent_body("chat", name, **more)
                async with client.post(url, json=body, headers=of(name)) as response:
                    return await Reply.read(response)

            first = asyncio.create_task(ask("first"))
            await until(lambda: gate.seen == ["first"])
            second = asyncio.create_task(ask("second", stream=stream))
            await until(lambda: admission.held_count == 1)
            await asyncio.sleep(0.15)
            server.should_exit = True
            reply = await second
            if stream:
                assert "shutting down" in stream_error_of("chat", reply.data)
            else:
                assert (reply.status, reply.error("chat")["code"]) == (503, "shutting_down")
                assert int(reply.headers["retry-after"]) <= 60
            assert not first.done()
            gate.open("first")
            assert (await first).status == 200
        await asyncio.wait_for(serving, 10)
        assert not admission.held_count


async def test_a_pod_that_is_drained_gets_no_turns_and_its_sessions_move() -> None:
    gates = Gate({"a", "b"}), Gate({"a", "b"})
    access = {"admin_token": "the-admin-token"}
    admin = {"x-cachewise-admin-token": "the-admin-token"}
    async with (
        SmallPod(gates[0]) as one,
        SmallPod(gates[1]) as two,
        gateway_over(one, two, access=access) as gateway,
    ):
        path = gateway.url + "/v1/cachewise/pods/{}/drain"
        await turn(gateway, "a")
        pod, _ = place_of(gateway, "a")
        other = {"pod-0": "pod-1", "pod-1": "pod-0"}[pod.name]
        async with gateway.client.post(path.format(pod.name)) as response:
            assert response.status == 401
        async with gateway.client.post(path.format("none"), headers=admin) as response:
            assert response.status == 404
        async with gateway.client.post(path.format(pod.name), headers=admin) as response:
            assert (await response.json())["draining"] is True
        assert place_of(gateway, "a") is None
        await turn(gateway, "a")
        assert place_of(gateway, "a")[0].name == other
        # The other pod is busy: a turn is held, and released when the drain is undone.
        busy = turn(gateway, "busy")
        await until(lambda: "busy" in gates[0].seen + gates[1].seen)
        second = turn(gateway, "b")
        await until(lambda: held(gateway) == 1)
        async with gateway.client.delete(path.format(pod.name), headers=admin) as response:
            assert (await response.json())["draining"] is False
        assert (await second).status == 200
        assert place_of(gateway, "b")[0] is pod
        busy.cancel()


# -- who waits for whom ----------------------------------------------------------------------------


async def test_interactive_turns_go_before_batch_ones() -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, gateway_over(pod) as gateway:
        async with occupied(gateway):
            batch = turn(gateway, "batch", headers={"x-cachewise-priority": "batch", "final": True})
            await until(lambda: held(gateway) == 1)
            urgent = turn(
                gateway, "urgent", headers={"x-cachewise-priority": "Interactive", "final": True}
            )
            await until(lambda: held(gateway) == 2)
            assert {t.ask.priority for t in gateway.gateway.loop.admission.held} == {
                "batch",
                "interactive",
            }
            gate.open("first", "batch", "urgent")
            assert [r.status for r in await asyncio.gather(batch, urgent)] == [200, 200]
        assert sorted(gate.seen) == ["batch", "first", "urgent"]


async def test_a_priority_that_is_none_is_refused_by_name() -> None:
    async with SmallPod() as pod, gateway_over(pod) as gateway:
        reply = await gateway.post("chat", headers={"x-cachewise-priority": "urgent"})
        assert reply.status == 400
        message = reply.error("chat")["message"]
        assert "x-cachewise-priority" in message
        assert "interactive, batch" in message
        assert not pod.turns


@pytest.mark.parametrize("wire", ["chat", "completions", "responses", "messages"])
async def test_what_is_no_agents_turn_does_not_wait_behind_agents(wire: str) -> None:
    gate = Gate({"single"})
    async with SmallPod(gate) as pod, gateway_over(pod) as gateway, occupied(gateway):
        second = turn(gateway, "second")
        await until(lambda: held(gateway) == 1)
        reply = await gateway.post(wire, body_of(wire), headers={"x-name": "single"})
        assert reply.status == 200
        assert held(gateway) == 1
        second.cancel()
        await until(lambda: held(gateway) == 0)


# -- modes -----------------------------------------------------------------------------------------


async def test_observe_holds_nothing_and_reports_what_it_would() -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, gateway_over(pod, admission={"mode": "observe"}) as gateway:
        async with occupied(gateway) as first:
            second = turn(gateway, "second")
            await until(lambda: sorted(gate.seen) == ["first", "second"])
            assert await gateway.metric("cachewise_held_turns") == 1
            gate.open("first", "second")
            await asyncio.gather(first, second)
        await until(lambda: nothing_left(gateway))
        assert await gateway.metric('cachewise_hold_seconds_count{hold_end="observed"}') == 1
        assert await gateway.metric("cachewise_saved_tokens_total") == 0


async def test_off_only_routes() -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, gateway_over(pod, admission={"mode": "off"}) as gateway:
        async with occupied(gateway):
            second = turn(gateway, "second")
            await until(lambda: sorted(gate.seen) == ["first", "second"])
            assert gateway.gateway.loop.admission.books == {}
            gate.open("first", "second")
            assert (await second).status == 200


async def test_a_pod_that_does_not_say_its_capacity_holds_nothing() -> None:
    gate = Gate()
    async with SmallPod(gate) as pod:
        pod.capacity_tokens = 0
        async with gateway_over(pod) as gateway:
            gateway.gateway.fleet.pods["pod-0"].residency.set_capacity(None)
            async with occupied(gateway):
                second = turn(gateway, "second")
                await until(lambda: sorted(gate.seen) == ["first", "second"])
                gate.open("second")
                assert (await second).status == 200


# -- what is told ----------------------------------------------------------------------------------


async def test_the_api_tells_of_places_and_holds() -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, gateway_over(pod) as gateway:
        async with occupied(gateway):
            second = turn(gateway, "second", headers={"x-cachewise-priority": "batch"})
            await until(lambda: held(gateway) == 1)
            listed = (await gateway.get("/v1/cachewise/sessions")).json["data"]
            (waiting,) = [s for s in listed if s["held"]]
            (placed,) = [s for s in listed if s["place"]]
            assert waiting["held"]["reason"] == "no_room"
            assert waiting["held"]["priority"] == "batch"
            assert waiting["held"]["soonest_at"] == "pod-0"
            assert placed["place"]["pod"] == "pod-0"
            assert 7000 < placed["place"]["tokens"] < 9500
            (told,) = (await gateway.get("/v1/cachewise/pods")).json["data"]
            assert told["admission"]["sessions"] == 1
            budget_tokens = told["admission"]["reserve"] * told["kv_capacity_tokens"]
            budget = told["admission"]["budget_tokens"]
            assert round(budget_tokens) <= budget <= told["kv_capacity_tokens"]
            assert await gateway.metric("cachewise_held_turns") == 1
            assert await gateway.metric('cachewise_pod_admitted_sessions{pod="pod-0"}') == 1
            gate.open("first", "second")
            assert (await second).status == 200
        listed = (await gateway.get("/v1/cachewise/sessions")).json["data"]
        assert not any(s["held"] for s in listed)


async def test_every_lost_token_has_a_cause() -> None:
    cached = {"a": 0}

    async def answer(exchange: Exchange) -> None:
        usage = {
            "prompt_tokens": 8000,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": cached["a"]},
        }
        exchange.whole(json.dumps({"id": "x", "usage": usage}).encode())

    async with SmallPod(answer) as pod, gateway_over(pod) as gateway:
        body = agent_body("chat", "a")
        await gateway.post("chat", body, headers=of("a"))
        assert await gateway.metric('cachewise_lost_tokens_total{loss="first_turn"}') == 8000
        body["messages"] += [
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "y"},
        ]
        cached["a"] = 3000
        await gateway.post("chat", body, headers=of("a"))
        evicted = await gateway.metric('cachewise_lost_tokens_total{loss="evicted"}')
        assert 4900 < evicted <= 5000
        assert await gateway.metric('cachewise_pod_regret_ratio{pod="pod-0"}') > 0


# -- faults ----------------------------------------------------------------------------------------


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("name", ["arrive", "_hold", "_fill", "_admit", "end", "tick"])
async def test_a_fault_in_admission_fails_no_turn(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, gateway_over(pod) as gateway, occupied(gateway) as first:
        second = turn(gateway, "second", headers={"final": True})
        await until(lambda: held(gateway) == 1)
        monkeypatch.setattr(Admission, name, broken)
        third = turn(gateway, "third", headers={"final": True})
        if name in ("arrive", "_hold"):
            await until(lambda: "third" in gate.seen)
        await asyncio.sleep(0.7 if name == "tick" else 0.05)
        gate.open("first", "second", "third")
        if name in ("end", "_fill", "_admit"):
            assert (await first).status == 200
        monkeypatch.undo()
        stage = "tick" if name == "tick" else "admission"
        if name == "end":
            gateway.gateway.loop.admission.pods_changed(0)
        assert {r.status for r in await asyncio.gather(first, second, third)} == {200}
        assert await gateway.metric(f'cachewise_degraded_total{{stage="{stage}"}}') >= 1
