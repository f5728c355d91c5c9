import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.embedded.dialects.base import RequestError
from gateway.embedded.dialects.chat import ChatExchange
from gateway.embedded.dialects.completions import CompletionExchange
from gateway.embedded.dialects.messages import MessagesExchange
from gateway.embedded.dialects.responses import ResponsesExchange
from gateway.embedded.prompt import (
    BYTES_PER_TOKEN,
    Call,
    Message,
    block_hashes,
    render_body,
    render_prompt,
)

CALL = Call("bash", b'{"command":"ls"}')
ANSWER = Message("assistant", "On it.", "Let me think.", (CALL, CALL))


def messages_prompt(**body: Any) -> bytes:
    return render_prompt(MessagesExchange(body, "m", "id").conversation)


def chat_prompt(**body: Any) -> bytes:
    return render_prompt(ChatExchange(body, "m", "id").conversation)


def responses_prompt(**body: Any) -> bytes:
    return render_prompt(ResponsesExchange(body, "m", "id").conversation)


def test_an_answer_that_comes_back_in_chat_extends_the_prompt() -> None:
    first = [{"role": "user", "content": "go"}]
    arguments = '{ "command" : "ls" }'  # as a client may re-serialise it
    call = {"id": "x", "type": "function", "function": {"name": "bash", "arguments": arguments}}
    back = {
        "role": "assistant",
        "content": "On it.",
        "reasoning_content": "Let me think.",
        "tool_calls": [call, call],
    }
    expected = chat_prompt(messages=first) + render_body(ANSWER)
    assert chat_prompt(messages=[*first, back, *first]).startswith(expected)


def test_an_answer_that_comes_back_in_messages_extends_the_prompt() -> None:
    first = [{"role": "user", "content": [{"type": "text", "text": "go"}]}]
    use = {"type": "tool_use", "id": "t", "name": "bash", "input": {"command": "ls"}}
    back = {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Let me think.", "signature": "s"},
            {"type": "text", "text": "On it.", "cache_control": {"type": "ephemeral"}},
            use,
            use,
        ],
    }
    result = {"role": "user", "content": [{"type": "tool_result", "content": "a\nb"}]}
    expected = messages_prompt(messages=first) + render_body(ANSWER)
    assert messages_prompt(messages=[*first, back, result]).startswith(expected)


def test_an_answer_that_comes_back_in_responses_extends_the_prompt() -> None:
    arguments = '{"command": "ls"}'
    call = {"type": "function_call", "call_id": "c", "name": "bash", "arguments": arguments}
    back = [
        {"type": "reasoning", "id": "rs_1", "content": [{"text": "Let me think."}]},
        {"type": "message", "role": "assistant", "content": [{"text": "On it."}], "id": "m"},
        call,
        call,
    ]
    user = {"role": "user", "content": "go"}
    result = {"type": "function_call_output", "call_id": "c", "output": "a"}
    expected = responses_prompt(input="go", instructions="be good") + render_body(ANSWER)
    assert responses_prompt(input=[user, *back, result], instructions="be good").startswith(
        expected
    )


def test_what_the_model_does_not_see_leaves_no_trace() -> None:
    plain: dict[str, Any] = {
        "system": [{"type": "text", "text": "You code."}],
        "tools": [{"name": "bash", "input_schema": {"type": "object"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "go"}]}],
    }
    marked = copy.deepcopy(plain)
    for block in (marked["system"][0], marked["tools"][0], marked["messages"][0]["content"][0]):
        block["cache_control"] = {"type": "ephemeral"}
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.330.44e;"}
    marked["system"].insert(0, billing)
    assert messages_prompt(**marked) == messages_prompt(**plain)
    plain["messages"] = [{"role": "user", "content": "go"}]
    plain["system"] = "You code."
    assert messages_prompt(**marked) == messages_prompt(**plain)


def test_tools_system_and_images_are_part_of_the_prompt() -> None:
    body = {"messages": [{"role": "user", "content": "go"}]}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    other = {"type": "image_url", "image_url": {"url": "data:image/png;base64,BBBB"}}
    prompts = {
        chat_prompt(**body),
        chat_prompt(**body, tools=[{"type": "function", "function": {"name": "bash"}}]),
        chat_prompt(messages=[{"role": "system", "content": "s"}, *body["messages"]]),
        chat_prompt(messages=[{"role": "user", "content": [image]}]),
        chat_prompt(messages=[{"role": "user", "content": [other]}]),
    }
    assert len(prompts) == 5


@given(st.binary(max_size=600), st.binary(max_size=200), st.binary(max_size=200))
def test_equal_prefixes_and_only_they_have_equal_leading_hashes(
    prefix: bytes, one: bytes, other: bytes
) -> None:
    size = 4 * BYTES_PER_TOKEN
    left, right = block_hashes(prefix + one, 4), block_hashes(prefix + other, 4)
    assert len(left) == len(prefix + one) // size
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        end = (index + 1) * size
        assert (a == b) == ((prefix + one)[:end] == (prefix + other)[:end])


@given(st.text(max_size=50), st.text(max_size=50))
def test_every_message_is_whole_tokens(text: str, reasoning: str) -> None:
    body = render_body(Message("assistant", text, reasoning, (CALL,)))
    assert len(body) % BYTES_PER_TOKEN == 0


@pytest.mark.parametrize(
    "prompt", ["hello", ["hello"], [104, 101], [[104, 101]]], ids=["text", "[text]", "ids", "[ids]"]
)
def test_completions_take_one_prompt(prompt: Any) -> None:
    conversation = CompletionExchange({"prompt": prompt}, "m", "id").conversation
    assert len(render_prompt(conversation)) == 2 * BYTES_PER_TOKEN


@pytest.mark.parametrize("prompt", [None, ["a", "b"], [], [-1], {"a": 1}])
def test_other_completion_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        CompletionExchange({"prompt": prompt}, "m", "id")
