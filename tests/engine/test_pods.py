"""The pods themselves: what the gateway relies on in vLLM, seen on real vLLM."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from gateway.fleet.probe import probe
from gateway.fleet.scrape import PodLoad, parse_load
from tests.engine import tiny_model
from tests.engine.pods import BLOCK_SIZE_TOKENS, MODEL, NUM_BLOCKS, VllmPod

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

SCHEMA = {
    "type": "object",
    "properties": {"command": {"type": "string"}, "timeout": {"type": "integer"}},
    "required": ["command", "timeout"],
}
OPENAI_TOOL = {"type": "function", "function": {"name": "bash", "parameters": SCHEMA}}
RESPONSES_TOOL = {"type": "function", "name": "bash", "parameters": SCHEMA}
ANTHROPIC_TOOL = {"name": "bash", "input_schema": SCHEMA}


def fits_schema(arguments: dict[str, Any]) -> bool:
    """A free string is "ls"; which number the model takes is noise."""
    return arguments == {"command": "ls", "timeout": arguments["timeout"]} and isinstance(
        arguments["timeout"], int
    )


@pytest.fixture
def pod(vllm_pods: list[VllmPod]) -> VllmPod:
    return vllm_pods[0]


async def post(pod: VllmPod, path: str, body: dict[str, Any], **headers: str) -> Any:
    async with httpx.AsyncClient(base_url=pod.url, trust_env=False, timeout=60) as client:
        response = await client.post(path, json={"model": MODEL, **body}, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


async def load_of(pod: VllmPod) -> PodLoad:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        return parse_load((await client.get(f"{pod.url}/metrics")).text)


async def test_probe_finds_both_pods_ready_with_their_version_model_and_load(
    vllm_pods: list[VllmPod],
) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        for pod in vllm_pods:
            result = await probe(client, pod.url, None, timeout_s=10)
            assert result.ready, result.error
            assert result.warnings == ()
            assert [(m.id, m.max_model_len) for m in result.models] == [
                (MODEL, tiny_model.MAX_MODEL_LEN)
            ]
            assert result.version is not None
            assert result.capabilities.session_id
            assert not result.capabilities.kv_hints
            assert not result.capabilities.embedded
            again = await probe(client, pod.url, None, timeout_s=10, known=result)
            assert again.capabilities == result.capabilities


async def test_metrics_give_load_and_capacity_with_nothing_missing(pod: VllmPod) -> None:
    load = await load_of(pod)
    assert load.missing == ()
    assert load.renamed == ()
    assert load.engines == 1
    assert load.block_size_tokens == BLOCK_SIZE_TOKENS
    assert load.num_blocks == NUM_BLOCKS
    assert load.capacity_tokens == NUM_BLOCKS * BLOCK_SIZE_TOKENS


async def test_an_agents_turns_call_tools_then_answer_and_hit_the_prefix_cache(
    pod: VllmPod,
) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Why does the build fail? " + "Look closely. " * 30}
    ]
    cached, prompts = [], []
    before = await load_of(pod)
    for _ in range(tiny_model.TOOL_CALLS + 1):
        body = {"messages": messages, "tools": [OPENAI_TOOL], "max_tokens": 200}
        answer = await post(pod, "/v1/chat/completions", body, **{"x-session-id": "agent-1"})
        usage = answer["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        prompts.append(usage["prompt_tokens"])
        choice = answer["choices"][0]
        if choice["finish_reason"] != "tool_calls":
            break
        (call,) = choice["message"]["tool_calls"]
        assert fits_schema(json.loads(call["function"]["arguments"]))
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "nothing here"},
        ]
    assert choice["message"]["content"] == tiny_model.ANSWER_TEXT
    assert len(prompts) == tiny_model.TOOL_CALLS + 1
    # Everything of the last prompt but its incomplete block, and its last few tokens.
    for hit, prompt in zip(cached[1:], prompts, strict=False):
        assert hit % BLOCK_SIZE_TOKENS == 0
        assert prompt - 2 * BLOCK_SIZE_TOKENS < hit <= prompt + 200
    after = await load_of(pod)
    assert after.prefix_cache_queries_tokens == (before.prefix_cache_queries_tokens or 0) + sum(
        prompts
    )
    assert after.prefix_cache_hits_tokens == (before.prefix_cache_hits_tokens or 0) + sum(cached)


async def test_a_session_keeps_its_prefix_only_on_the_pod_that_served_it(
    vllm_pods: list[VllmPod],
) -> None:
    body = {"messages": [{"role": "user", "content": "Only one pod knows this. " * 20}]}
    first, second = vllm_pods
    cached = [
        (await post(at, "/v1/chat/completions", body))["usage"]["prompt_tokens_details"]
        for at in (first, first, second)
    ]
    assert [details["cached_tokens"] > 0 for details in cached] == [False, True, False]


async def test_greedy_output_is_the_same_on_both_pods(vllm_pods: list[VllmPod]) -> None:
    body = {"prompt": "Talk at length", "max_tokens": 32, "temperature": 0}
    one, other = [
        (await post(pod, "/v1/completions", body))["choices"][0]["text"] for pod in vllm_pods
    ]
    assert one == other


async def test_every_dialect_calls_the_tool(pod: VllmPod) -> None:
    question = [{"role": "user", "content": "Run it."}]
    chat = await post(pod, "/v1/chat/completions", {"messages": question, "tools": [OPENAI_TOOL]})
    (call,) = chat["choices"][0]["message"]["tool_calls"]
    assert fits_schema(json.loads(call["function"]["arguments"]))

    responses = await post(pod, "/v1/responses", {"input": question, "tools": [RESPONSES_TOOL]})
    (item,) = [item for item in responses["output"] if item["type"] == "function_call"]
    assert fits_schema(json.loads(item["arguments"]))

    messages = await post(
        pod,
        "/v1/messages",
        {"messages": question, "tools": [ANTHROPIC_TOOL], "max_tokens": 200},
    )
    (block,) = [block for block in messages["content"] if block["type"] == "tool_use"]
    assert fits_schema(block["input"])
    assert messages["stop_reason"] == "tool_use"


async def test_anthropic_input_tokens_leave_out_the_cached_ones(pod: VllmPod) -> None:
    question = [{"role": "user", "content": "What is in the cache? " * 20}]
    total = (await post(pod, "/v1/messages/count_tokens", {"messages": question}))["input_tokens"]
    for _ in range(2):
        answer = await post(pod, "/v1/messages", {"messages": question, "max_tokens": 8})
    usage = answer["usage"]
    assert usage["cache_read_input_tokens"] > 0
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == total


async def test_responses_report_cached_tokens_inside_input_tokens(pod: VllmPod) -> None:
    for _ in range(2):
        answer = await post(pod, "/v1/responses", {"input": "And in this cache? " * 20})
    usage = answer["usage"]
    assert 0 < usage["input_tokens_details"]["cached_tokens"] < usage["input_tokens"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 4}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
    ],
)
async def test_a_session_id_header_of_256_bytes_is_accepted(
    pod: VllmPod, path: str, body: dict[str, Any]
) -> None:
    await post(pod, path, body, **{"x-session-id": "s" * 256})


async def test_a_client_that_leaves_ends_its_request_on_the_pod(pod: VllmPod) -> None:
    body = {
        "model": MODEL,
        "stream": True,
        "max_tokens": 20_000,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "Talk at length"}],
    }
    await runs(pod, 0)  # whatever other tests left
    async with (
        httpx.AsyncClient(base_url=pod.url, trust_env=False, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        lines = response.aiter_lines()  # kept: once it is collected, httpx closes the connection
        async for line in lines:
            if line.startswith("data:"):
                break
        await runs(pod, 1)
    await runs(pod, 0)


async def runs(pod: VllmPod, requests: int) -> None:
    """Wait until the pod says that it runs so many; what it says is a step or two old."""
    seen: list[float] = []
    deadline = time.monotonic() + 60
    while not seen or seen[-1] != requests:
        assert time.monotonic() < deadline, f"ran {sorted(set(seen))}, never {requests}"
        seen.append((await load_of(pod)).running_requests)
        await asyncio.sleep(0.05)
