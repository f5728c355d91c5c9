"""The pod beside real vLLM: its wire models and its free-block queue."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.embedded import EmbeddedFleet
from gateway.embedded.block_pool import KVCacheBlock, LruFreeQueue

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch, when vLLM imports it
]

SCRIPT = {"reasoning": "hm", "text": "ok", "tool_calls": [{"name": "bash", "arguments": {"a": 1}}]}
HEADERS = {"x-embedded-script": json.dumps({"turns": [SCRIPT]})}
USER = [{"role": "user", "content": "hi"}]
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def events(text: str) -> list[str]:
    return [line[6:] for line in text.split("\n") if line.startswith("data: {")]


async def post(fleet: EmbeddedFleet, path: str, body: dict[str, Any]) -> str:
    async with httpx.AsyncClient(base_url=fleet.urls[0]) as client:
        answer = await client.post(path, json=body, headers=HEADERS)
    assert answer.status_code == 200
    return answer.text


async def test_chat_answers_are_what_vllms_models_write(fleet: EmbeddedFleet) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionResponse,
        ChatCompletionStreamResponse,
    )

    body = {"messages": USER}
    whole = await post(fleet, "/v1/chat/completions", body)
    assert whole == ChatCompletionResponse.model_validate_json(whole).model_dump_json()
    for data in events(await post(fleet, "/v1/chat/completions", body | USAGE | {"stream": True})):
        chunk = ChatCompletionStreamResponse.model_validate_json(data)
        assert data == chunk.model_dump_json(exclude_unset=True)


async def test_completions_are_what_vllms_models_write(fleet: EmbeddedFleet) -> None:
    from vllm.entrypoints.openai.completion.protocol import (
        CompletionResponse,
        CompletionStreamResponse,
    )

    whole = await post(fleet, "/v1/completions", {"prompt": "hi"})
    assert whole == CompletionResponse.model_validate_json(whole).model_dump_json()
    stream = {"prompt": "hi", "stream": True}
    for data in events(await post(fleet, "/v1/completions", stream)):
        chunk = CompletionStreamResponse.model_validate_json(data)
        assert data == chunk.model_dump_json(exclude_unset=True)


async def test_messages_are_what_vllms_models_write(fleet: EmbeddedFleet) -> None:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicStreamEvent

    body: dict[str, Any] = {"messages": USER, "max_tokens": 99}
    whole = json.loads(await post(fleet, "/v1/messages", body))
    assert whole == AnthropicMessagesResponse.model_validate(whole).model_dump(exclude_none=True)
    for data in events(await post(fleet, "/v1/messages", body | {"stream": True})):
        event = AnthropicStreamEvent.model_validate_json(data)
        assert data == event.model_dump_json(exclude_unset=True)


async def test_responses_are_read_by_vllms_model(fleet: EmbeddedFleet) -> None:
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse

    whole = json.loads(await post(fleet, "/v1/responses", {"input": "hi"}))
    written = ResponsesResponse.model_validate(whole).model_dump(mode="json", by_alias=True)
    assert list(written) == list(whole)
    written.pop("output")  # its items are the openai package's, whose fields differ by version
    whole.pop("output")
    assert written == whole


Operations = list[tuple[str, int, int]]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 12),
    st.lists(
        st.tuples(
            st.sampled_from(["popleft_n", "remove", "append", "append_n", "prepend_n"]),
            st.integers(0, 11),
            st.integers(0, 12),
        ),
        max_size=40,
    ),
)
def test_the_queue_gives_the_blocks_of_vllms_queue(size: int, operations: Operations) -> None:
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
    from vllm.v1.core.kv_cache_utils import KVCacheBlock as VllmBlock

    def replay(make_block: Callable[[int], Any], make_queue: Callable[[Any], Any]) -> list[Any]:
        blocks = [make_block(block_id) for block_id in range(size)]
        queue = make_queue(blocks)
        out: list[int] = []
        seen: list[Any] = []
        for operation, which, count in operations:
            free = [block.block_id for block in queue.get_all_free_blocks()]
            seen.append((free, queue.num_free_blocks))
            if operation == "popleft_n":
                out += [b.block_id for b in queue.popleft_n(min(count, len(free)))]
            elif operation == "remove" and which in free:
                queue.remove(blocks[which])
                out.append(which)
            elif operation == "append" and out:
                queue.append(blocks[out.pop(which % len(out))])
            elif operation in ("append_n", "prepend_n"):
                back, out = out[:count], out[count:]
                getattr(queue, operation)([blocks[i] for i in back])
        return seen

    assert replay(KVCacheBlock, LruFreeQueue) == replay(VllmBlock, FreeKVCacheBlockQueue)
