"""The data plane: bytes both ways, each chunk at once, and pods that fail in every way."""

import asyncio
import gc
import json
import socket
import time
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gateway.dialects import MalformedRequestError, read_model, splice_model
from gateway.relay import Answer, Patience, whole_events
from gateway.splice import Splice
from gateway.turns import TurnFlow
from tests.served import (
    EVENTS,
    PATHS,
    WIRES,
    Exchange,
    Pod,
    Running,
    body_of,
    events_of,
    gateway_over,
    logged,
    paced,
    stream_error_of,
    until,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
model_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
spaces = st.text(" \n\t\r", max_size=3)


@st.composite
def spaced_bodies(draw: st.DrawFn, model: str) -> bytes:
    """A request with odd spacing, odd order of keys and things that look like its model."""
    other = draw(st.dictionaries(st.text(max_size=8), json_values, max_size=5))
    other.pop("model", None)
    other["messages"] = draw(
        st.lists(
            st.fixed_dictionaries(
                {"role": st.just("user"), "content": st.sampled_from([model, f'"{model}"', "hi"])}
            ),
            max_size=3,
        )
    )
    other["metadata"] = {"model": model, model: "model"}
    items = list(other.items())
    items.insert(draw(st.integers(0, len(items))), ("model", model))
    ascii_only = draw(st.booleans())
    parts = [
        f"{draw(spaces)}{json.dumps(key, ensure_ascii=ascii_only)}{draw(spaces)}:{draw(spaces)}"
        f"{json.dumps(value, ensure_ascii=ascii_only)}{draw(spaces)}"
        for key, value in items
    ]
    text = draw(spaces) + "{" + ",".join(parts) + "}" + draw(spaces)
    return text.encode("utf-8", "surrogatepass")


async def echo(exchange: Exchange) -> None:
    exchange.whole(exchange.body)


# -- bytes ---------------------------------------------------------------------------------------


async def test_request_and_answer_bytes_are_identical_both_ways() -> None:
    async with Pod(echo) as pod, gateway_over(pod) as gateway:

        @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(body=spaced_bodies("m"), cut=st.integers(0, 200))
        def gather(body: bytes, cut: int) -> None:
            bodies.append((body, min(cut, len(body))))

        bodies: list[tuple[bytes, int]] = []
        gather()
        for body, cut in bodies:

            async def pieces(body: bytes = body, cut: int = cut) -> Any:
                yield body[:cut]
                await asyncio.sleep(0)
                yield body[cut:]

            try:
                body.decode()
            except UnicodeDecodeError:
                continue  # not JSON: the gateway's own 400, tested elsewhere
            for data in (body, pieces()):
                async with gateway.client.post(gateway.url + PATHS["chat"], data=data) as response:
                    assert response.status == 200
                    assert await response.read() == body
            assert pod.turns[-1].body == body
            assert pod.turns[-2].body == body


@given(data=st.data(), model=model_names, served=model_names)
@settings(deadline=None)
def test_a_mapped_model_changes_its_value_and_no_other_byte(
    data: st.DataObject, model: str, served: str
) -> None:
    assume(model != served)
    body = data.draw(spaced_bodies(model))
    try:
        read_model(body)
    except MalformedRequestError:
        assume(False)
    spliced = splice_model(body, model, served)
    before, after = json.loads(body), json.loads(spliced)
    assert before.pop("model") == model
    assert after.pop("model") == served
    assert before == after
    head = next(i for i in range(len(body) + 1) if body[: i + 1] != spliced[: i + 1])
    tail = next(i for i in range(len(body) + 1) if body[-i - 1 :] != spliced[-i - 1 :])
    spellings = {json.dumps(model).encode(), json.dumps(model, ensure_ascii=False).encode()}
    changed = len(body) - head - tail
    assert changed <= max(map(len, spellings))


@given(events=st.lists(st.sampled_from([*EVENTS.values(), b": ping\n\n"])), data=st.data())
def test_an_event_stream_is_cut_between_events_and_loses_nothing(
    events: list[bytes], data: st.DataObject
) -> None:
    newline = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    stream = b"".join(events).replace(b"\n", newline)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    held, sent = b"", b""
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        ready, held = whole_events(held + stream[start:end])
        assert not ready or ready.endswith(newline * 2)
        sent += ready
    assert sent + held == stream
    assert held == b""


async def test_answers_pass_with_their_bytes_whatever_they_are() -> None:
    answers = [b"", b"\x00\xff not json", '{"a":  "ü"}\n'.encode(), b"x" * 9_000_000]

    async def answer(exchange: Exchange) -> None:
        exchange.whole(answers[len(pod.turns) - 1])

    async with Pod(answer) as pod, gateway_over(pod) as gateway:
        for expected in answers:
            reply = await gateway.post("chat")
            assert reply.data == expected
            assert reply.headers["content-length"] == str(len(expected))
        await until(gateway.settled)


async def test_a_stream_passes_byte_for_byte_however_it_is_cut() -> None:
    stream = (EVENTS["chat"] * 3 + b": a comment\n\n" + b"data: [DONE]\n\n") * 2

    async def answer(exchange: Exchange) -> None:
        step = len(pod.turns)
        exchange.begin_stream()
        for at in range(0, len(stream), step):
            exchange.chunk(stream[at : at + step])
            if at % 7 == 0:
                await asyncio.sleep(0)
        exchange.end_stream()

    async with Pod(answer) as pod, gateway_over(pod) as gateway:
        for _ in range(40):
            assert (await gateway.post("chat")).data == stream


# -- each chunk at once --------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
async def test_a_chunk_reaches_the_client_before_the_next_one_exists(wire: str) -> None:
    go_on = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.chunk(EVENTS[wire])
        await go_on.wait()
        exchange.chunk(EVENTS[wire])
        exchange.end_stream()

    async with (
        Pod(answer) as pod,
        gateway_over(pod) as gateway,
        gateway.client.post(gateway.url + PATHS[wire], json=body_of(wire, stream=True)) as response,
    ):
        first = await asyncio.wait_for(response.content.readany(), 5)
        assert first == EVENTS[wire]
        go_on.set()
        assert await response.read() == EVENTS[wire]


async def test_pieces_of_a_stream_pass_without_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    pass_on = Answer.pass_on

    async def watched(self: Answer, send: Any, *rest: Any) -> None:
        async def seen(message: dict[str, Any]) -> None:
            sent.append(message)
            await send(message)

        await pass_on(self, seen, *rest)

    monkeypatch.setattr(Answer, "pass_on", watched)
    async with Pod(paced([EVENTS["chat"]] * 50)) as pod, gateway_over(pod) as gateway:
        assert (await gateway.post("chat")).data == EVENTS["chat"] * 50
    assert 2 <= len(sent) <= 5, "the head, the first piece, the end"


async def test_a_slow_client_is_waited_for_and_slows_the_pod() -> None:
    event = b"data: " + b"x" * 65_000 + b"\n\n"
    count = 200
    written = 0

    async def answer(exchange: Exchange) -> None:
        nonlocal written
        exchange.begin_stream()
        for _ in range(count):
            exchange.chunk(event)
            await exchange.writer.drain()
            written += 1
        exchange.end_stream()

    async with (
        Pod(answer) as pod,
        gateway_over(pod, relay={"idle_timeout_s": 0.2}) as gateway,
    ):
        host, port = gateway.url.removeprefix("http://").split(":")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        sock.connect((host, int(port)))
        reader, writer = await asyncio.open_connection(sock=sock, limit=65_536)
        body = json.dumps(body_of("chat", stream=True)).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.8)  # several idle timeouts: it is the client who is silent
        assert written < count
        data = b""
        while piece := await reader.read(1 << 20):
            data += piece
        assert data.endswith(b"0\r\n\r\n")
        assert data.count(b"x" * 65_000) >= 0.9 * count  # a few are cut by the chunked framing
        assert b"error" not in data
        writer.close()
        await until(gateway.settled)


@pytest.mark.parametrize("pause_s", [0.0, 2.0])
async def test_what_came_while_a_client_did_not_read_is_not_left_behind(pause_s: float) -> None:
    """aiohttp stops reading there, and goes on while what it has is read."""
    event = b"data: " + b"x" * 992 + b"\n\n"
    gateway: Running

    async def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        (connection,) = (c for c in gateway.server.connections if not c.cycle.response_complete)
        while not connection.flow.write_paused:
            for _ in range(20):
                exchange.chunk(event)
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        for _ in range(600):
            exchange.chunk(event)
        paused.set()
        await asyncio.sleep(pause_s)
        exchange.end_stream()

    paused = asyncio.Event()
    async with Pod(answer) as pod, gateway_over(pod) as gateway:
        body = body_of("chat", stream=True)
        async with gateway.client.post(gateway.url + PATHS["chat"], json=body) as response:
            await paused.wait()
            await asyncio.sleep(0.2)
            data = b""
            began_at = time.monotonic()
            async with asyncio.timeout(pause_s + 3):
                async for piece in response.content.iter_any():
                    data += piece
                    at = time.monotonic()
        assert set(data.split(b"\n\n")) == {event[:-2], b""}
        assert at - began_at < 1.2, "all of it came before the pod went on"


async def test_a_turn_that_is_over_leaves_no_garbage_for_the_collector() -> None:
    """Collections are rare; what waits for one keeps its request's body."""

    async with Pod(paced([EVENTS["chat"]] * 4)) as pod, gateway_over(pod) as gateway:
        await gateway.post("chat")
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                await gateway.post("chat")
            await until(gateway.settled)
            kinds = (Answer, Splice, TurnFlow, aiohttp.ClientResponse)
            left = [type(thing) for thing in gc.get_objects() if isinstance(thing, kinds)]
        finally:
            gc.enable()
        assert left == []


# -- the client leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wire", WIRES)
async def test_a_client_that_leaves_before_the_first_byte_cancels_the_pods_request(
    wire: str, stream: bool
) -> None:
    async def never(exchange: Exchange) -> None:
        await exchange.gone.wait()

    async with Pod(never) as pod, gateway_over(pod) as gateway:
        turn = asyncio.create_task(gateway.post(wire, body_of(wire, stream=stream)))
        await asyncio.wait_for(pod.arrived.wait(), 5)
        await asyncio.sleep(0.05)
        assert not gateway.settled()
        turn.cancel()
        await asyncio.wait_for(pod.turns[0].gone.wait(), 2)
        await until(gateway.settled)
        assert len(pod.turns) == 1
        await until(lambda: not gateway.server.tasks)


@pytest.mark.parametrize("wire", WIRES)
async def test_a_client_that_leaves_mid_stream_cancels_the_pods_request(wire: str) -> None:
    async def endless(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.chunk(EVENTS[wire])
        await exchange.gone.wait()

    async with Pod(endless) as pod, gateway_over(pod) as gateway:
        url, body = gateway.url + PATHS[wire], body_of(wire, stream=True)
        async with gateway.client.post(url, json=body) as response:
            await response.content.readany()
            response.close()
            await asyncio.wait_for(pod.turns[0].gone.wait(), 2)
        await until(gateway.settled)
        await until(lambda: not gateway.server.tasks)


async def test_a_client_that_leaves_a_half_read_whole_answer_cancels_the_pods_request() -> None:
    async def half(exchange: Exchange) -> None:
        exchange.write(b"HTTP/1.1 200 OK\r\ncontent-length: 20000000\r\n\r\n" + b"x" * 1000)
        await exchange.gone.wait()

    async with Pod(half) as pod, gateway_over(pod) as gateway:
        async with gateway.client.post(gateway.url + PATHS["chat"], json=body_of("chat")) as reply:
            await reply.content.readany()
            reply.close()
            await asyncio.wait_for(pod.turns[0].gone.wait(), 2)
        await until(gateway.settled)


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind() -> None:
    with logged() as log:
        async with Pod() as pod, gateway_over(pod) as gateway:
            host, port = gateway.url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            await until(lambda: bool(gateway.server.tasks))
            writer.close()
            await until(lambda: not gateway.server.tasks)
            assert not pod.turns
            assert gateway.settled()
    assert log.errors == []


# -- pods that fail before the first byte --------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
async def test_a_pod_that_refuses_is_passed_over_and_given_no_more_turns(wire: str) -> None:
    async with (
        Pod() as dead,
        Pod() as alive,
        gateway_over(dead, alive, routing={"policy": "round_robin"}) as gateway,
    ):
        await dead.stop()
        for _ in range(4):
            assert (await gateway.post(wire)).json == {"ok": True}
        assert len(alive.turns) == 4
        assert not gateway.gateway.fleet.pods["pod-0"].ready
        retried = await gateway.metric('cachewise_retries_total{reason="refused"}')
        assert retried == 1
        assert gateway.settled()


async def test_a_pod_that_closes_is_tried_once_more_then_another_is() -> None:
    order: list[str] = []

    async def close(exchange: Exchange) -> None:
        order.append("bad")
        exchange.die()

    async def answer(exchange: Exchange) -> None:
        order.append("good")
        exchange.whole(b"{}")

    async with Pod(close) as bad, Pod(answer) as good, gateway_over(bad, good) as gateway:
        gateway.gateway.fleet.pods["pod-1"].in_flight = 50  # the other one is preferred
        assert (await gateway.post("chat")).status == 200
        gateway.gateway.fleet.pods["pod-1"].in_flight -= 50
        assert order == ["bad", "bad", "good"]
        assert gateway.gateway.fleet.pods["pod-0"].ready
        assert gateway.settled()


async def test_a_pod_that_dies_within_a_whole_answer_is_tried_again_unseen() -> None:
    async def flaky(exchange: Exchange) -> None:
        if len(pod.turns) == 1:
            exchange.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly half of it")
            await exchange.writer.drain()
            exchange.die()
        else:
            exchange.whole(b'{"n": 2}')

    async with Pod(flaky) as pod, gateway_over(pod) as gateway:
        assert (await gateway.post("chat")).json == {"n": 2}
        assert len(pod.turns) == 2


@pytest.mark.parametrize("wire", WIRES)
async def test_pods_that_all_die_within_a_whole_answer_are_a_clean_502(wire: str) -> None:
    async def die(exchange: Exchange) -> None:
        exchange.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly half of it")
        await exchange.writer.drain()
        exchange.die()

    async with Pod(die) as one, Pod(die) as two, gateway_over(one, two) as gateway:
        reply = await gateway.post(wire)
        assert reply.status == 502
        assert reply.error(wire)["message"]
        assert len(one.turns) + len(two.turns) == 3
        assert {len(one.turns), len(two.turns)} == {1, 2}
        assert gateway.settled()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02 what?\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        b"zz\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
    ],
)
async def test_a_pod_that_answers_no_http_is_a_502(garbage: bytes) -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.write(garbage)
        await exchange.gone.wait()

    async with Pod(answer) as pod, gateway_over(pod) as gateway:
        assert (await gateway.post("chat")).status == 502
        assert gateway.settled()


async def test_a_connection_kept_from_the_last_turn_may_have_been_closed() -> None:
    async def once(exchange: Exchange) -> None:
        exchange.whole(b"{}")
        await exchange.writer.drain()

    async with Pod(once) as pod, gateway_over(pod) as gateway:
        for number in range(5):
            assert (await gateway.post("chat")).status == 200
            assert (await gateway.post("/v1/messages/count_tokens", {"model": "m"})).status == 200
            if number % 2:
                pod.close_idle()  # not announced: the gateway may write before it learns of it


@pytest.mark.parametrize("path", ["chat", "/v1/messages/count_tokens"])
async def test_a_request_on_a_connection_that_the_pod_just_closed_is_sent_again(path: str) -> None:
    answered = 0

    async def closes_at_second(exchange: Exchange) -> None:
        nonlocal answered
        if len(pod.turns) == 2:
            exchange.die()  # as if the idle timeout struck while the request was on its way
            return
        answered += 1
        exchange.whole(b"{}")

    async with Pod(closes_at_second) as pod, gateway_over(pod) as gateway:
        assert (await gateway.post(path, {"model": "m"})).status == 200
        assert (await gateway.post(path, {"model": "m"})).status == 200
        assert len(pod.turns) == 3
        assert answered == 2


# -- 503 and other answers of the pod ------------------------------------------------------------


async def test_a_pods_503_goes_to_another_pod_and_is_passed_on_if_there_is_none() -> None:
    async def busy(exchange: Exchange) -> None:
        exchange.whole(b'{"detail": "loading"}', 503, ("retry-after", "7"))

    pods = [Pod(busy) for _ in range(4)]
    async with pods[0], pods[1], pods[2], pods[3]:
        async with Pod() as well, gateway_over(pods[0], well) as gateway:
            gateway.gateway.fleet.pods["pod-1"].in_flight = 50
            assert (await gateway.post("chat")).json == {"ok": True}
            assert len(pods[0].turns) == 1
        for count in (1, 2, 3, 4):
            async with gateway_over(*pods[:count]) as gateway:
                reply = await gateway.post("chat")
                assert reply.status == 503
                assert reply.json == {"detail": "loading"}
                assert reply.headers["retry-after"] == "7"
                assert gateway.settled()


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 501])
@pytest.mark.parametrize("wire", ["chat", "messages"])
async def test_a_pods_own_error_passes_unwrapped(wire: str, status: int) -> None:
    body = b'{"error": {"message": "as the pod says it",  "code": 7}}'

    async def fail(exchange: Exchange) -> None:
        exchange.whole(body, status, ("retry-after", "3"), ("x-odd", "a"), ("x-odd", "b"))

    async with Pod(fail) as pod, Pod(fail) as other, gateway_over(pod, other) as gateway:
        reply = await gateway.post(wire, body_of(wire, stream=True))
        assert (reply.status, reply.data) == (status, body)
        assert reply.headers["retry-after"] == "3"
        assert reply.headers.getall("x-odd") == ["a", "b"]
        assert len(pod.turns) + len(other.turns) == 1


async def test_a_redirect_of_the_pod_is_not_followed() -> None:
    async def elsewhere(exchange: Exchange) -> None:
        exchange.whole(b"", 307, ("location", "http://127.0.0.1:1/"))

    async with Pod(elsewhere) as pod, gateway_over(pod) as gateway:
        url = gateway.url + PATHS["chat"]
        body = body_of("chat")
        async with gateway.client.post(url, json=body, allow_redirects=False) as response:
            assert response.status == 307


# -- pods that fail after the first byte ---------------------------------------------------------


def _die(exchange: Exchange) -> None:
    exchange.die()


def _close(exchange: Exchange) -> None:
    exchange.writer.close()


def _break_framing(exchange: Exchange) -> None:
    exchange.write(b"zz\r\nnot a chunk\r\n")


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("torn", [b"", b"data: {", b"event: x\nda", b"data: {}\n"])
@pytest.mark.parametrize("fault", [_die, _close, _break_framing])
@pytest.mark.parametrize("wire", WIRES)
async def test_a_pod_that_dies_mid_stream_ends_it_with_the_dialects_error_event(
    wire: str, fault: Any, torn: bytes, apart: bool
) -> None:
    async def dying(exchange: Exchange) -> None:
        exchange.begin_stream()
        for piece in (EVENTS[wire], EVENTS[wire], torn) if apart else (2 * EVENTS[wire] + torn,):
            if piece:
                exchange.chunk(piece)
            await asyncio.sleep(0.02)
        fault(exchange)

    with logged() as log:
        async with Pod(dying) as pod, Pod() as other, gateway_over(pod, other) as gateway:
            gateway.gateway.fleet.pods["pod-1"].in_flight = 50
            reply = await gateway.post(wire, body_of(wire, stream=True))
            gateway.gateway.fleet.pods["pod-1"].in_flight = 0
            assert reply.status == 200
            assert reply.data.startswith(2 * EVENTS[wire])
            assert "pod" in stream_error_of(wire, reply.data)
            assert len(events_of(reply.data)) == (3 if wire == "messages" else 4)
            assert not other.turns
            assert gateway.settled()
    assert log.errors == []


async def test_a_stream_of_fixed_length_that_breaks_ends_with_the_error_event_too() -> None:
    async def dying(exchange: Exchange) -> None:
        exchange.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 100000\r\n\r\n"
            + EVENTS["chat"]
        )
        await exchange.writer.drain()
        await asyncio.sleep(0.02)
        exchange.die()

    with logged() as log:
        async with Pod(dying) as pod, gateway_over(pod) as gateway:
            reply = await gateway.post("chat", body_of("chat", stream=True))
            assert "pod" in stream_error_of("chat", reply.data)
    assert log.errors == []


async def test_a_long_whole_answer_that_breaks_is_cut_and_never_looks_complete() -> None:
    async def dying(exchange: Exchange) -> None:
        exchange.write(b"HTTP/1.1 200 OK\r\ncontent-length: 20000000\r\n\r\n" + b"x" * 100_000)
        await exchange.writer.drain()
        await asyncio.sleep(0.02)
        exchange.die()

    async with Pod(dying) as pod, gateway_over(pod) as gateway:
        with pytest.raises(aiohttp.ClientPayloadError):
            await gateway.post("chat")
        assert gateway.settled()


# -- timeouts ------------------------------------------------------------------------------------


async def test_a_pod_that_accepts_no_connection_in_time_is_passed_over() -> None:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(0)
    fillers = [socket.socket() for _ in range(8)]
    try:
        async with (
            Pod() as well,
            Pod() as full,
            gateway_over(
                full, well, relay={"connect_timeout_s": 0.2}, probe={"interval_s": 600}
            ) as gateway,
        ):
            fleet = gateway.gateway.fleet
            fleet.pods["pod-0"].url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            for filler in fillers:  # the backlog is full: the next SYN gets no answer
                filler.setblocking(False)
                filler.connect_ex(listening.getsockname())
            fleet.pods["pod-1"].in_flight = 50
            assert (await gateway.post("chat")).json == {"ok": True}
            fleet.pods["pod-1"].in_flight = 0
            name = 'cachewise_retries_total{reason="connect_timeout"}'
            assert await gateway.metric(name) == 1
            assert gateway.settled()
    finally:
        for filler in fillers:
            filler.close()
        listening.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wire", WIRES)
async def test_no_first_byte_in_time_is_a_504_and_no_second_try(wire: str, stream: bool) -> None:
    async def never(exchange: Exchange) -> None:
        if stream:
            exchange.begin_stream()  # headers alone are not an answer yet
        await exchange.gone.wait()

    async with (
        Pod(never) as pod,
        Pod(never) as other,
        gateway_over(pod, other, relay={"first_byte_timeout_s": 0.15}) as gateway,
    ):
        reply = await gateway.post(wire, body_of(wire, stream=stream))
        assert reply.status == 504
        assert reply.error(wire)["message"]
        assert len(pod.turns) + len(other.turns) == 1
        await asyncio.wait_for((pod.turns + other.turns)[0].gone.wait(), 2)
        assert gateway.settled()


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("wire", WIRES)
async def test_silence_within_a_stream_ends_it_with_the_error_event(wire: str, pieces: int) -> None:
    async def stalls(exchange: Exchange) -> None:
        exchange.begin_stream()
        for _ in range(pieces):
            exchange.chunk(EVENTS[wire])
            await asyncio.sleep(0.02)
        await exchange.gone.wait()

    async with (
        Pod(stalls) as pod,
        gateway_over(pod, relay={"idle_timeout_s": 0.15, "first_byte_timeout_s": 60}) as gateway,
    ):
        reply = await asyncio.wait_for(gateway.post(wire, body_of(wire, stream=True)), 5)
        assert stream_error_of(wire, reply.data)
        await asyncio.wait_for(pod.turns[0].gone.wait(), 2)
        assert gateway.settled()


@pytest.mark.parametrize("wire", WIRES)
async def test_a_stream_that_stalls_on_a_pod_no_longer_ready_ends_soon(
    wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patience, "LOST_S", 0.1)

    async def stalls(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.chunk(EVENTS[wire])
        gateway.gateway.fleet.pods["pod-0"].ready = False  # as when SIGTERM closed its door
        await exchange.gone.wait()

    async with (
        Pod(stalls) as pod,
        gateway_over(pod, relay={"idle_timeout_s": 300}, probe={"interval_s": 60}) as gateway,
    ):
        reply = await asyncio.wait_for(gateway.post(wire, body_of(wire, stream=True)), 5)
        assert stream_error_of(wire, reply.data)
        assert gateway.settled()


async def test_a_turn_waiting_on_a_pod_no_longer_ready_goes_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Patience, "LOST_S", 0.1)
    asked: list[str] = []

    async def first_stalls(exchange: Exchange) -> None:
        asked.append(exchange.path)
        if len(asked) > 1:
            exchange.whole(b"{}")
            return
        for pod in gateway.gateway.fleet:
            pod.ready = pod.in_flight == 0
        await exchange.gone.wait()

    async with (
        Pod(first_stalls) as one,
        Pod(first_stalls) as two,
        gateway_over(one, two, probe={"interval_s": 60}) as gateway,
    ):
        reply = await asyncio.wait_for(gateway.post("chat"), 5)
        assert (reply.status, reply.data) == (200, b"{}")
        assert len(one.turns) == len(two.turns) == 1
        assert gateway.settled()


async def test_a_stream_slower_than_the_first_byte_timeout_but_never_idle_is_left_alone() -> None:
    async with (
        Pod(paced([EVENTS["chat"]] * 8, 0.1)) as pod,
        gateway_over(pod, relay={"idle_timeout_s": 5, "first_byte_timeout_s": 0.3}) as gateway,
    ):
        assert (await gateway.post("chat")).data == EVENTS["chat"] * 8


async def test_a_stream_longer_than_several_idle_timeouts_is_left_alone() -> None:
    async with (
        Pod(paced([EVENTS["chat"]] * 30, 0.05)) as pod,
        gateway_over(pod, relay={"idle_timeout_s": 0.4}) as gateway,
    ):
        assert (await gateway.post("chat")).data == EVENTS["chat"] * 30


# -- headers -------------------------------------------------------------------------------------


async def test_headers_pass_both_ways_but_those_of_one_connection() -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.whole(
            b"{}",
            200,
            ("X-Request-Id", "r1"),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
            ("Keep-Alive", "timeout=5"),
            ("Connection", "keep-alive, X-Secret-Hop"),
            ("X-Secret-Hop", "1"),
            ("Server", "podserver"),
            ("X-Text", "grüße"),
        )

    async with Pod(answer) as pod, gateway_over(pod) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(body_of("messages")).encode()
        writer.write(
            b"POST /v1/messages?beta=true&x=%%20 HTTP/1.1\r\nHost: gateway\r\n"
            b"Connection: close, X-Nominated\r\nX-Nominated: 1\r\nTE: trailers\r\n"
            b"Proxy-Authorization: Basic x\r\nAccept-Encoding: gzip\r\n"
            b"Anthropic-Beta: a,b\r\nUser-Agent: claude-cli/2.0\r\nX-Odd:\r\n"
            b"X-Two: 1\r\nX-Two: 2\r\n"
            b"X-Text: gr\xc3\xbc\xc3\x9fe\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        raw = await reader.read()
        writer.close()
        head = raw.partition(b"\r\n\r\n")[0].lower()
        assert b"x-request-id: r1" in head
        assert b"set-cookie: a=1\r\nset-cookie: b=2" in head
        assert "x-text: grüße".encode() in head
        for absent in (b"keep-alive:", b"x-secret-hop:", b"podserver"):
            assert absent not in head, absent
        sent = pod.turns[0]
        assert sent.target == "/v1/messages?beta=true&x=%20"
        assert sent.header(b"anthropic-beta") == [b"a,b"]
        assert sent.header(b"user-agent") == [b"claude-cli/2.0"]
        assert sent.header(b"x-odd") == [b""]
        assert sent.header(b"x-two") == [b"1", b"2"]
        assert sent.header(b"x-text") == ["grüße".encode()]
        assert sent.header(b"content-type") == [b"application/json"]
        assert sent.header(b"content-length") == [b"%d" % len(body)]
        assert sent.header(b"host") == [pod.url.removeprefix("http://").encode()]
        for name in (b"x-nominated", b"te", b"proxy-authorization", b"accept-encoding"):
            assert sent.header(name) == [], name


async def test_nothing_is_added_to_a_request_that_has_few_headers() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(body_of("chat")).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await reader.read()
        writer.close()
        assert {n.lower() for n, _ in pod.turns[0].headers} == {b"host", b"content-length"}


# -- after it all --------------------------------------------------------------------------------


async def test_connections_to_pods_are_kept_and_all_are_closed_at_the_end() -> None:
    async with Pod() as pod:
        async with gateway_over(pod) as gateway:
            for _ in range(10):
                await gateway.post("chat")
            assert len({id(turn.writer) for turn in pod.turns}) == 1
        await until(lambda: not pod.connections)


async def _many(gateway: Running, count: int) -> list[Any]:
    return await asyncio.gather(
        *(gateway.post("chat") for _ in range(count)), return_exceptions=True
    )


async def test_turns_at_the_same_time_do_not_mix() -> None:
    async def answer(exchange: Exchange) -> None:
        await asyncio.sleep(len(exchange.body) % 7 / 500)
        exchange.whole(exchange.body)

    async with Pod(answer) as pod, gateway_over(pod) as gateway:
        bodies = [json.dumps(body_of("chat", user=f"{n}" * (n % 9))).encode() for n in range(60)]
        replies = await asyncio.gather(*(gateway.post("chat", body) for body in bodies))
        assert [reply.data for reply in replies] == bodies
        assert gateway.settled()
