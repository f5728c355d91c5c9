"""The engine behind every contender: prebuilt bytes over a raw asyncio protocol.

It answers what routers probe, and chat completions: JSON at once, or a stream of `CHUNKS` chunks in
the shape vLLM 0.32 gives them, each written alone and `CHUNK_GAP_S` after the last, so that readers
meet them one by one as they would behind a real engine.
"""

import asyncio
import sys
from typing import cast

import httptools
import orjson
import uvloop

from bench.bodies import MODEL

CHUNKS = 100
CHUNK_GAP_S = 0.001

_ID = '"id":"chatcmpl-8f3a1c5e9b7d2046"'
_CREATED = f'"created":1790000000,"model":"{MODEL}"'
_USAGE = '"usage":{"prompt_tokens":256,"total_tokens":356,"completion_tokens":100}'


def _event(choices: str, rest: str = "") -> bytes:
    head = f'{_ID},"object":"chat.completion.chunk",{_CREATED}'
    return f'data: {{{head},"choices":[{choices}]{rest}}}\n\n'.encode()


def _delta(delta: str, finish: str = '"finish_reason":null', rest: str = "") -> str:
    return f'{{"index":0,"delta":{delta},"logprobs":null,{finish}{rest}}}'


def stream_events() -> list[bytes]:
    """`CHUNKS` chunks (role, content, finish, usage), then `[DONE]`.

    Fields and their order are those of `chat_completion_stream_generator` in vLLM 0.32.
    """
    role = _delta('{"role":"assistant","content":""}')
    ids = ',"token_ids":null'
    content = [_event(_delta(f'{{"content":" word{i}"}}', rest=ids)) for i in range(CHUNKS - 3)]
    finish = _delta('{"content":""}', '"finish_reason":"stop","stop_reason":null', ids)
    return [
        _event(role, ',"prompt_token_ids":null,"prompt_text":null'),
        *content,
        _event(finish),
        _event("", f",{_USAGE}"),
        b"data: [DONE]\n\n",
    ]


COMPLETION = (
    f'{{{_ID},"object":"chat.completion",{_CREATED},"choices":[{{"index":0,"message":'
    '{"role":"assistant","content":"' + "done " * 80 + '","refusal":null,"annotations":null,'
    '"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"stop",'
    '"stop_reason":null,"token_ids":null}],"service_tier":null,"system_fingerprint":null,'
    f'{_USAGE},"prompt_logprobs":null,"prompt_token_ids":null,"kv_transfer_params":null}}'
).encode()

STREAM = b"".join(stream_events())

_METRICS = f"""\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 0.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="{MODEL}"}} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="{MODEL}"}} 0.1
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{{engine="0",model_name="{MODEL}"}} 1000.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{{engine="0",model_name="{MODEL}"}} 900.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="43750"}} 1.0
""".encode()


def _response(body: bytes, content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


_MODEL_CARD = {"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 262_144}
_INFO = {"model_path": MODEL, "served_model_name": MODEL, "is_generation": True, "tp_size": 1}
_PAGES = {
    b"/health": _response(b""),
    b"/v1/models": _response(orjson.dumps({"object": "list", "data": [_MODEL_CARD]})),
    b"/metrics": _response(_METRICS, "text/plain; version=0.0.4; charset=utf-8"),
    b"/version": _response(b'{"version":"0.32.0"}'),
} | {
    path: _response(orjson.dumps(_INFO))
    for path in (b"/get_server_info", b"/server_info", b"/get_model_info", b"/model_info")
}
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
_JSON = _response(COMPLETION)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_STREAM_CHUNKS = [b"%x\r\n%s\r\n" % (len(event), event) for event in stream_events()]
_STREAM_END = b"0\r\n\r\n"


class Engine(asyncio.Protocol):
    """One connection. Clients do not pipeline: a response ends before the next request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = b""
        self._body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"expect":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        path = self._url.partition(b"?")[0]
        if path != b"/v1/chat/completions":
            self._transport.write(_PAGES.get(path, _NOT_FOUND))
        elif b'"stream":true' in b"".join(self._body):
            self._transport.write(_STREAM_HEAD)
            self._send_chunk(0)
        else:
            self._transport.write(_JSON)

    def _send_chunk(self, index: int) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(_STREAM_CHUNKS[index])
        if index + 1 < len(_STREAM_CHUNKS):
            self._loop.call_later(CHUNK_GAP_S, self._send_chunk, index + 1)
        else:
            self._transport.write(_STREAM_END)


async def _main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1])))
