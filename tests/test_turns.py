"""Turns on their way in, over real sockets: bodies, models, keys, what is told of a turn, and what
becomes of it when the clever part fails."""

import asyncio
import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import brotli
import pytest
import zstandard
from prometheus_client.parser import text_string_to_metric_families

import gateway.turns
from gateway.config import LogSettings
from gateway.dialects.chat import ChatJson, ChatStream
from gateway.logs import logging_to
from gateway.sessions import SessionStore
from tests.served import (
    EVENTS,
    PATHS,
    WIRES,
    Exchange,
    Pod,
    Reply,
    Running,
    body_of,
    gateway_over,
    logged,
)

COUNT = "/v1/messages/count_tokens"
LIMIT_BYTES = 4096


def raw_deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


CODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
}


def encoded(coding: str) -> dict[str, str]:
    return {"content-encoding": coding}


async def post_pieces(gateway: Running, wire: str, data: bytes) -> Reply:
    """A turn whose length is not told: its body comes in chunks."""

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 1000):
            yield data[at : at + 1000]

    url = gateway.url + PATHS.get(wire, wire)
    async with gateway.client.post(url, data=pieces()) as response:
        return await Reply.read(response)


async def of_itself(exchange: Exchange) -> None:
    """Whatever it is asked, the pod's answer is an error of its own."""
    exchange.whole(b'{"object":"error","message":"the pod\'s own","code":404}', 404)


# -- compressed bodies ---------------------------------------------------------------------------


async def test_a_compressed_body_reaches_the_pod_unfolded() -> None:
    body = json.dumps(body_of("chat", user="x" * 2000)).encode()
    cases = [(coding, coder(body)) for coding, coder in CODERS.items()]
    cases += [
        ("GZIP", gzip.compress(body)),
        ("identity", body),
        ("deflate", raw_deflate(body)),
        ("gzip, br", brotli.compress(gzip.compress(body))),
        ("zstd,identity,deflate", zlib.compress(zstandard.compress(body))),
        ("gzip", gzip.compress(body[:100]) + gzip.compress(body[100:])),
        ("zstd", zstandard.compress(body[:100]) + zstandard.compress(body[100:])),
    ]
    async with Pod() as pod, gateway_over(pod) as gateway:
        for coding, data in cases:
            reply = await gateway.post("chat", data, headers=encoded(coding))
            assert reply.status == 200, (coding, reply.text)
            assert pod.turns[-1].body == body, coding
            assert pod.turns[-1].header(b"content-encoding") == []
            assert pod.turns[-1].header(b"content-length") == [b"%d" % len(body)]


async def test_a_large_compressed_body_reaches_the_pod_unfolded() -> None:
    body = json.dumps(body_of("chat", user=bytes(range(256)).decode("latin-1") * 700)).encode()
    stored = gzip.compress(body, compresslevel=0)
    async with Pod() as pod, gateway_over(pod) as gateway:
        assert (await gateway.post("chat", stored, headers=encoded("gzip"))).status == 200
        assert pod.turns[-1].body == body


@pytest.mark.parametrize("wire", ["chat", "messages", COUNT])
async def test_a_body_that_unfolds_beyond_the_limit_is_a_413(wire: str) -> None:
    bomb = b"[" * (64 * LIMIT_BYTES)
    exact = json.dumps(body_of("messages")).encode().ljust(LIMIT_BYTES)
    relay = {"max_body_bytes": LIMIT_BYTES}
    async with Pod() as pod, gateway_over(pod, relay=relay) as gateway:
        for coding, coder in CODERS.items():
            for data in (coder(bomb), coder(exact + b" ")):
                reply = await gateway.post(wire, data, headers=encoded(coding))
                assert reply.status == 413, coding
                assert str(LIMIT_BYTES) in reply.error(wire)["message"]
            reply = await gateway.post(wire, coder(exact), headers=encoded(coding))
            assert reply.status == 200, coding
        nested = gzip.compress(gzip.compress(bomb))
        assert (await gateway.post(wire, nested, headers=encoded("gzip,gzip"))).status == 413
        assert len(pod.turns) == len(CODERS)


@pytest.mark.parametrize("wire", ["chat", "messages", COUNT])
async def test_a_body_that_is_not_of_its_coding_is_a_400(wire: str) -> None:
    body = json.dumps(body_of("messages", metadata={"x": "yz" * 500})).encode()
    async with Pod() as pod, gateway_over(pod) as gateway:
        for coding, coder in CODERS.items():
            whole = coder(body)
            for data in (b"garbage" * 9, whole[: len(whole) // 2], whole[:-1]):
                reply = await gateway.post(wire, data, headers=encoded(coding))
                assert reply.status == 400, (coding, data)
                assert reply.error(wire)["type"] == "invalid_request_error"
        assert pod.turns == []


@pytest.mark.parametrize("wire", ["chat", "messages", COUNT])
async def test_a_coding_that_is_not_known_is_a_415_that_names_those_that_are(wire: str) -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        for coding in ("compress", "gzip, snappy"):
            reply = await gateway.post(wire, headers=encoded(coding))
            assert reply.status == 415
            assert "gzip, deflate, br, zstd" in reply.error(wire)["message"]
        assert pod.turns == []


# -- size and form of bodies ---------------------------------------------------------------------


@pytest.mark.parametrize("wire", [*WIRES, COUNT])
async def test_a_body_above_the_limit_is_a_413_with_its_length_told_or_not(wire: str) -> None:
    body = json.dumps(body_of("messages" if wire == COUNT else wire)).encode()
    relay = {"max_body_bytes": LIMIT_BYTES}

    async with Pod() as pod, gateway_over(pod, relay=relay) as gateway:
        for size in (LIMIT_BYTES + 1, 200 * LIMIT_BYTES):
            reply = await gateway.post(wire, body.ljust(size))
            assert (reply.status, bool(reply.error(wire))) == (413, True)
            reply = await post_pieces(gateway, wire, (body.ljust(size)))
            assert (reply.status, bool(reply.error(wire))) == (413, True)
        assert pod.turns == []
        assert (await gateway.post(wire, body.ljust(LIMIT_BYTES))).status == 200
        assert (await post_pieces(gateway, wire, (body.ljust(LIMIT_BYTES)))).status == 200
        assert [len(turn.body) for turn in pod.turns] == [LIMIT_BYTES] * 2
        assert gateway.settled()


@pytest.mark.parametrize("wire", [*WIRES, COUNT])
async def test_a_malformed_body_is_a_400_in_the_dialects_shape(wire: str) -> None:
    bad = [b" ", b"{", b"[]", b"null", b"{}", b'{"model": 1}', b'{"model": "m"', b"\xff\xfe", b"no"]
    async with Pod() as pod, gateway_over(pod) as gateway:
        for data in bad:
            reply = await gateway.post(wire, data)
            assert reply.status == 400, data
            assert reply.error(wire)["type"] == "invalid_request_error"
        assert pod.turns == []
        assert list(gateway.gateway.sessions) == []
        assert await gateway.metric('cachewise_gateway_errors_total{status="400"}') == len(bad)


# -- models and pods -----------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [*WIRES, COUNT])
async def test_an_unknown_model_is_a_404_that_names_the_served_ones(wire: str) -> None:
    async with Pod(of_itself, "a", "b") as pod, gateway_over(pod) as gateway:
        reply = await gateway.post(wire, body_of("messages", "gpt-9"))
        error = reply.error(wire)
        assert reply.status == 404
        assert "'gpt-9'" in error["message"]
        assert "served: a, b" in error["message"]
        if wire in ("messages", COUNT):
            assert error["type"] == "not_found_error"
        else:
            assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert pod.turns == []


@pytest.mark.parametrize("wire", [*WIRES, COUNT])
async def test_an_alias_reaches_the_pod_as_the_model_it_stands_for(wire: str) -> None:
    models = {"aliases": {"small": "b", "*": "a", "lost": "nowhere"}}
    sent = "messages" if wire == COUNT else wire
    async with Pod(of_itself, "a", "b") as pod, gateway_over(pod, models=models) as gateway:
        for asked, served in {"small": "b", "gpt-9": "a", "a": "a", "b": "b"}.items():
            reply = await gateway.post(wire, body_of(sent, asked, metadata={"model": asked}))
            assert b"the pod's own" in reply.data
            assert json.loads(pod.turns[-1].body) == body_of(
                sent, served, metadata={"model": asked}
            )
        reply = await gateway.post(wire, body_of(sent, "lost"))
        assert reply.status == 404
        assert "alias of 'nowhere'" in reply.error(wire)["message"]


async def test_models_lists_models_and_aliases_but_no_wildcard() -> None:
    models = {"aliases": {"small": "b", "*": "a", "lost": "nowhere"}}
    async with (
        Pod(of_itself, "a", "b") as first,
        Pod(of_itself, "c") as second,
        gateway_over(first, second, models=models) as gateway,
    ):
        listing = (await gateway.get("/v1/models")).json
        assert {card["id"]: card["root"] for card in listing["data"]} == {
            "a": "a",
            "b": "b",
            "c": "c",
            "small": "b",
        }
        assert all(card["max_model_len"] == 4096 for card in listing["data"])
        assert (listing["first_id"], listing["last_id"]) == ("a", "small")
        gateway.gateway.fleet.lost(gateway.gateway.fleet.pods["pod-0"], "gone")
        listing = (await gateway.get("/v1/models")).json
        assert [card["id"] for card in listing["data"]] == ["c"]


@pytest.mark.parametrize("policy", ["expected_ttft", "least_loaded", "round_robin", "session_hash"])
async def test_each_turn_reaches_a_pod_that_serves_its_model(policy: str) -> None:
    routing = {"policy": policy}
    pods = [Pod(of_itself, *models) for models in (("a",), ("b",), ("a", "b", "c"))]
    async with pods[0], pods[1], pods[2], gateway_over(*pods, routing=routing) as gateway:
        for number in range(12):
            for model in "abc":
                said = [{"role": "user", "content": f"{model}{number}"}]
                await gateway.post("chat", {"model": model, "messages": said})
        for pod in pods:
            assert {json.loads(turn.body)["model"] for turn in pod.turns} <= set(pod.models)
        asked = [json.loads(turn.body)["model"] for pod in pods for turn in pod.turns]
        assert {model: asked.count(model) for model in "abc"} == dict.fromkeys("abc", 12)


@pytest.mark.parametrize("wire", [*WIRES, COUNT])
async def test_without_a_ready_pod_a_turn_is_a_503_that_says_when_to_come_back(wire: str) -> None:
    body = body_of("messages" if wire == COUNT else wire)
    async with Pod() as pod, gateway_over("http://127.0.0.1:1") as never, gateway_over(pod) as once:
        once.gateway.fleet.lost(once.gateway.fleet.pods["pod-0"], "gone")
        for gateway in (never, once):
            reply = await gateway.post(wire, body)
            assert reply.status == 503
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert "ready" in reply.error(wire)["message"]
            ready = await gateway.get("/ready")
            assert (ready.status, ready.json) == (
                503,
                {"status": "not_ready", "pods": {"pod-0": False}},
            )
            assert (await gateway.get("/health")).status == 200
        assert pod.turns == []


# -- small endpoints -----------------------------------------------------------------------------


async def test_a_websocket_handshake_on_responses_is_a_426() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await gateway.client.ws_connect(gateway.url + "/v1/responses")
        assert refused.value.status == 426
        reply = await gateway.get("/v1/responses")
        assert (reply.status, reply.error("responses")["code"]) == (405, "method_not_allowed")
        assert pod.turns == []


async def test_head_health_and_ready_are_answered() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        for path in ("/", "/api/hello"):
            async with gateway.client.head(gateway.url + path) as response:
                assert (response.status, await response.read()) == (200, b"")
        assert (await gateway.get("/health")).json == {"status": "ok"}
        ready = await gateway.get("/ready")
        assert (ready.status, ready.json) == (200, {"status": "ready", "pods": {"pod-0": True}})


async def test_count_tokens_is_passed_through_and_is_no_turn() -> None:
    async def count(exchange: Exchange) -> None:
        exchange.whole(b'{"input_tokens": 7}')

    async with Pod(count) as pod, gateway_over(pod) as gateway:
        async with gateway.client.post(
            gateway.url + COUNT + "?beta=true", json=body_of("messages")
        ) as response:
            assert await response.read() == b'{"input_tokens": 7}'
        assert pod.turns[0].target == COUNT + "?beta=true"
        pod.answer = of_itself
        reply = await gateway.post(COUNT, body_of("messages"))
        assert (reply.status, reply.json["message"]) == (404, "the pod's own")
        assert list(gateway.gateway.sessions) == []
        assert "cachewise_turns_total{" not in (await gateway.get("/metrics")).text
        await pod.stop()
        reply = await gateway.post(COUNT, body_of("messages"))
        assert (reply.status, reply.error(COUNT)["type"]) == (502, "api_error")


# -- keys ----------------------------------------------------------------------------------------

KEYS = {"ann": "ann-key-0123456789abcdef", "bob": "bob-key-0123456789abcdef"}
POD_KEY, ADMIN_TOKEN = "pod-key-0123456789abcdef", "admin-token-0123456789abcdef"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def access(**more: Any) -> dict[str, Any]:
    return {"api_keys": {tenant: (key,) for tenant, key in KEYS.items()}} | more


@pytest.mark.parametrize("wire", [*WIRES, COUNT])
async def test_without_a_known_key_a_turn_is_a_401_in_the_dialects_shape(wire: str) -> None:
    body = body_of("messages" if wire == COUNT else wire)
    async with Pod() as pod, gateway_over(pod, access=access()) as gateway:
        for headers in ({}, bearer("unknown-key-0123456789"), {"x-api-key": "nobody"}):
            reply = await gateway.post(wire, body, headers=headers)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
            assert reply.error(wire)["type"] == "authentication_error"
            assert (await gateway.get("/v1/models", headers=headers)).status == 401
        assert pod.turns == []
        for headers in (bearer(KEYS["ann"]), {"x-api-key": KEYS["bob"]}):
            assert (await gateway.post(wire, body, headers=headers)).status == 200
            assert (await gateway.get("/v1/models", headers=headers)).status == 200


@pytest.mark.parametrize("keys", [access(), {}])
async def test_tenants_never_share_a_session(keys: dict[str, Any]) -> None:
    async with Pod() as pod, gateway_over(pod, access=keys) as gateway:
        for named in ({}, {"x-cachewise-session-id": "same"}):
            for key in [*KEYS.values(), *KEYS.values()]:
                await gateway.post("chat", headers=bearer(key) | named)
        sessions = (await gateway.get("/v1/cachewise/sessions")).json["data"]
        named = [s for s in sessions if s["identified_by"] == "x-cachewise-session-id"]
        assert [s["turns"] for s in named] == [2, 2]
        assert len({s["id"] for s in named}) == len({s["group"] for s in named}) == 2
        if keys:
            assert {s["tenant"] for s in named} == set(KEYS)
        others = [s for s in sessions if s not in named]
        assert sum(s["turns"] for s in others) == 4
        if keys:
            assert {s["tenant"] for s in others} == set(KEYS)


async def test_the_pod_gets_its_own_key_and_never_the_clients() -> None:
    headers = {"x-api-key": KEYS["ann"], "x-cachewise-admin-token": "t", **bearer(KEYS["ann"])}
    for pod_key, seen in ((None, []), (POD_KEY, [f"Bearer {POD_KEY}".encode()])):
        keys = access(pod_api_key=pod_key)
        async with Pod() as pod, gateway_over(pod, access=keys) as gateway:
            for wire in (*WIRES, COUNT):
                body = body_of("messages" if wire == COUNT else wire)
                assert (await gateway.post(wire, body, headers=headers)).status == 200
            for turn in pod.turns:
                assert turn.header(b"authorization") == seen
                assert turn.header(b"x-api-key") == turn.header(b"x-cachewise-admin-token") == []
            assert all(probe.header(b"authorization") == seen for probe in pod.probes)


async def test_a_client_key_is_forwarded_if_so_set_and_the_admin_token_never() -> None:
    own, pods = ([f"Bearer {key}".encode()] for key in (KEYS["ann"], POD_KEY))
    for pod_key, seen in ((None, own), (POD_KEY, pods)):
        keys = access(forward_client_key=True, pod_api_key=pod_key)
        async with Pod() as pod, gateway_over(pod, access=keys) as gateway:
            token = {"x-cachewise-admin-token": ADMIN_TOKEN}
            await gateway.post("chat", headers=bearer(KEYS["ann"]) | token)
            assert pod.turns[-1].header(b"authorization") == seen
            assert pod.turns[-1].header(b"x-cachewise-admin-token") == []
            await gateway.post("chat", headers={"x-api-key": KEYS["ann"]})
            assert pod.turns[-1].header(b"x-api-key") == [KEYS["ann"].encode()]


async def test_the_admin_token_guards_what_the_gateway_knows() -> None:
    async with Pod() as pod, gateway_over(pod, access=access(admin_token=ADMIN_TOKEN)) as gateway:
        await gateway.post("chat", headers=bearer(KEYS["ann"]))
        sid = next(iter(gateway.gateway.sessions)).sid
        for path in ("sessions", f"sessions/{sid}", "sessions/none", "pods"):
            for headers in ({}, bearer(KEYS["ann"]), {"x-cachewise-admin-token": KEYS["ann"]}):
                reply = await gateway.get(f"/v1/cachewise/{path}", headers=headers)
                assert (reply.status, reply.error("chat")["code"]) == (401, "invalid_admin_token")
            for headers in (bearer(ADMIN_TOKEN), {"x-cachewise-admin-token": ADMIN_TOKEN}):
                reply = await gateway.get(f"/v1/cachewise/{path}", headers=headers)
                assert reply.status == (404 if path == "sessions/none" else 200)
        assert (await gateway.post("chat", headers=bearer(ADMIN_TOKEN))).status == 401


# -- what is told of a turn ----------------------------------------------------------------------


async def test_a_turn_that_asks_is_told_its_route() -> None:
    async with Pod() as first, Pod() as second, gateway_over(first, second) as gateway:
        for wire in WIRES:
            reply = await gateway.post(wire, headers={"x-cachewise-route": "1"})
            route = json.loads(reply.headers["x-cachewise-route"])
            taken = {"pod-0": first, "pod-1": second}[route["pod"]]
            assert taken.turns[-1].header(b"x-cachewise-route") == []
            assert {c["pod"] for c in route["candidates"]} == {"pod-0", "pod-1"}
            winner = next(c for c in route["candidates"] if c["pod"] == route["pod"])
            assert winner["total_s"] == min(c["total_s"] for c in route["candidates"])
            assert "x-cachewise-route" not in (await gateway.post(wire)).headers
        sid = (await gateway.get("/v1/cachewise/sessions")).json["data"][-1]["id"]
        detail = (await gateway.get(f"/v1/cachewise/sessions/{sid}")).json
        assert set(detail["route"]) == set(route)


class Versioned(Pod):
    """A pod that tells a version of vLLM."""

    version = ""

    async def _dispatch(self, exchange: Exchange) -> None:
        if exchange.path == "/version":
            exchange.whole(json.dumps({"version": self.version}).encode())
        else:
            await super()._dispatch(exchange)


@pytest.mark.parametrize(
    ("version", "takes"),
    [("0.32.0", True), ("0.33.1rc1", True), ("1.0.0", True), ("0.31.9", False), ("dev", False)],
)
async def test_the_session_id_goes_to_a_pod_that_takes_it(version: str, takes: bool) -> None:
    pod = Versioned()
    pod.version = version
    async with pod, gateway_over(pod) as gateway:
        for wire in WIRES:
            await gateway.post(wire, headers={"x-session-id": "the-clients-own"})
            sessions = (await gateway.get("/v1/cachewise/sessions?limit=1")).json["data"]
            sid = sessions[0]["id"].encode()
            assert pod.turns[-1].header(b"x-session-id") == ([sid] if takes else [])


async def test_metrics_parse_and_count_the_turns() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        for wire in WIRES:
            await gateway.post(wire, headers={"user-agent": "curl/8"})
        await gateway.post("chat", b"{")
        pod.answer = of_itself
        await gateway.post("chat")
        reply = await gateway.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        counted: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(reply.text):
            assert family.documentation or not family.name.startswith("cachewise_")
            for sample in family.samples:
                if sample.name == "cachewise_turns_total":
                    key = sample.labels["wire"], sample.labels["outcome"]
                    counted[key] = counted.get(key, 0) + sample.value
        assert counted == {
            **{(wire, "ok"): 1.0 for wire in WIRES},
            ("chat", "gateway_error"): 1.0,
            ("chat", "pod_error"): 1.0,
        }
        assert await gateway.metric('cachewise_pod_ready{pod="pod-0"}') == 1


async def test_the_sessions_api_says_what_is_wrong_with_a_query() -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        for key in "ab":
            await gateway.post("chat", headers={"x-cachewise-session-id": key})
        path = "/v1/cachewise/sessions"
        for query in ("limit=0", "limit=1001", "limit=-1", "limit=x", "limit=", "limit=%C2%B2"):
            reply = await gateway.get(f"{path}?{query}")
            assert (reply.status, reply.error("chat")["message"][:6]) == (400, "limit:"), query
        reply = await gateway.get(f"{path}?state=asleep")
        assert reply.status == 400
        assert "allowed: running, idle, ended" in reply.error("chat")["message"]
        reply = await gateway.get(f"{path}/unknown")
        assert (reply.status, reply.error("chat")["code"]) == (404, "session_not_found")
        listed = (await gateway.get(path)).json
        assert listed["total"] == len(listed["data"]) == 2
        limited = (await gateway.get(f"{path}?limit=1")).json
        assert limited["total"] == 2
        assert [s["id"] for s in limited["data"]] == [listed["data"][0]["id"]]
        group = listed["data"][1]["group"]
        found = (await gateway.get(f"{path}?group={group}")).json["data"]
        assert [session["id"] for session in found] == [listed["data"][1]["id"]]
        assert (await gateway.get(f"{path}?state=running")).json["data"] == []


@pytest.mark.parametrize("form", ["plain", "json"])
async def test_no_secret_and_no_text_reaches_log_metrics_or_api(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, arguments, answered = "prompt-words-xyzzy", "argument-words-plugh", "answer-words-frotz"
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "bash", "arguments": json.dumps({"command": arguments})},
    }
    said = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": prompt},
    ]
    message = {"role": "assistant", "content": answered, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}

    async def answer(exchange: Exchange) -> None:
        exchange.whole(json.dumps({"id": "1", "choices": [choice]}).encode())

    async def refuse(exchange: Exchange) -> None:
        exchange.whole(exchange.body, 400)

    async def die(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.chunk(b"data: " + answered.encode() + b"\n\n")
        exchange.die()

    def fails(*_: Any) -> None:
        raise ValueError(f"{prompt} {arguments} {KEYS['ann']}")

    log = io.StringIO()
    told: list[str] = []
    keys = access(admin_token=ADMIN_TOKEN, pod_api_key=POD_KEY)
    with logging_to(LogSettings(level="debug", format=form), log):  # type: ignore[arg-type]
        async with Pod(answer) as pod, gateway_over(pod, access=keys) as gateway:
            mine, body = bearer(KEYS["ann"]), body_of("chat") | {"messages": said}
            for pod.answer in (answer, refuse, die):
                await gateway.post("chat", body, headers=mine)
            await gateway.post("chat", json.dumps(body).encode()[:-2], headers=mine)
            await gateway.post("chat", body, headers=bearer("stranger-" + POD_KEY))
            await gateway.get("/v1/cachewise/pods", headers=mine)
            pod.answer = answer
            with monkeypatch.context() as broken:
                broken.setattr(SessionStore, "begin", fails)
                await gateway.post("chat", body, headers=mine)
            with monkeypatch.context() as broken:
                broken.setattr("gateway.turns.request_body", fails)
                assert (await gateway.post("chat", body, headers=mine)).status == 500
            told.append((await gateway.get("/metrics")).text)
            admin = bearer(ADMIN_TOKEN)
            sid = next(iter(gateway.gateway.sessions)).sid
            for path in ("sessions", f"sessions/{sid}", "pods"):
                told += [(await gateway.get(f"/v1/cachewise/{path}", headers=admin)).text]
    lines = log.getvalue()
    assert "bash" in lines, "the names of tools are told"
    assert "ValueError at" in lines
    secrets = (*KEYS.values(), POD_KEY, ADMIN_TOKEN, prompt, arguments, answered)
    for text in (lines, *told):
        assert [secret for secret in secrets if secret in text] == []


# -- faults of the clever part -------------------------------------------------------------------


def breaks(*_: Any, **__: Any) -> None:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize(
    ("stage", "owner", "name", "streamed"),
    [
        ("session", SessionStore, "begin", False),
        ("session", SessionStore, "begin", True),
        ("route", gateway.turns, "choose", False),
        ("route", gateway.turns, "choose", True),
        ("observe", ChatStream, "feed", True),
        ("observe", ChatStream, "finish", True),
        ("observe", ChatJson, "finish", False),
        ("settle", SessionStore, "end", False),
        ("settle", SessionStore, "end", True),
    ],
)
async def test_a_fault_of_the_clever_part_leaves_a_plain_relay(
    stage: str, owner: Any, name: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(exchange: Exchange) -> None:
        if not streamed:
            exchange.whole(b'{"ok": true}')
            return
        exchange.begin_stream()
        for _ in range(5):
            exchange.chunk(EVENTS["chat"])
            await asyncio.sleep(0.001)
        exchange.end_stream()

    async with Pod(answer) as first, Pod(answer) as second, gateway_over(first, second) as served:
        with monkeypatch.context() as broken, logged() as log:
            broken.setattr(owner, name, breaks)
            for _ in range(3):
                reply = await served.post("chat")
                assert reply.status == 200
                assert reply.data == (EVENTS["chat"] * 5 if streamed else b'{"ok": true}')
        assert await served.metric(f'cachewise_degraded_total{{stage="{stage}"}}') == 3
        ok = 'cachewise_turns_total{client="other",outcome="ok",wire="chat"}'
        assert await served.metric(ok) == 3
        assert len(log.errors) == 3
        assert all(f"{stage} failed" in text for text in log.errors)
        assert (await served.post("chat")).status == 200
        assert all(pod.in_flight == 0 == pod.queued_prefill_tokens for pod in served.gateway.fleet)
