"""The pod beside real vLLM: its wire models."""

import json
from typing import Any

import httpx
import msgspec
import pytest
import zmq
import zmq.asyncio

from gateway.embedded import EmbeddedFleet
from gateway.embedded.kv_events import KvEvents

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


async def test_kv_events_are_read_by_vllms_model() -> None:
    from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

    events = KvEvents(block_size_tokens=16)
    with zmq.asyncio.Context.instance().socket(zmq.REQ) as asking:
        asking.connect(events.replay_endpoint)
        events.stored("s", [5, 6, 7], 1, 3)
        events.removed(9)
        events.publish()
        await asking.send((0).to_bytes(8, "big"))
        _topic, number, payload = await asking.recv_multipart()
    await events.aclose()
    assert int.from_bytes(number, "big") == 0
    batch = msgspec.msgpack.decode(payload, type=KVEventBatch)
    assert batch.data_parallel_rank == 0
    assert batch.events == [
        BlockStored(
            block_hashes=[6, 7],
            parent_block_hash=5,
            token_ids=[],
            block_size=16,
            lora_id=None,
            medium="GPU",
            lora_name=None,
            group_idx=0,
            kv_cache_spec_kind="full_attention",
            session_id="s",
        ),
        BlockRemoved(block_hashes=[9], medium="GPU", group_idx=0),
    ]
