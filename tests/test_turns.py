"""What a turn meets at the gateway: bodies, models, keys, pods that lack something, faults."""

import asyncio
import gzip
import io
import json
import socket
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import pytest
import zstandard
from multidict import CIMultiDict
from prometheus_client.parser import text_string_to_metric_families

from gateway.admission import Admission
from gateway.config import LogSettings, hash_key
from gateway.dialects.sse import JsonObserver
from gateway.logs import logging_to
from gateway.sessions import SessionStore
from gateway.turn_history import TurnHistory
from tests.served import PATHS, WIRES, Exchange, Pod, body_of, gateway_over, until

ACME, OTHER = "cw-acme-key-0123456789", "cw-other-key-0123456789"
KEYS = {"acme": (hash_key(ACME),), "other": (hash_key(OTHER),)}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# -- request bodies --------------------------------------------------------------------------------

CODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "x-gzip": lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:]),
    "zstd, identity": lambda data: CODERS["zstd"](data[:7]) + CODERS["zstd"](data[7:]),
    "gzip, br": lambda data: brotli.compress(gzip.compress(data)),
    "identity": bytes,
}


@pytest.mark.parametrize("coding", CODERS)
@pytest.mark.parametrize("size", [10, 600_000])
async def test_a_compressed_body_reaches_the_pod_unpacked(coding: str, size: int) -> None:
    body = json.dumps(body_of("chat", user="x" * size)).encode()
    async with Pod() as pod, gateway_over(pod) as gateway:
        sent = CODERS[coding](body)
        reply = await gateway.post("chat", sent, headers={"content-encoding": coding})
        assert reply.status == 200
        assert pod.turns[0].body == body
        assert pod.turns[0].header(b"content-encoding") == []


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_a_bomb_is_refused_at_the_limit(coding: str) -> None:
    bomb = CODERS[coding](b" " * 50_000_000)
    async with Pod() as pod, gateway_over(pod, relay={"max_body_bytes": 1_000_000}) as gateway:
        reply = await gateway.post("chat", bomb, headers={"content-encoding": coding})
        assert reply.status == 413
        assert "max_body_bytes" in reply.error("chat")["message"]
        assert pod.turns == []


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize("broken", [b"not compressed at all", b""])
async def test_a_body_that_is_not_what_its_coding_says_is_a_400(coding: str, broken: bytes) -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        reply = await gateway.post("chat", broken, headers={"content-encoding": coding})
        assert reply.status == 400
        assert pod.turns == []


async def test_a_coding_that_is_not_known_is_a_415_that_names_those_that_are() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        reply = await gateway.post("chat", b"{}", headers={"content-encoding": "snappy"})
        assert reply.status == 415
        assert "gzip, deflate, br, zstd" in reply.error("chat")["message"]


@pytest.mark.parametrize("with_length", [True, False])
@pytest.mark.parametrize("wire", WIRES)
async def test_a_body_over_the_limit_is_a_413(wire: str, with_length: bool) -> None:
    body = json.dumps(body_of(wire, user="x" * 300_000)).encode()

    async def pieces() -> Any:
        for at in range(0, len(body), 65_536):
            yield body[at : at + 65_536]

    async with Pod() as pod, gateway_over(pod, relay={"max_body_bytes": 200_000}) as gateway:
        data: Any = io.BytesIO(body) if with_length else pieces()
        async with gateway.client.post(gateway.url + PATHS[wire], data=data) as response:
            assert response.status == 413
        assert pod.turns == []


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"{}", b'{"model": 3}', b'{"model": "m",}', b"\xff"]
)
async def test_a_body_that_names_no_model_is_a_400_in_the_dialects_shape(
    wire: str, body: bytes
) -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        reply = await gateway.post(wire, body or b" ")
        assert reply.status == 400
        assert reply.error(wire)["message"]
        assert pod.turns == []


async def test_a_body_odd_in_other_ways_is_left_to_the_pod() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        body = b'{"model": "m", "messages": "what?"}'
        assert (await gateway.post("chat", body)).status == 200
        assert pod.turns[0].body == body


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
async def test_an_unknown_model_is_a_404_that_names_those_served(wire: str) -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        reply = await gateway.post(wire, body_of(wire, "gpt-9"))
        assert reply.status == 404
        message = reply.error(wire)["message"]
        assert "served: m." in message
        assert "--model-alias" in message


async def test_an_alias_reaches_the_model_it_stands_for() -> None:
    models = {"aliases": {"small": "m", "*": "m", "lost": "nowhere"}}
    async with Pod() as pod, gateway_over(pod, models=models) as gateway:
        for name in ("small", "anything"):
            assert (await gateway.post("chat", body_of("chat", name))).status == 200
            assert json.loads(pod.turns[-1].body) == body_of("chat", "m")
        reply = await gateway.post("chat", body_of("chat", "lost"))
        assert reply.status == 404
        assert "alias of 'nowhere'" in reply.error("chat")["message"]
        listed = (await gateway.get("/v1/models")).json
        assert [model["id"] for model in listed["data"]] == ["m", "small"]
        assert listed["data"][1]["root"] == "m"
        assert (listed["object"], listed["has_more"]) == ("list", False)


async def test_each_model_reaches_a_pod_that_serves_it() -> None:
    async with (
        Pod(models_a := _well, "a", "both") as first,
        Pod(models_a, "b", "both") as second,
        gateway_over(first, second) as gateway,
    ):
        for model in ("a", "b", "a", "b", "both", "both"):
            assert (await gateway.post("chat", body_of("chat", model))).status == 200
        assert {json.loads(turn.body)["model"] for turn in first.turns} <= {"a", "both"}
        assert {json.loads(turn.body)["model"] for turn in second.turns} <= {"b", "both"}
        assert len(first.turns) >= 2
        assert len(second.turns) >= 2


async def _well(exchange: Exchange) -> None:
    exchange.whole(b"{}")


# -- small endpoints -------------------------------------------------------------------------------


async def test_what_clients_ask_at_start_is_answered() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        for path in ("/", "/api/hello"):
            async with gateway.client.head(gateway.url + path) as response:
                assert response.status == 200
        assert (await gateway.get("/health")).json == {"status": "ok"}
        ready = await gateway.get("/ready")
        assert (ready.status, ready.json["pods"]) == (200, {"pod-0": True})
        assert (await gateway.get("/v1/nothing")).status == 404
        assert (await gateway.get("/v1/messages")).error("messages")["type"]
        assert (await gateway.get("/v1/messages")).status == 405


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/messages", {"POST"}),
        ("PUT", "/v1/models", {"GET", "HEAD"}),
        ("GET", "/v1/cachewise/pods/pod-0/drain", {"POST", "DELETE"}),
        ("DELETE", "/v1/cachewise/sessions/x", {"GET", "HEAD"}),
        ("POST", "/ui/", {"GET", "HEAD"}),
        ("GET", "/v1/responses", {"POST"}),
    ],
)
async def test_a_path_says_which_methods_it_serves(method: str, path: str, allow: set[str]) -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        async with gateway.client.request(method, gateway.url + path) as response:
            assert response.status == 405
            assert set(response.headers["allow"].split(", ")) == allow


async def test_a_path_with_a_slash_behind_is_another_and_leads_nowhere() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        for path in ("/v1/messages/", "/v1/models/"):
            reply = await gateway.get(path, allow_redirects=False)
            assert (reply.status, reply.headers.get("location")) == (404, None)


@pytest.mark.parametrize("limit", ["9" * 5_000, "%D9%A3", "0", "-1", "x"])
async def test_a_limit_that_is_none_is_the_callers_error(limit: str) -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        assert (await gateway.get(f"/v1/cachewise/sessions?limit={limit}")).status == 400


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("status", [b"600 Odd", b"099 Odd", b"101 Switching Protocols"])
async def test_a_pod_whose_status_is_none_has_failed(wire: str, status: bytes) -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.write(b"HTTP/1.1 %b\r\ncontent-length: 2\r\n\r\n{}" % status)

    async with Pod(answer) as pod, gateway_over(pod) as gateway:
        reply = await gateway.post(wire)
        assert reply.status == 502
        assert reply.error(wire)["message"]
        assert gateway.settled()


async def test_codings_in_two_headers_are_as_in_one() -> None:
    body = gzip.compress(gzip.compress(json.dumps(body_of("chat")).encode()))
    headers = [("content-encoding", "gzip"), ("content-encoding", "gzip")]
    async with Pod() as pod, gateway_over(pod) as gateway:
        reply = await gateway.post("chat", body, headers=CIMultiDict(headers))
        assert reply.status == 200


async def test_hints_do_not_reach_a_pod_that_counts_tokens() -> None:
    async def counts(exchange: Exchange) -> None:
        exchange.whole(b'{"input_tokens": 7}')

    async with Pod(counts) as pod, gateway_over(pod) as gateway:
        body = body_of("messages") | {"kv_hints": {"x": 1}}
        assert (await gateway.post("/v1/messages/count_tokens", body)).status == 200
        assert "kv_hints" not in json.loads(pod.turns[-1].body)


async def test_a_real_websocket_handshake_gets_426_and_closes_nothing_else() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"GET /v1/responses HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\n"
            b"connection: Upgrade\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"sec-websocket-version: 13\r\n\r\n"
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 426 ")
        writer.close()
        assert (await gateway.get("/v1/responses")).status == 405


async def test_tokens_are_counted_by_a_pod() -> None:
    async def counts(exchange: Exchange) -> None:
        exchange.whole(b'{"input_tokens": 7}')

    models = {"aliases": {"haiku": "m"}}
    async with Pod(counts) as pod, gateway_over(pod, models=models) as gateway:
        path = "/v1/messages/count_tokens"
        reply = await gateway.post(path, body_of("messages", "haiku"))
        assert reply.json == {"input_tokens": 7}
        assert pod.turns[0].path == path
        assert json.loads(pod.turns[0].body)["model"] == "m"
        assert (await gateway.post(path, b"{")).error(path)["type"] == "invalid_request_error"
        assert len(gateway.gateway.sessions) == 0


async def test_without_a_ready_pod_turns_get_503_and_a_time_to_come_back() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with gateway_over(nowhere, probe={"interval_s": 60}) as gateway:
            for wire in WIRES:
                reply = await gateway.post(wire)
                assert reply.status == 503
                assert 1 <= int(reply.headers["retry-after"]) <= 60
                assert reply.error(wire)["message"]
            assert (await gateway.get("/ready")).status == 503
            assert (await gateway.get("/health")).status == 200


async def test_why_a_pod_is_not_ready_is_logged_once_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with gateway_over(nowhere, probe={"interval_s": 0.02}) as gateway:
            pod = gateway.gateway.fleet.pods["pod-0"]
            await until(lambda: pod.failures > 10)
            (told,) = (await gateway.get("/v1/cachewise/pods")).json["data"]
            assert told["trouble"] == pod.trouble
            said = [r.getMessage() for r in caplog.records if "not ready" in r.getMessage()]
            assert said == [f"pod pod-0 is not ready: {pod.trouble}"]


# -- access ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
async def test_with_keys_configured_others_get_401_in_their_dialect(wire: str) -> None:
    async with Pod() as pod, gateway_over(pod, access={"api_keys": KEYS}) as gateway:
        for headers in ({}, bearer("wrong-key-0123456789"), {"x-api-key": "wrong"}):
            reply = await gateway.post(wire, headers=headers)
            assert reply.status == 401
            assert reply.error(wire)["type"] == "authentication_error"
        assert (await gateway.post(wire, headers=bearer(ACME))).status == 200
        assert (await gateway.post(wire, headers={"x-api-key": ACME})).status == 200
        assert (await gateway.get("/v1/models")).status == 401
        assert len(pod.turns) == 2


async def test_two_tenants_never_share_a_session() -> None:
    named = {"x-claude-code-session-id": "the-same"}
    async with Pod() as pod, gateway_over(pod, access={"api_keys": KEYS}) as gateway:
        for key in (ACME, OTHER, ACME):
            await gateway.post("chat", headers=bearer(key) | named)
        sessions = {s.tenant: s for s in gateway.gateway.sessions}
        assert {name: s.turns for name, s in sessions.items()} == {"acme": 2, "other": 1}
        assert sessions["acme"].sid != sessions["other"].sid


@pytest.mark.parametrize("forward", [False, True])
async def test_a_clients_key_stays_here_unless_told_otherwise(forward: bool) -> None:
    access = {"forward_client_key": forward}
    async with Pod() as pod, gateway_over(pod, access=access) as gateway:
        admin = {"x-cachewise-admin-token": "adm1n"}
        await gateway.post("chat", headers=bearer(ACME) | {"x-api-key": OTHER} | admin)
        turn = pod.turns[0]
        assert turn.header(b"x-cachewise-admin-token") == []
        assert turn.header(b"authorization") == ([b"Bearer " + ACME.encode()] if forward else [])
        assert turn.header(b"x-api-key") == ([OTHER.encode()] if forward else [])


async def test_the_pods_own_key_is_sent_with_turns_and_probes() -> None:
    access = {"pod_api_key": "pod-secret-key"}
    async with Pod() as pod, gateway_over(pod, access=access) as gateway:
        await gateway.post("chat", headers=bearer(ACME))
        assert pod.turns[0].header(b"authorization") == [b"Bearer pod-secret-key"]
        assert all(p.header(b"authorization") == [b"Bearer pod-secret-key"] for p in pod.probes)


async def test_the_admin_token_guards_what_the_gateway_knows() -> None:
    access = {"admin_token": "the-admin-token"}
    async with Pod() as pod, gateway_over(pod, access=access) as gateway:
        await gateway.post("chat")
        (session,) = gateway.gateway.sessions
        for path in ("sessions", f"sessions/{session.sid}", "pods"):
            url = f"/v1/cachewise/{path}"
            assert (await gateway.get(url)).status == 401
            assert (await gateway.get(url, headers=bearer("no"))).status == 401
            assert (await gateway.get(url, headers=bearer("the-admin-token"))).status == 200


async def test_wrong_questions_to_the_sessions_api_are_400s() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        for query in ("limit=0", "limit=x", "limit=1001", "limit=-1", "state=asleep"):
            reply = await gateway.get(f"/v1/cachewise/sessions?{query}")
            assert reply.status == 400
            assert "allowed" in reply.error("chat")["message"]
        assert (await gateway.get("/v1/cachewise/sessions/none")).status == 404
        assert (await gateway.get("/v1/cachewise/sessions?state=idle")).json["data"] == []


# -- the end of a turn -----------------------------------------------------------------------------


async def test_a_client_that_leaves_after_the_last_event_has_had_its_answer() -> None:
    """As the SDKs do: they close the connection at ``[DONE]``, before the stream's last byte."""
    call = {"index": 0, "id": "c1", "function": {"name": "bash", "arguments": "{}"}}
    events = [
        {"id": "1", "choices": [{"index": 0, "delta": {"tool_calls": [call]}}]},
        {"id": "1", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    ]

    async def never_ends(exchange: Exchange) -> None:
        exchange.begin_stream()
        for event in events:
            exchange.chunk(b"data: %b\n\n" % json.dumps(event).encode())
        exchange.chunk(b"data: [DONE]\n\n")
        await exchange.gone.wait()

    async with Pod(never_ends) as pod, gateway_over(pod) as gateway:
        body = json.dumps(body_of("chat", stream=True))
        url = gateway.url + PATHS["chat"]
        async with gateway.client.post(url, data=body) as response:
            seen = b""
            while b"[DONE]" not in seen:
                seen += await response.content.readany()
            response.close()
        await until(gateway.settled)
        (session,) = gateway.gateway.sessions
        assert (session.idle_kind, session.waiting_for) == ("tool", ("bash",))
        sample = 'cachewise_turns_total{client="other",outcome="ok",wire="chat"}'
        assert await gateway.metric(sample) == 1


async def test_a_client_that_leaves_before_the_last_event_has_not() -> None:
    async def never_ends(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.chunk(b'data: {"id": "1", "choices": [{"index": 0, "delta": {}}]}\n\n')
        await exchange.gone.wait()

    async with Pod(never_ends) as pod, gateway_over(pod) as gateway:
        body = json.dumps(body_of("chat", stream=True))
        async with gateway.client.post(gateway.url + PATHS["chat"], data=body) as response:
            await response.content.readany()
            response.close()
        await until(gateway.settled)
        (session,) = gateway.gateway.sessions
        assert session.idle_kind is None
        sample = 'cachewise_turns_total{client="other",outcome="client_gone",wire="chat"}'
        assert await gateway.metric(sample) == 1


# -- what pods are told ----------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "told"), [("0.32.0", True), ("0.31.2", False)])
async def test_the_session_id_goes_to_engines_that_see_it(version: str, told: bool) -> None:
    class Versioned(Pod):
        async def _dispatch(self, exchange: Exchange) -> None:
            if exchange.path == "/version":
                exchange.whole(json.dumps({"version": version}).encode())
            else:
                await super()._dispatch(exchange)

    async with Versioned() as pod, gateway_over(pod) as gateway:
        await gateway.post("chat", headers={"x-session-id": "ses_1"})
        (session,) = gateway.gateway.sessions
        assert session.source == "x-session-id"
        assert pod.turns[0].header(b"x-session-id") == ([session.sid.encode()] if told else [])


async def test_the_route_is_explained_to_who_asks() -> None:
    async with Pod() as one, Pod() as two, gateway_over(one, two) as gateway:
        reply = await gateway.post("chat", headers={"x-cachewise-route": "1"})
        route = json.loads(reply.headers["x-cachewise-route"])
        assert {candidate["pod"] for candidate in route["candidates"]} == {"pod-0", "pod-1"}
        assert route["pod"] in ("pod-0", "pod-1")
        assert "x-cachewise-route" not in (await gateway.post("chat")).headers
        assert not (one.turns + two.turns)[0].header(b"x-cachewise-route")


# -- what is written down --------------------------------------------------------------------------


async def test_metrics_parse_and_count_the_turns() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        for wire in WIRES:
            await gateway.post(wire)
        await gateway.post("chat", b"{")
        text = (await gateway.get("/metrics")).text
        turns = {
            (sample.labels["wire"], sample.labels["outcome"]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "cachewise_turns_total"
        }
        assert turns == {(wire, "ok"): 1.0 for wire in WIRES} | {("chat", "gateway_error"): 1.0}


@pytest.mark.parametrize("form", ["plain", "json"])
async def test_no_secret_and_no_text_is_ever_written_down(form: Any) -> None:
    secrets = ["SECRET-PROMPT", "SECRET-ARGUMENT", "SECRET-ANSWER", ACME, "pod-secret-key", "adm1n"]
    call = {"id": "c1", "function": {"name": "bash", "arguments": '{"x": "SECRET-ARGUMENT"}'}}
    answer = {
        "id": "1",
        "choices": [
            {"finish_reason": "tool_calls", "message": {"content": "SECRET-ANSWER"}},
            {"message": {"tool_calls": [call]}},
        ],
    }

    async def calls(exchange: Exchange) -> None:
        exchange.whole(json.dumps(answer).encode())

    access = {"api_keys": KEYS, "pod_api_key": "pod-secret-key", "admin_token": "adm1n"}
    log = io.StringIO()
    with logging_to(LogSettings(level="debug", format=form), log):
        async with Pod(calls) as pod, gateway_over(pod, access=access) as gateway:
            body = body_of("chat")
            body["messages"][0]["content"] = "SECRET-PROMPT"
            await gateway.post("chat", body, headers=bearer(ACME))
            await gateway.post("chat", b'{"model": "SECRET-PROMPT"', headers=bearer(ACME))
            await gateway.post("chat", body, headers=bearer("SECRET-PROMPT-wrong-key"))
            await pod.stop()
            await gateway.post("chat", body, headers=bearer(ACME))
            (session,) = (s for s in gateway.gateway.sessions if s.tool_calls)
            assert session.waiting_for == ("bash",)
            admin = bearer("adm1n")
            written = (await gateway.get("/metrics")).text
            for path in ("sessions", f"sessions/{session.sid}", "pods"):
                written += (await gateway.get(f"/v1/cachewise/{path}", headers=admin)).text
    written += log.getvalue()
    assert "outcome" in written
    assert "bash" in written
    assert [secret for secret in secrets if secret in written] == []


# -- faults of the clever part ---------------------------------------------------------------------


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("stage", "owner", "name"),
    [
        ("session", SessionStore, "begin"),
        ("settle", SessionStore, "end"),
        ("admission", Admission, "arrive"),
        ("observe", JsonObserver, "finish"),
        ("history", TurnHistory, "_keep"),
    ],
)
async def test_a_fault_of_the_clever_part_is_counted_and_the_turn_goes_on(
    wire: str, stage: str, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Pod() as one, Pod() as two, gateway_over(one, two) as running:
        monkeypatch.setattr(owner, name, broken)
        reply = await running.post(wire)
        assert (reply.status, reply.data) == (200, b'{"ok": true}')
        monkeypatch.undo()
        assert await running.metric(f'cachewise_degraded_total{{stage="{stage}"}}') == 1
        await until(lambda: all(p.in_flight == 0 for p in running.gateway.fleet))
