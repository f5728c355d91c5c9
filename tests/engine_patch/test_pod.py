"""The patch on real vLLM pods with a small cache."""

from __future__ import annotations

import itertools
import json
import socket
import time
from typing import Any

import httpx
import pytest

from engine_patch.hints import MAX_BODY_BYTES
from gateway.fleet.probe import probe
from tests.engine import pods as servers
from tests.engine_patch import agents
from tests.engine_patch.conftest import API_KEY, HINTS_TOKEN, Pod, Pods

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

HINTS = "/v1/kv_hints"
KEY = {"authorization": f"Bearer {API_KEY}"}
TOKEN = {"x-kv-hints-token": HINTS_TOKEN}
MESSAGES = [{"role": "user", "content": "Talk at length"}]
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/completions": {"prompt": "Talk at length", "max_tokens": 4},
    "/v1/responses": {"input": "Talk at length", "max_output_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
}
_serial = itertools.count()


def new_session() -> str:
    return f"session-{next(_serial)}"


def row(pod: Pod, session: str, **headers: str) -> dict[str, Any] | None:
    """What the pod knows of the session."""
    answer = pod.client.get(f"{HINTS}/sessions", headers=headers)
    assert answer.status_code == 200, answer.text
    return next((r for r in answer.json()["sessions"] if r["session_id"] == session), None)


def generate(pod: Pod, path: str, session: str, headers: Any = (), **fields: Any) -> httpx.Response:
    body = {"model": servers.MODEL, **DIALECTS[path], **fields}
    return pod.client.post(path, json=body, headers={"x-session-id": session, **dict(headers)})


def test_hints_save_evictions_and_without_them_a_pod_is_stock(pods: Pods) -> None:
    turns = agents.workload(sessions=12, turns=8, first_tokens=2_000, seed=1)
    results, evicted = {}, {}
    for name, pod, hints in (
        ("stock", pods.stock, False),
        ("patched, no hints", pods.patched, False),
        ("patched, hints", pods.patched, True),
    ):
        assert pod.client.post("/reset_prefix_cache").json()["success"]
        before = agents.evictions(pod.client)
        results[name] = agents.play(pod.client, turns, hints)
        evicted[name] = agents.evictions(pod.client) - before
        result = results[name]
        print(f"{name:18} cached {result.cached_share:.1%} latency {result.latency_s:.2f} s")
    print(evicted)
    stock, unhinted, hinted = results.values()
    assert unhinted.cached_tokens == stock.cached_tokens
    assert evicted["patched, hints"] < 0.8 * evicted["patched, no hints"]
    assert hinted.cached_share > stock.cached_share
    causes = agents.samples(pods.patched.client, "cachewise:evicted_blocks_total")
    assert causes["forecast"] + causes["ended"] > 0


@pytest.mark.parametrize("path", DIALECTS)
def test_hints_in_a_requests_body_are_for_the_gap_after_it(pods: Pods, path: str) -> None:
    for stream in (False, True):
        session = new_session()
        hints = agents.reuse(session, 50.0, p_return=0.5)
        answer = generate(pods.patched, path, session, kv_hints=hints, stream=stream)
        assert answer.status_code == 200, answer.text
        known = row(pods.patched, session)
        assert known is not None
        assert known["idle_kind"] == "tool"
        assert known["p_return"] == 0.5
        assert 10 < known["expected_reuse_s"] < 1_000


def test_a_retention_in_a_requests_body_needs_no_scope(pods: Pods) -> None:
    session = new_session()
    directives = [{"start": 0, "end": None, "priority": 50, "duration": 60.0}]
    hints = agents.envelope("kv.retain", {"scope": None, "directives": directives})
    before = agents.samples(pods.patched.client, "cachewise:hints_total")
    answer = generate(pods.patched, "/v1/chat/completions", session, kv_hints=hints)
    assert answer.status_code == 200
    after = agents.samples(pods.patched.client, "cachewise:hints_total")
    assert sum(after.values()) == sum(before.values()) + 1
    # Without a request there is no session to stand for.
    alone = pods.patched.client.post(HINTS, json=hints | {"message_id": "alone"}).json()
    assert alone["results"][0]["status"] == "unsupported"


@pytest.mark.parametrize("path", DIALECTS)
def test_malformed_hints_in_a_body_are_refused_by_the_fields_name(pods: Pods, path: str) -> None:
    session = new_session()
    hints = agents.reuse(session, 50.0, p_return=1.5)
    answer = generate(pods.patched, path, session, kv_hints=hints)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_hints.actions[0].payload.p_return"
    assert row(pods.patched, session) is None
    assert generate(pods.patched, path, session, kv_hints=3).status_code == 400


def test_no_hints_are_no_error(pods: Pods) -> None:
    path = "/v1/chat/completions"
    assert generate(pods.patched, path, new_session(), kv_hints=None).status_code == 200
    talk = [{"role": "user", "content": 'what is "kv_hints": {"a": 1}?'}]
    assert generate(pods.patched, path, new_session(), messages=talk).status_code == 200
    broken = pods.patched.client.post(path, content=b'{"kv_hints": {}, "model": ')
    direct = pods.stock.client.post(path, content=b'{"kv_hints": {}, "model": ')
    assert broken.status_code == direct.status_code
    assert broken.content == direct.content


def test_a_body_in_pieces_arrives_whole(pods: Pods) -> None:
    session = new_session()
    fields = {"model": servers.MODEL, **DIALECTS["/v1/completions"], "session_id": session}
    body = json.dumps(fields | {"kv_hints": agents.reuse(session, 50.0)}).encode()

    def pieces() -> Any:
        for i in range(0, len(body), 7):
            yield body[i : i + 7]
            time.sleep(0.001)

    answer = pods.patched.client.post(
        "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200, answer.text
    known = row(pods.patched, session)
    assert known is not None
    assert known["idle_kind"] == "tool"


@pytest.mark.parametrize("path", [HINTS, "/v1/completions"])
def test_a_client_that_leaves_while_it_sends_its_body_leaves_no_trace(
    pods: Pods, path: str
) -> None:
    pod = pods.patched
    tracebacks = pod.logged("Traceback")
    url = pod.client.base_url
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nhost: pod\r\ncontent-length: 1000\r\n"
            'content-type: application/json\r\n\r\n{"kv_hints": {'.encode()
        )
        time.sleep(0.2)
    time.sleep(0.3)
    assert generate(pod, "/v1/completions", new_session()).status_code == 200
    assert pod.logged("Traceback") == tracebacks


def test_an_out_of_band_hint_is_applied_once_for_each_message(pods: Pods) -> None:
    client, session = pods.patched.client, new_session()
    hint = agents.reuse(session, 50.0, p_return=0.5)
    first = client.post(HINTS, json=hint)
    assert first.status_code == 200
    assert first.json() == {
        "protocol_version": "0.1",
        "message_id": hint["message_id"],
        "results": [{"action_id": "a", "status": "applied"}],
    }
    before = agents.samples(client, "cachewise:hints_total")
    again = agents.reuse(session, None) | {"message_id": hint["message_id"]}
    assert client.post(HINTS, json=again).json() == first.json()
    assert agents.samples(client, "cachewise:hints_total") == before
    known = row(pods.patched, session)
    assert known is not None
    assert known["idle_kind"] == "tool"


def test_the_answer_tells_for_each_action_what_became_of_it(pods: Pods) -> None:
    client, session = pods.patched.client, new_session()
    late = {"session_id": session, "idle_kind": "tool", "p_return": 1.0, "elapsed_s": 90_000.0}
    long = [[10.0, 0.5], [90_000.0, 0.1]]
    several = agents.reuse(session, 50.0)
    action = several["actions"][0]
    several["actions"] = [
        action,
        action | {"payload": action["payload"] | {"survival": long}},
        action | {"payload": late | {"survival": []}},
        action | {"action_type": "kv.move", "action_version": "7"},
    ]
    results = client.post(HINTS, json=several).json()["results"]
    assert [r["status"] for r in results] == ["applied", "clipped", "rejected", "unsupported"]
    assert ["reason" in r for r in results] == [False, True, True, True]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"survival": [[1.0, 0.5], [2.0, 0.6]]}, "actions[0].payload.survival[1][1]"),
        ({"survival": [[float(i), 0.5] for i in range(33)]}, "actions[0].payload.survival"),
        ({"session_id": "s" * 257}, "actions[0].payload.session_id"),
        ({"session_id": "é" * 200}, "actions[0].payload.session_id"),
        ({"idle_kind": "asleep"}, "actions[0].payload.idle_kind"),
        ({"elapsed_s": -1}, "actions[0].payload.elapsed_s"),
        ({"surprise": 1}, "actions[0].payload"),
    ],
)
def test_a_malformed_hint_is_refused_by_the_fields_name(
    pods: Pods, change: dict[str, Any], field: str
) -> None:
    hint = agents.reuse(new_session(), 50.0)
    hint["actions"][0]["payload"] |= change
    answer = pods.patched.client.post(HINTS, json=hint)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b'{"a": NaN}', "body"),
        (b"[" * 100_000, "body"),
        (b'{"protocol_version": "9", "message_id": "m", "actions": []}', "actions"),
    ],
)
def test_a_body_that_is_no_envelope_is_refused(pods: Pods, body: bytes, field: str) -> None:
    answer = pods.patched.client.post(HINTS, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_a_body_over_the_limit_is_refused_unread(pods: Pods) -> None:
    answer = pods.patched.client.post(HINTS, content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert str(MAX_BODY_BYTES) in answer.json()["error"]["message"]


def test_capabilities_tell_what_the_pod_is(pods: Pods) -> None:
    told = pods.patched.client.get(f"{HINTS}/capabilities").json()
    engine = {
        "active": True,
        "waiting_order": True,
        "protocol_versions": ["0.1"],
        "actions": {"kv.retain": ["1.0"], "cachewise.reuse": ["1.0"]},
        "block_size": servers.BLOCK_SIZE_TOKENS,
        "num_blocks": 600,
        "capacity_tokens": 599 * servers.BLOCK_SIZE_TOKENS,
        "max_sessions": 20_000,
        "max_wait_s": 30.0,
    }
    assert told == engine | {"engines": [engine]}


def test_sessions_tell_resident_blocks_and_expected_reuse(pods: Pods) -> None:
    session = new_session()
    tokens = list(range(100, 164)) * 3
    generate(pods.patched, "/v1/completions", session, prompt=tokens)
    unhinted = row(pods.patched, session)
    assert unhinted is not None
    assert unhinted["resident_blocks"] == len(tokens) // servers.BLOCK_SIZE_TOKENS
    assert unhinted["idle_kind"] == "unknown"
    assert unhinted["expected_reuse_s"] is None
    assert unhinted["engine"] == 0
    pods.patched.client.post(HINTS, json=agents.reuse(session, 20.0))
    hinted = row(pods.patched, session)
    assert hinted is not None
    assert 10 < hinted["expected_reuse_s"] < 21
    pods.patched.client.post(HINTS, json=agents.reuse(session, None))
    ended = row(pods.patched, session)
    assert ended is not None
    assert ended["idle_kind"] == "ended"
    assert ended["p_return"] == 0


def test_metrics_come_with_vllms_own(pods: Pods) -> None:
    client = pods.patched.client
    client.post(HINTS, json=agents.reuse(new_session(), 50.0))
    openmetrics = {"accept": "application/openmetrics-text", "accept-encoding": "gzip"}
    answer = client.get("/metrics", headers=openmetrics)
    ours = {line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE cach")}
    assert ours == {
        "cachewise:evicted_blocks_total",
        "cachewise:evicted_tokens_returned_total",
        "cachewise:hints_total",
        "cachewise:sessions",
        "cachewise:resident_blocks",
        "cachewise:waiting_overtakes_total",
        "cachewise:waiting_longest_seconds",
        "cachewise:scoring_seconds_total",
        "cachewise:patch_active",
    }
    assert "vllm:num_requests_running" in answer.text
    assert agents.samples(client, "cachewise:hints_total")["applied"] > 0
    assert agents.samples(client, "cachewise:patch_active") == {"": 1}
    assert agents.samples(client, "cachewise:sessions")[""] > 0
    assert sum(agents.samples(client, "cachewise:resident_blocks").values()) > 0


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_pod_that_slept_takes_hints_again(pods: Pods, level: int) -> None:
    """vLLM's CPU workers keep their memory; what sleep asks of the scheduler is the same."""
    client, session = pods.patched.client, new_session()
    tokens = [150 + level] * 97
    generate(pods.patched, "/v1/completions", session, prompt=tokens)
    client.post(HINTS, json=agents.reuse(session, 20.0))
    client.post(f"/sleep?level={level}").raise_for_status()
    asleep = row(pods.patched, session)
    assert asleep is not None
    assert asleep["resident_blocks"] == (0 if level else 3)
    client.post("/wake_up").raise_for_status()
    answer = generate(pods.patched, "/v1/completions", session, prompt=tokens)
    assert answer.status_code == 200
    assert client.post(HINTS, json=agents.reuse(session, 20.0)).status_code == 200
    awake = row(pods.patched, session)
    assert awake is not None
    assert awake["resident_blocks"] == 3


def test_without_the_api_key_nothing_is_answered_and_no_body_is_read(pods: Pods) -> None:
    pod = pods.guarded
    hint = agents.reuse(new_session(), 50.0)
    assert pod.client.post(HINTS, json=hint, headers=TOKEN).status_code == 401
    for path in ("capabilities", "sessions"):
        assert pod.client.get(f"{HINTS}/{path}", headers=TOKEN).status_code == 401
    malformed = generate(pod, "/v1/completions", new_session(), kv_hints=3)
    assert malformed.status_code == 401
    url = pod.client.base_url
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: pod\r\ncontent-length: 1000000000\r\n\r\n{"
        )
        assert b" 401 " in connection.recv(1_000)  # answered though the body never comes


def test_without_the_token_no_hint_is_taken(pods: Pods) -> None:
    pod, session = pods.guarded, new_session()
    hint = agents.reuse(session, 50.0)
    for headers in (KEY, KEY | {"x-kv-hints-token": "guess"}, KEY | {"x-kv-hints-token": ""}):
        assert pod.client.post(HINTS, json=hint, headers=headers).status_code == 403
        assert pod.client.get(f"{HINTS}/sessions", headers=headers).status_code == 403
        answer = generate(pod, "/v1/completions", session, headers, kv_hints=hint)
        assert answer.status_code == 403
        assert HINTS_TOKEN not in answer.text
    assert row(pod, session, **KEY, **TOKEN) is None
    assert generate(pod, "/v1/completions", session, KEY).status_code == 200
    assert pod.client.get(f"{HINTS}/capabilities", headers=KEY).json()["active"]
    for headers in (KEY | TOKEN,):
        assert pod.client.post(HINTS, json=hint, headers=headers).status_code == 200
        other = agents.reuse(session, 50.0)
        answer = generate(pod, "/v1/completions", session, headers, kv_hints=other)
        assert answer.status_code == 200
    known = row(pod, session, **KEY, **TOKEN)
    assert known is not None
    assert known["idle_kind"] == "tool"
    assert not pod.logged(HINTS_TOKEN)
    assert HINTS_TOKEN not in pod.client.get("/metrics").text


def test_behind_a_stock_scheduler_the_middleware_says_so_and_serves(pods: Pods) -> None:
    pod = pods.stock
    refused = pod.client.post(HINTS, json=agents.reuse(new_session(), 50.0))
    assert refused.status_code == 501
    assert "reuse-aware scheduler" in refused.json()["error"]["message"]
    malformed = pod.client.post(HINTS, json={})
    assert malformed.status_code == 400
    assert pod.client.get(f"{HINTS}/capabilities").json() == {
        "active": False,
        "engines": [{"active": False}],
    }
    assert pod.client.get(f"{HINTS}/sessions").json() == {"sessions": []}
    for _ in range(3):
        assert agents.samples(pod.client, "cachewise:patch_active") == {"": 0}
    for path in DIALECTS:
        hints = agents.reuse("s", 50.0)
        assert generate(pod, path, "s", kv_hints=hints).status_code == 200
    # vLLM logs a traceback for a call that its core does not know: it is asked once.
    assert pod.logged("Invocation of cachewise method failed") == 1


async def test_the_gateways_probe_tells_the_pods_apart(pods: Pods) -> None:
    found = []
    async with httpx.AsyncClient(trust_env=False) as client:
        for pod, key in ((pods.stock, None), (pods.patched, None), (pods.guarded, API_KEY)):
            url = str(pod.client.base_url).rstrip("/")
            result = await probe(client, url, key, timeout_s=10)
            assert result.ready, result.error
            found.append(result.capabilities.kv_hints)
    assert found == [False, True, True]
