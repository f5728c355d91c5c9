import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.embedded import EmbeddedFleet, EngineConfig
from gateway.embedded.script import DEFAULT_TEXT
from tests.test_dashboards import VLLM_METRICS

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "embedded", "messages": [{"role": "user", "content": "hello"}]}
STREAM = HELLO | {"stream": True}


def scripted(**script: Any) -> dict[str, str]:
    return {"x-embedded-script": json.dumps(script)}


def pod_client(fleet: EmbeddedFleet, index: int = 0) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=fleet.urls[index], timeout=30)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_the_pod_says_that_it_is_embedded(fleet: EmbeddedFleet) -> None:
    async with pod_client(fleet) as client:
        answer = await client.post(CHAT, json=HELLO)
        assert answer.headers["x-cachewise-embedded"] == "true"
        assert answer.json()["system_fingerprint"] == "cachewise-embedded"
        assert answer.json()["choices"][0]["message"]["content"] == DEFAULT_TEXT
        assert "embedded" in (await client.get("/version")).json()["version"]
        assert (await client.get("/no-such-path")).headers["x-cachewise-embedded"] == "true"


async def test_the_small_endpoints_answer_as_vllm_does(fleet: EmbeddedFleet) -> None:
    async with pod_client(fleet) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ping")).status_code == 200
        card = (await client.get("/v1/models")).json()["data"][0]
        assert (card["id"], card["max_model_len"]) == ("embedded", 32_768)
        tokens = (await client.post("/tokenize", json=HELLO)).json()
        counted = (await client.post("/v1/messages/count_tokens", json=HELLO)).json()
        assert tokens["count"] == len(tokens["tokens"]) == counted["input_tokens"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": []}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/messages", {"messages": [], "max_tokens": 1}),
    ],
)
async def test_another_model_is_not_found(
    fleet: EmbeddedFleet, path: str, body: dict[str, Any]
) -> None:
    async with pod_client(fleet) as client:
        answer = await client.post(path, json=body | {"model": "gpt-5"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["message"] == "The model `gpt-5` does not exist."
    assert error["type"] == "NotFoundError"
    assert ("param" in error) != (path == "/v1/messages")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"{", "JSON"),
        (b"[]", "dictionary"),
        (b'{"messages": 3}', "messages"),
        (b'{"messages": [], "max_tokens": 0}', "max_tokens must be at least 1"),
        (b'{"messages": [], "tools": [1]}', "tools"),
    ],
)
async def test_a_malformed_request_is_refused_by_name(
    fleet: EmbeddedFleet, content: bytes, names: str
) -> None:
    async with pod_client(fleet) as client:
        for path in (CHAT, "/v1/messages"):
            answer = await client.post(path, content=content)
            assert answer.status_code == 400
            assert names in answer.json()["error"]["message"]


async def test_a_prompt_over_the_model_length_gets_vllms_error(fleet: EmbeddedFleet) -> None:
    body = {"model": "embedded", "messages": [{"role": "user", "content": "word " * 40_000}]}
    async with pod_client(fleet) as client:
        answer = await client.post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(
        "This model's maximum context length is 32768 tokens. However, your prompt contains "
    )
    assert answer.json()["error"]["param"] == "input_tokens"


async def test_metrics_have_vllms_names_and_count(fleet: EmbeddedFleet) -> None:
    async with pod_client(fleet) as client:
        for _ in range(2):
            usage = (await client.post(CHAT, json=HELLO)).json()["usage"]
        text = (await client.get("/metrics")).text
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    expected = {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:kv_cache_usage_perc": 0,
        "vllm:prefix_cache_queries_total": 2 * usage["prompt_tokens"],
        "vllm:prefix_cache_hits_total": usage["prompt_tokens_details"]["cached_tokens"],
        "vllm:prompt_tokens_total": 2 * usage["prompt_tokens"],
        "vllm:generation_tokens_total": 2 * usage["completion_tokens"],
        "vllm:num_preemptions_total": 0,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:inter_token_latency_seconds_count": 2 * (usage["completion_tokens"] - 1),
        "vllm:request_queue_time_seconds_count": 2,
    }
    for name, value in expected.items():
        assert samples[name, None].value == value, name
        assert samples[name, None].labels == {"model_name": "embedded", "engine": "0"}
    assert samples["vllm:request_success_total", "stop"].value == 2
    info = samples["vllm:cache_config_info", None]
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"]) == ("16", "4097")
    assert info.value == 1


def buckets_in(page: str) -> dict[str, list[str]]:
    """The upper bounds of each histogram, as written."""
    found: dict[str, list[str]] = {}
    for name, bound in re.findall(r'(?m)^(vllm:\w+)_bucket\{[^}]*le="([^"]+)"', page):
        found.setdefault(name, []).append(bound)
    return found


async def test_its_histograms_have_vllms_buckets(fleet: EmbeddedFleet) -> None:
    async with pod_client(fleet) as client:
        own = buckets_in((await client.get("/metrics")).text)
    real = buckets_in(VLLM_METRICS.read_text())
    assert len(own) == 3
    assert own == {name: real[name] for name in own}


async def test_the_session_id_reaches_the_engine(fleet: EmbeddedFleet) -> None:
    seen: list[str | None] = []
    scheduler = fleet.pods[0].scheduler
    add = scheduler.add
    scheduler.add = lambda request: (seen.append(request.session_id), add(request))[1]  # type: ignore[method-assign, func-returns-value]
    async with pod_client(fleet) as client:
        await client.post(CHAT, json=HELLO, headers={"x-session-id": "a"})
        await client.post(CHAT, json=HELLO | {"session_id": "b"}, headers={"x-session-id": "a"})
        await client.post(CHAT, json=HELLO)
    assert seen == ["a", "b", None]


@pytest.mark.parametrize("body", [STREAM, HELLO], ids=["stream", "whole"])
async def test_a_client_that_leaves_aborts_its_request(
    fleet: EmbeddedFleet, body: dict[str, Any]
) -> None:
    engine = fleet.pods[0]
    async with pod_client(fleet) as client:
        request = asyncio.create_task(
            client.post(CHAT, json=body, headers=scripted(output_tokens=20_000))
        )
        await until(lambda: engine.scheduler.counters.generation_tokens > 0)
        assert engine.scheduler.pool.usage > 0
        request.cancel()
        await until(lambda: engine.num_requests == 0)
    assert engine.scheduler.pool.usage == 0
    assert engine.scheduler.counters.finished["abort"] == 1


async def test_two_long_requests_on_a_tiny_cache_preempt_and_finish() -> None:
    config = EngineConfig(kv_capacity_tokens=1024, max_model_len=1024)
    async with EmbeddedFleet(pods=1, config=config, speedup=500) as fleet:
        async with pod_client(fleet) as client:
            answers = await asyncio.gather(
                *(
                    client.post(CHAT, json=STREAM, headers=scripted(output_tokens=700))
                    for _ in range(2)
                )
            )
        for answer in answers:
            chunks = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
            texts = [json.loads(chunk)["choices"][0]["delta"].get("content") for chunk in chunks]
            assert len("".join(text or "" for text in texts)) == 700 * 4 - 8
            assert answer.text.endswith("data: [DONE]\n\n")
        scheduler = fleet.pods[0].scheduler
        assert scheduler.counters.preemptions >= 1
        assert scheduler.pool.usage == 0


async def test_a_marker_in_a_message_is_a_script_and_calls_only_offered_tools(
    fleet: EmbeddedFleet,
) -> None:
    script = {"turns": [{"text": "hey", "tool_calls": [{"name": "bash"}]}]}
    body = {
        "messages": [{"role": "user", "content": f"x [[embedded-script:{json.dumps(script)}]]"}]
    }
    tools = {"tools": [{"type": "function", "function": {"name": "bash"}}]}
    async with pod_client(fleet) as client:
        plain = (await client.post(CHAT, json=body)).json()["choices"][0]["message"]
        calling = (await client.post(CHAT, json=body | tools)).json()["choices"][0]["message"]
    assert plain["content"] == calling["content"] == "hey"
    assert "tool_calls" not in plain
    assert calling["tool_calls"][0]["function"] == {"name": "bash", "arguments": "{}"}


@pytest.mark.parametrize("script", ["{", '{"turn": []}', '{"turns": [{"text": 3}]}'])
async def test_a_bad_script_is_refused(fleet: EmbeddedFleet, script: str) -> None:
    marked = {"messages": [{"role": "user", "content": f"[[embedded-script: {script}]]"}]}
    async with pod_client(fleet) as client:
        by_header = await client.post(CHAT, json=HELLO, headers={"x-embedded-script": script})
        by_marker = await client.post(CHAT, json=marked)
    for answer in (by_header, by_marker):
        assert answer.status_code == 400
        assert "x-embedded-script" in answer.json()["error"]["message"]


async def test_a_scripted_status_fails_on_the_named_pod_alone(fleet: EmbeddedFleet) -> None:
    headers = scripted(fail={"status": 503, "pod": "embedded-1"})
    async with pod_client(fleet, 0) as first, pod_client(fleet, 1) as second:
        assert (await first.post(CHAT, json=HELLO, headers=headers)).status_code == 200
        failed = await second.post(CHAT, json=STREAM, headers=headers)
    assert failed.status_code == 503
    assert failed.json()["error"]["code"] == 503


@pytest.mark.parametrize("after_chunks", [0, 1, 3])
@pytest.mark.parametrize("body", [STREAM, HELLO], ids=["stream", "whole"])
async def test_a_scripted_disconnect_breaks_the_connection(
    fleet: EmbeddedFleet, body: dict[str, Any], after_chunks: int
) -> None:
    headers = scripted(
        output_tokens=400, fail={"status": "disconnect", "after_chunks": after_chunks}
    )
    received = b""
    async with pod_client(fleet) as client:
        with pytest.raises(httpx.TransportError):  # noqa: PT012
            async with client.stream("POST", CHAT, json=body, headers=headers) as answer:
                async for chunk in answer.aiter_raw():
                    received += chunk
        await until(lambda: fleet.pods[0].num_requests == 0)
    assert bool(received) == (after_chunks > 0 and body is STREAM)
    assert b"[DONE]" not in received


@pytest.mark.parametrize(
    ("path", "end"),
    [
        (CHAT, "data: [DONE]\n\n"),
        ("/v1/messages", '"message":"Failure asked for by the request\'s script."}}\n\n'),
    ],
)
async def test_a_scripted_status_within_a_stream_is_an_error_event(
    fleet: EmbeddedFleet, path: str, end: str
) -> None:
    headers = scripted(output_tokens=400, fail={"status": 500, "after_chunks": 2})
    async with pod_client(fleet) as client:
        answer = await client.post(path, json=STREAM, headers=headers)
    assert answer.status_code == 200
    assert "Failure asked for by the request's script." in answer.text
    assert answer.text.endswith(end)
    assert 'finish_reason":"stop' not in answer.text


async def test_a_killed_pod_drops_its_streams_and_the_others_live(fleet: EmbeddedFleet) -> None:
    async with pod_client(fleet, 0) as first, pod_client(fleet, 1) as second:
        request = asyncio.create_task(
            first.post(CHAT, json=STREAM, headers=scripted(output_tokens=20_000))
        )
        await until(lambda: fleet.pods[0].scheduler.counters.generation_tokens > 0)
        await fleet.kill(0)
        with pytest.raises(httpx.TransportError):
            await request
        with pytest.raises(httpx.ConnectError):
            await first.get("/health")
        assert fleet.pods[0].num_requests == 0
        assert fleet.pods[0].scheduler.pool.usage == 0
        assert (await second.post(CHAT, json=HELLO)).status_code == 200


async def test_closing_the_fleet_leaves_no_task_and_no_port() -> None:
    before = asyncio.all_tasks()
    async with EmbeddedFleet(pods=2, speedup=1) as fleet:
        urls = fleet.urls
        client = httpx.AsyncClient(timeout=30)
        request = asyncio.create_task(client.post(f"{urls[0]}{CHAT}", json=STREAM))
        await until(lambda: fleet.pods[0].num_requests == 1)
    with pytest.raises(httpx.TransportError):
        await request
    for url in urls:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{url}/health")
    await client.aclose()
    assert asyncio.all_tasks() == before
    assert all(engine.num_requests == 0 for engine in fleet.pods)
    assert all(engine.scheduler.pool.usage == 0 for engine in fleet.pods)


async def test_an_engine_that_stops_fails_its_requests_in_the_dialects_shape(
    fleet: EmbeddedFleet,
) -> None:
    engine = fleet.pods[0]
    async with pod_client(fleet) as client:
        requests = [
            asyncio.create_task(
                client.post(path, json=body, headers=scripted(output_tokens=20_000))
            )
            for path, body in ((CHAT, HELLO), (CHAT, STREAM), ("/v1/messages", HELLO))
        ]
        await until(lambda: engine.num_requests == 3)
        await until(lambda: engine.scheduler.counters.generation_tokens > 0)
        await engine.aclose()
        whole, stream, message = await asyncio.gather(*requests)
        assert (await client.get("/health")).status_code == 503
    assert whole.status_code == message.status_code == 500
    assert whole.json()["error"]["type"] == "InternalServerError"
    assert message.json()["type"] == "error"
    assert "EngineCore encountered an issue" in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    assert engine.scheduler.pool.usage == 0
