"""Multi-turn tool-calling runs against a running pod with the vendors' own SDKs."""

import json
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from gateway.embedded import EmbeddedFleet

SCRIPT = json.dumps(
    {
        "turns": [
            {
                "text": "Let me look. " * 20,
                "tool_calls": [
                    {"name": "bash", "arguments": {"command": "ls -la"}},
                    {"name": "bash", "arguments": {"command": "echo '{\"a\": 1}'", "n": 3}},
                ],
            },
            {"tool_calls": [{"name": "bash", "arguments": {}}]},
            {"text": "All done."},
        ]
    }
)
TASK = "Please look around. " * 40 + f"[[embedded-script: {SCRIPT}]]"
EXPECTED_ARGUMENTS = [
    [{"command": "ls -la"}, {"command": "echo '{\"a\": 1}'", "n": 3}],
    [{}],
    [],
]
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}}


class Run:
    """What a run saw, turn by turn; checked the same way for every dialect."""

    def __init__(self) -> None:
        self.arguments: list[list[Any]] = []
        self.prompt_tokens: list[int] = []
        self.cached_tokens: list[int] = []
        self.output_tokens: list[int] = []
        self.ids: list[str] = []
        self.text = ""

    def check(self, fleet: EmbeddedFleet, id_prefix: str) -> None:
        assert self.arguments == EXPECTED_ARGUMENTS
        assert self.text == "All done."
        assert len(set(self.ids)) == 3
        assert all(call_id.startswith(id_prefix) for call_id in self.ids)
        assert self.cached_tokens[0] == 0
        for turn in (1, 2):
            # All of the last turn but the answer's last token, in whole blocks.
            before = self.prompt_tokens[turn - 1] + self.output_tokens[turn - 1] - 1
            assert self.cached_tokens[turn] == before // 16 * 16
        counters = fleet.pods[0].scheduler.counters
        assert counters.prefix_cache_hits == sum(self.cached_tokens)
        assert counters.prefix_cache_queries == counters.prompt_tokens == sum(self.prompt_tokens)
        assert counters.generation_tokens == sum(self.output_tokens)


async def chat_turn(client: AsyncOpenAI, messages: list[Any], stream: bool, run: Run) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "bash", "parameters": SCHEMA}}]
    if stream:
        async with client.chat.completions.stream(
            model="embedded",
            messages=messages,
            tools=tools,
            stream_options={"include_usage": True},
        ) as events:
            answer: Any = await events.get_final_completion()
    else:
        answer = await client.chat.completions.create(
            model="embedded", messages=messages, tools=tools
        )
    message, usage = answer.choices[0].message, answer.usage
    assert answer.system_fingerprint == "cachewise-embedded"
    calls = message.tool_calls or []
    assert answer.choices[0].finish_reason == ("tool_calls" if calls else "stop")
    run.arguments.append([json.loads(call.function.arguments) for call in calls])
    run.prompt_tokens.append(usage.prompt_tokens)
    run.cached_tokens.append(usage.prompt_tokens_details.cached_tokens)
    run.output_tokens.append(usage.completion_tokens)
    run.ids += [call.id for call in calls]
    run.text = message.content or ""
    messages.append(message.model_dump(include={"role", "content", "tool_calls"}))
    messages += [{"role": "tool", "tool_call_id": c.id, "content": "a b c " * 30} for c in calls]


async def messages_turn(
    client: AsyncAnthropic, messages: list[Any], stream: bool, run: Run
) -> None:
    tools: list[Any] = [{"name": "bash", "input_schema": SCHEMA}]
    arguments: Any = {
        "model": "embedded",
        "messages": messages,
        "tools": tools,
        "max_tokens": 1000,
        "system": [{"type": "text", "text": "Be brief. " * 10}],
    }
    if stream:
        async with client.messages.stream(**arguments) as events:
            answer: Any = await events.get_final_message()
    else:
        answer = await client.messages.create(**arguments)
    uses = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == ("tool_use" if uses else "end_turn")
    cached = answer.usage.cache_read_input_tokens
    run.arguments.append([use.input for use in uses])
    run.prompt_tokens.append(answer.usage.input_tokens + cached)
    run.cached_tokens.append(cached)
    run.output_tokens.append(answer.usage.output_tokens)
    run.ids += [use.id for use in uses]
    run.text = "".join(block.text for block in answer.content if block.type == "text")
    messages.append({"role": "assistant", "content": [b.model_dump() for b in answer.content]})
    results = [
        {"type": "tool_result", "tool_use_id": use.id, "content": "a b c " * 30} for use in uses
    ]
    messages.append({"role": "user", "content": results})


async def responses_turn(client: AsyncOpenAI, items: list[Any], stream: bool, run: Run) -> None:
    tools: list[Any] = [{"type": "function", "name": "bash", "parameters": SCHEMA, "strict": False}]
    arguments: Any = {"model": "embedded", "input": items, "tools": tools, "store": False}
    if stream:
        async with client.responses.stream(**arguments) as events:
            sequence = [event.sequence_number async for event in events]
            answer: Any = await events.get_final_response()
        assert sequence == list(range(len(sequence)))
    else:
        answer = await client.responses.create(**arguments)
    assert answer.status == "completed"
    calls = [item for item in answer.output if item.type == "function_call"]
    run.arguments.append([json.loads(call.arguments) for call in calls])
    run.prompt_tokens.append(answer.usage.input_tokens)
    run.cached_tokens.append(answer.usage.input_tokens_details.cached_tokens)
    run.output_tokens.append(answer.usage.output_tokens)
    run.ids += [call.call_id for call in calls]
    run.text = answer.output_text
    items += [item.model_dump(exclude_none=True) for item in answer.output]
    items += [
        {"type": "function_call_output", "call_id": call.call_id, "output": "a b c " * 30}
        for call in calls
    ]


STREAMING = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@STREAMING
async def test_chat_turns_reuse_the_prefix_and_follow_the_script(
    fleet: EmbeddedFleet, stream: bool
) -> None:
    run, messages = Run(), [{"role": "user", "content": TASK}]
    async with AsyncOpenAI(base_url=f"{fleet.urls[0]}/v1", api_key="none") as client:
        for _ in range(3):
            await chat_turn(client, messages, stream, run)
    run.check(fleet, "chatcmpl-tool-")


@STREAMING
async def test_messages_turns_reuse_the_prefix_and_follow_the_script(
    fleet: EmbeddedFleet, stream: bool
) -> None:
    run, messages = Run(), [{"role": "user", "content": TASK}]
    async with AsyncAnthropic(base_url=fleet.urls[0], api_key="none") as client:
        for _ in range(3):
            await messages_turn(client, messages, stream, run)
    run.check(fleet, "toolu_")


@STREAMING
async def test_responses_turns_reuse_the_prefix_and_follow_the_script(
    fleet: EmbeddedFleet, stream: bool
) -> None:
    run, items = Run(), [{"role": "user", "content": TASK}]
    async with AsyncOpenAI(base_url=f"{fleet.urls[0]}/v1", api_key="none") as client:
        for _ in range(3):
            await responses_turn(client, items, stream, run)
    run.check(fleet, "call_")


@STREAMING
async def test_completions_reuse_the_prefix(fleet: EmbeddedFleet, stream: bool) -> None:
    async with AsyncOpenAI(base_url=f"{fleet.urls[0]}/v1", api_key="none") as client:
        cached = []
        for _ in range(2):
            arguments: Any = {"model": "embedded", "prompt": "once upon a time " * 40}
            if stream:
                chunks = await client.completions.create(
                    **arguments, max_tokens=12, stream=True, stream_options={"include_usage": True}
                )
                answers = [chunk async for chunk in chunks]
                text = "".join(chunk.choices[0].text for chunk in answers if chunk.choices)
            else:
                answers = [await client.completions.create(**arguments, max_tokens=12)]
                text = answers[0].choices[0].text
            usage = answers[-1].usage
            assert usage is not None
            assert usage.completion_tokens == 12
            assert len(text) == 48
            assert usage.prompt_tokens_details is not None
            cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 160]


@STREAMING
async def test_reasoning_comes_before_the_text_in_every_dialect(
    fleet: EmbeddedFleet, stream: bool
) -> None:
    script = json.dumps({"turns": [{"reasoning": "Hmm. " * 9, "text": "Yes. " * 9}]})
    headers = {"x-embedded-script": script}
    url = fleet.urls[0]
    async with AsyncAnthropic(base_url=url, api_key="x", default_headers=headers) as anthropic:
        arguments: Any = {
            "model": "embedded",
            "max_tokens": 99,
            "messages": [{"role": "user", "content": "?"}],
        }
        if stream:
            async with anthropic.messages.stream(**arguments) as events:
                message: Any = await events.get_final_message()
        else:
            message = await anthropic.messages.create(**arguments)
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.content[0].thinking == "Hmm. " * 9
        assert message.content[0].signature
        assert message.content[1].text == "Yes. " * 9
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="x", default_headers=headers) as openai:
        arguments = {"model": "embedded", "input": "?"}
        if stream:
            async with openai.responses.stream(**arguments) as more_events:
                response: Any = await more_events.get_final_response()
        else:
            response = await openai.responses.create(**arguments)
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert response.output[0].content[0].text == "Hmm. " * 9
        assert response.output_text == "Yes. " * 9
        assert response.usage.output_tokens_details.reasoning_tokens == 11


async def test_the_token_limit_cuts_the_answer(fleet: EmbeddedFleet) -> None:
    headers = {"x-embedded-script": json.dumps({"output_tokens": 500})}
    url = fleet.urls[0]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="x", default_headers=headers) as openai:
        messages: Any = [{"role": "user", "content": "?"}]
        chat = await openai.chat.completions.create(
            model="embedded", messages=messages, max_completion_tokens=20
        )
        assert chat.choices[0].finish_reason == "length"
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 20
        whole = await openai.chat.completions.create(model="embedded", messages=messages)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 500
        response = await openai.responses.create(model="embedded", input="?", max_output_tokens=20)
        assert response.status == "incomplete"
    async with AsyncAnthropic(base_url=url, api_key="x", default_headers=headers) as anthropic:
        message = await anthropic.messages.create(
            model="embedded", max_tokens=20, messages=messages
        )
        assert message.stop_reason == "max_tokens"
        counted = await anthropic.messages.count_tokens(model="embedded", messages=messages)
        usage = message.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
