"""The gateway in front of two real vLLM pods: sessions are recognised, kept where their prefix is,
and vLLM's own count of cached tokens proves it."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.engine import pods, tiny_model
from tests.engine.pods import BLOCK_SIZE_TOKENS, MODEL, VllmPod
from tests.engine.test_pods import ANTHROPIC_TOOL, OPENAI_TOOL, RESPONSES_TOOL, fits_schema

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

KEY = "any-key"
MAX_TURNS = tiny_model.TOOL_CALLS + 4
"""The tiny model answers after `TOOL_CALLS` results; it may ask for several calls at once."""


@pytest.fixture(scope="module")
def gateway(vllm_pods: list[VllmPod], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`cachewise serve` in front of the pods; yields its URL."""
    with pods.gateway(vllm_pods, tmp_path_factory.mktemp("gateway") / "log") as url:
        yield url


def sessions_of(gateway: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{gateway}/v1/cachewise/sessions?limit=1000", trust_env=False)
    return list(answer.json()["data"])


def only_new(gateway: str, before: list[dict[str, Any]]) -> dict[str, Any]:
    known = {session["id"] for session in before}
    (session,) = [each for each in sessions_of(gateway) if each["id"] not in known]
    return session


def check_session(
    session: dict[str, Any], client: str, by: str, turns: int, tool_calls: int
) -> None:
    assert session["client"] == client
    assert session["identified_by"] == by
    assert session["turns"] == turns > 1
    assert session["tool_calls"] == tool_calls > 0
    assert session["prefix_breaks"] == 0
    assert session["idle_kind"] == "human"
    assert session["last_gap"]["kind"] == "tool"
    assert set(session["last_gap"]["tools"]) == {"bash"}
    assert session["last_gap"]["seconds"] >= 0.2


def check_cached(cached: list[int], prompts: list[int]) -> None:
    """Each turn found in vLLM's cache all of the last prompt but an incomplete block or two."""
    for hit, prompt in zip(cached[1:], prompts, strict=False):
        assert hit > prompt - 2 * BLOCK_SIZE_TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_chat_turns_of_one_agent_hit_one_pods_prefix_cache(gateway: str, stream: bool) -> None:
    before = sessions_of(gateway)
    text = f"Why does the build fail (stream {stream})? " + "Look closely. " * 30
    messages: list[Any] = [{"role": "user", "content": text}]
    cached, prompts, pods, called = [], [], set(), 0
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key=KEY) as client:
        for _ in range(MAX_TURNS):
            raw = client.chat.completions.with_raw_response.create(
                model=MODEL,
                messages=messages,
                tools=[OPENAI_TOOL],  # type: ignore[list-item]
                max_tokens=200,
                stream=stream,
                extra_headers={"x-cachewise-route": "1"},
                **({"stream_options": {"include_usage": True}} if stream else {}),
            )
            pods.add(json.loads(raw.headers["x-cachewise-route"])["pod"])
            calls: list[dict[str, str]] = []
            usage: Any = None
            if stream:
                for chunk in raw.parse():  # type: ignore[union-attr]
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        for piece in choice.delta.tool_calls or ():
                            if piece.id:
                                calls.append({"id": piece.id, "name": "", "arguments": ""})
                            calls[-1]["name"] += piece.function.name or ""
                            calls[-1]["arguments"] += piece.function.arguments or ""
            else:
                answer: Any = raw.parse()
                usage = answer.usage
                calls = [
                    {"id": c.id, "name": c.function.name, "arguments": c.function.arguments}
                    for c in answer.choices[0].message.tool_calls or ()
                ]
            cached.append(usage.prompt_tokens_details.cached_tokens)
            prompts.append(usage.prompt_tokens)
            called += len(calls)
            if not calls:
                break
            assert fits_schema(json.loads(calls[0]["arguments"]))
            time.sleep(0.25)
            messages += [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": call["id"],
                            "type": "function",
                            "function": {"name": call["name"], "arguments": call["arguments"]},
                        }
                        for call in calls
                    ],
                },
                *(
                    {"role": "tool", "tool_call_id": call["id"], "content": "nothing here"}
                    for call in calls
                ),
            ]
    assert len(pods) == 1
    check_cached(cached, prompts)
    check_session(only_new(gateway, before), "openai-sdk", "new", len(prompts), called)


def test_anthropic_turns_of_one_agent_hit_one_pods_prefix_cache(gateway: str) -> None:
    before = sessions_of(gateway)
    messages: list[Any] = [{"role": "user", "content": "Mend the test. " + "Be careful. " * 40}]
    cached, prompts, called = [], [], 0
    with anthropic.Anthropic(base_url=gateway, api_key=KEY) as client:
        for _ in range(MAX_TURNS):
            with client.messages.stream(
                model=MODEL,
                messages=messages,
                tools=[ANTHROPIC_TOOL],  # type: ignore[list-item]
                max_tokens=200,
                extra_headers={"x-claude-code-session-id": "real-vllm"},
            ) as stream:
                answer = stream.get_final_message()
            cached.append(answer.usage.cache_read_input_tokens or 0)
            prompts.append(answer.usage.input_tokens + cached[-1])
            calls = [block for block in answer.content if block.type == "tool_use"]
            called += len(calls)
            if not calls:
                break
            assert fits_schema(calls[0].input)
            time.sleep(0.25)
            messages += [
                {"role": "assistant", "content": [block.to_dict() for block in answer.content]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": call.id, "content": "nothing here"}
                        for call in calls
                    ],
                },
            ]
    check_cached(cached, prompts)
    session = only_new(gateway, before)
    by = "x-claude-code-session-id"
    check_session(session, "anthropic-sdk", by, len(prompts), called)


def test_responses_turns_of_one_agent_hit_one_pods_prefix_cache(gateway: str) -> None:
    before = sessions_of(gateway)
    items: list[Any] = [{"role": "user", "content": "Find the bug. " + "Read all of it. " * 40}]
    cached, prompts, called = [], [], 0
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key=KEY) as client:
        for _ in range(MAX_TURNS):
            answer = client.responses.create(
                model=MODEL,
                input=items,
                tools=[RESPONSES_TOOL],  # type: ignore[list-item]
                extra_headers={"thread-id": "thread-1", "session-id": "thread-1"},
            )
            assert answer.usage is not None
            cached.append(answer.usage.input_tokens_details.cached_tokens)
            prompts.append(answer.usage.input_tokens)
            calls = [item for item in answer.output if item.type == "function_call"]
            called += len(calls)
            if not calls:
                break
            time.sleep(0.25)
            items += [item.to_dict() for item in answer.output]
            items += [
                {"type": "function_call_output", "call_id": call.call_id, "output": "nothing here"}
                for call in calls
            ]
    check_cached(cached, prompts)
    check_session(only_new(gateway, before), "openai-sdk", "thread-id", len(prompts), called)


def test_two_agents_that_start_alike_are_told_apart_and_both_pods_work(gateway: str) -> None:
    before = sessions_of(gateway)
    started = [{"role": "user", "content": "The very same task. " * 40}]
    runs: list[list[Any]] = [list(started), list(started)]
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key=KEY) as client:
        for _ in range(2):
            for messages in runs:
                answer = client.chat.completions.create(
                    model=MODEL,
                    messages=messages,
                    tools=[OPENAI_TOOL],  # type: ignore[list-item]
                    tool_choice={"type": "function", "function": {"name": "bash"}},
                    max_tokens=200,
                )
                calls = answer.choices[0].message.tool_calls or ()
                assert calls
                messages.append(
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [call.to_dict() for call in calls],
                    }
                )
                messages += [
                    {"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in calls
                ]
    known = {session["id"] for session in before}
    new = [session for session in sessions_of(gateway) if session["id"] not in known]
    assert sorted(session["turns"] for session in new) == [2, 2]


def test_a_prompt_too_long_is_refused_in_vllms_own_words(
    gateway: str, vllm_pods: list[VllmPod]
) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "too long " * tiny_model.MAX_MODEL_LEN}],
    }
    through, direct = [
        httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False)
        for url in (gateway, vllm_pods[0].url)
    ]
    assert through.status_code == direct.status_code == 400
    assert through.content == direct.content


def test_a_client_that_leaves_ends_its_request_on_vllm(
    gateway: str, vllm_pods: list[VllmPod]
) -> None:
    body = {
        "model": MODEL,
        "stream": True,
        "max_tokens": 20_000,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "Talk at length"}],
    }
    with (
        httpx.Client(trust_env=False, timeout=60) as client,
        client.stream("POST", f"{gateway}/v1/chat/completions", json=body) as response,
    ):
        next(line for line in response.iter_lines() if line.startswith("data:"))
    deadline = time.monotonic() + 30
    running = re.compile(r"^vllm:num_requests_running\{.*\} (\d)", re.MULTILINE)
    while time.monotonic() < deadline:
        counts = [
            running.search(httpx.get(f"{pod.url}/metrics", trust_env=False).text)
            for pod in vllm_pods
        ]
        if all(count is not None and count.group(1) == "0" for count in counts):
            break
        time.sleep(0.1)
    else:
        pytest.fail("vLLM still runs the request of a client that left")
    assert all(session["in_flight"] == 0 for session in sessions_of(gateway))
