"""Reading requests and watching answers, in every dialect."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gateway.dialects import (
    DIALECTS,
    Dialect,
    MalformedRequestError,
    parse,
    read_model,
    splice_model,
)
from gateway.dialects import sse as sse_module
from gateway.dialects.chat import ChatStream
from gateway.dialects.messages import MessagesStream
from gateway.dialects.responses import ResponsesStream
from gateway.dialects.sse import MAX_EVENT_BYTES, SseObserver
from gateway.dialects.turn import (
    MAX_ARGUMENT_CHARS,
    MAX_CALLS,
    Observer,
    ToolCall,
    ToolResult,
    TurnOutcome,
    Usage,
)
from gateway.embedded import EmbeddedFleet

VLLM = Path(__file__).parent / "data" / "vllm-0.32"
BY_WIRE = {dialect.wire: dialect for dialect in DIALECTS}
STREAMS = (ChatStream, MessagesStream, ResponsesStream)


def dialect_of(sample: Path) -> Dialect:
    return BY_WIRE[sample.name.split("-")[0].split(".")[0]]  # type: ignore[index]


def watch(observer: Observer, *chunks: bytes) -> TurnOutcome:
    for chunk in chunks:
        observer.feed(chunk)
    observer.finish()
    return observer.outcome


def sse(*events: dict[str, Any]) -> bytes:
    """Events framed as the pods frame them: named in the dialects whose data has a type."""
    return b"".join(
        (b"event: %b\n" % event["type"].encode() if "type" in event else b"")
        + b"data: "
        + orjson.dumps(event)
        + b"\n\n"
        for event in events
    )


def every_event_parsed(kind: type[SseObserver]) -> SseObserver:
    return type(kind.__name__, (kind,), {"skippable": lambda self, event: False})()


# -- vLLM's recorded answers ----------------------------------------------------------------------

LS = "bash", {"command": "ls"}
TEXT_USAGE = Usage(101, 7, 96)
TOOL_USAGE = Usage(240, 34, 224)
PROMPT_USAGE = Usage(84, 8, 64)
RECORDED: dict[str, tuple[str, list[tuple[str, dict[str, str]]], Usage | None]] = {
    "chat.sse": ("stop", [], None),
    "chat-usage.sse": ("stop", [], TEXT_USAGE),
    "chat.json": ("stop", [], TEXT_USAGE),
    "chat-tool.sse": ("tool_calls", [LS], None),
    "chat-tool-usage.sse": ("tool_calls", [LS], TOOL_USAGE),
    "chat-tool.json": ("tool_calls", [LS], TOOL_USAGE),
    "chat-tool-named.sse": ("stop", [LS], None),
    "chat-tool-named-usage.sse": ("stop", [LS], TOOL_USAGE),
    "chat-tool-named.json": ("stop", [LS], TOOL_USAGE),
    "chat-tool-parallel.sse": ("tool_calls", [LS, LS], None),
    "completions.sse": ("length", [], None),
    "completions-usage.sse": ("length", [], PROMPT_USAGE),
    "completions.json": ("length", [], PROMPT_USAGE),
    "messages.sse": ("end_turn", [], TEXT_USAGE),
    "messages.json": ("end_turn", [], TEXT_USAGE),
    "messages-tool.sse": ("tool_use", [LS], TOOL_USAGE),
    "messages-tool.json": ("tool_use", [LS], TOOL_USAGE),
    "messages-tool-parallel.sse": ("tool_use", [LS, LS], Usage(240, 68, 224)),
    "responses.sse": ("completed", [], TEXT_USAGE),
    "responses.json": ("completed", [], TEXT_USAGE),
    "responses-tool.sse": ("completed", [LS], TOOL_USAGE),
    "responses-tool.json": ("completed", [LS], TOOL_USAGE),
    "responses-tool-parallel.sse": ("completed", [LS, LS], Usage(240, 70, 224)),
}
"""Stop reason, calls and usage of each sample. vLLM's messages API leaves the cached tokens out of
``input_tokens`` at the end, and counts them in at the start; the same prompt over the other
dialects shows which total is right."""


def test_every_recorded_answer_has_an_expectation() -> None:
    answers = {
        path.name
        for path in VLLM.iterdir()
        if "error" not in path.name
        and "sigterm" not in path.name  # streams that stall without an end
        and path.name not in {"models.json", "version.json", "tokenize.json", "count_tokens.json"}
    }
    assert answers == set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_the_outcome_of_a_recorded_answer_is_read(name: str) -> None:
    path = VLLM / name
    dialect = dialect_of(path)
    observer = dialect.stream() if path.suffix == ".sse" else dialect.whole()
    outcome = watch(observer, path.read_bytes())
    stop_reason, calls, usage = RECORDED[name]
    assert outcome.stop_reason == stop_reason
    assert [(call.name, orjson.loads(call.arguments)) for call in outcome.tool_calls] == calls
    assert all(call.id.startswith("chatcmpl-tool-") for call in outcome.tool_calls)
    assert outcome.usage == usage
    assert outcome.response_id is not None
    assert outcome.response_id.encode() in path.read_bytes()
    assert not outcome.error


@pytest.mark.parametrize("path", sorted(VLLM.glob("*-error-*.json")), ids=lambda path: path.name)
def test_a_recorded_error_is_seen_as_one(path: Path) -> None:
    outcome = watch(dialect_of(path).whole(), path.read_bytes())
    assert outcome.error
    assert outcome.usage is None
    assert outcome.tool_calls == []


@pytest.mark.parametrize("path", sorted(VLLM.glob("*-sigterm.sse")), ids=lambda path: path.name)
def test_a_recorded_stream_that_stalls_has_an_id_but_no_end(path: Path) -> None:
    outcome = watch(dialect_of(path).stream(), path.read_bytes())
    assert outcome.response_id is not None
    assert outcome.stop_reason is None
    assert outcome.tool_calls == []


# -- streams are read alike however they are cut --------------------------------------------------


def chat_chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "choices": [{"index": index, "delta": delta, "finish_reason": finish}],
    }


def call_piece(index: int, arguments: str, **first: str) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": first["name"]} if "name" in first else {})
    head = {"id": first["id"], "type": "function"} if "id" in first else {}
    return {"tool_calls": [{"index": index, **head, "function": function}]}


PARALLEL_CHAT = sse(
    chat_chunk({"role": "assistant", "content": ""}),
    chat_chunk(call_piece(0, "", id="call_a", name="read")),
    chat_chunk(call_piece(1, '{"pa', id="call_b", name="bash")),
    chat_chunk(call_piece(0, '{"path": "sn')),
    chat_chunk(call_piece(1, 'th": 1}')),
    chat_chunk(call_piece(0, 'ö\\"w"}')),
    chat_chunk({}, "tool_calls"),
    {"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}},
)
TWO_CHOICES_CHAT = sse(
    chat_chunk({"role": "assistant", "content": "a"}),
    {
        "id": "chatcmpl-1",
        "choices": [
            {"index": 0, "delta": {"content": "b"}, "finish_reason": None},
            {"index": 1, "delta": {}, "finish_reason": "stop"},
        ],
    },
)
PARALLEL_MESSAGES = sse(
    {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "usage": {
                "input_tokens": 3,
                "cache_read_input_tokens": 100,
                "cache_creation_input_tokens": 20,
                "output_tokens": 1,
            },
        },
    },
    {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "thinking", "thinking": ""},
    },
    {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "thinking_delta", "thinking": "event: message_delta\n\n"},
    },
    {"type": "content_block_stop", "index": 0},
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "id": "toolu_a", "name": "Bash", "input": {}},
    },
    {"type": "ping"},
    {
        "type": "content_block_start",
        "index": 2,
        "content_block": {
            "type": "tool_use",
            "id": "toolu_b",
            "name": "Grep",
            "input": {"pattern": "content_block_delta"},
        },
    },
    {
        "type": "content_block_delta",
        "index": 1,
        "delta": {"type": "input_json_delta", "partial_json": '{"command":'},
    },
    {
        "type": "content_block_delta",
        "index": 1,
        "delta": {"type": "input_json_delta", "partial_json": '"make"}'},
    },
    {"type": "content_block_stop", "index": 1},
    {"type": "content_block_stop", "index": 2},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": "content_block_delta"},
        "usage": {"output_tokens": 40},
    },
    {"type": "message_stop"},
)
_CALLS = [
    {"type": "function_call", "call_id": "call_a", "name": "exec_command", "arguments": "{}"},
    {
        "type": "function_call",
        "call_id": "call_b",
        "namespace": "mcp__git",
        "name": "log",
        "arguments": '{"n": 1}',
    },
    {"type": "custom_tool_call", "call_id": "call_c", "name": "apply_patch", "input": "*** x"},
]
PARALLEL_RESPONSES = sse(
    {"type": "response.created", "response": {"id": "resp_1"}},
    {"type": "response.output_item.added", "item": _CALLS[0] | {"arguments": ""}},
    {"type": "response.function_call_arguments.delta", "delta": "{}"},
    *({"type": "response.output_item.done", "item": item} for item in _CALLS),
    {"type": "response.output_text.delta", "delta": '"response.output_item.done"'},
    {
        "type": "response.completed",
        "response": {
            "id": "resp_1",
            "status": "completed",
            "output": [{"type": "message", "content": "see style.delta and .delta"}],
            "usage": {
                "input_tokens": 50,
                "input_tokens_details": {"cached_tokens": 32},
                "output_tokens": 7,
            },
        },
    },
)
MADE: dict[str, tuple[type[SseObserver], bytes, TurnOutcome]] = {
    "chat, parallel fragments": (
        ChatStream,
        PARALLEL_CHAT,
        TurnOutcome(
            "chatcmpl-1",
            [
                ToolCall.of("call_a", "read", '{"path": "snö\\"w"}'),
                ToolCall.of("call_b", "bash", '{"path": 1}'),
            ],
            "tool_calls",
            Usage(9, 4, None),
        ),
    ),
    "chat, two choices": (ChatStream, TWO_CHOICES_CHAT, TurnOutcome("chatcmpl-1", [], "stop")),
    "chat, error": (
        ChatStream,
        sse(chat_chunk({"content": "a"}), {"error": {"message": "engine died"}}),
        TurnOutcome("chatcmpl-1", error=True),
    ),
    "messages, parallel": (
        MessagesStream,
        PARALLEL_MESSAGES,
        TurnOutcome(
            "msg_1",
            [
                ToolCall.of("toolu_a", "Bash", '{"command":"make"}'),
                ToolCall.of("toolu_b", "Grep", '{"pattern":"content_block_delta"}'),
            ],
            "tool_use",
            Usage(123, 40, 100),
        ),
    ),
    "chat, aborted": (
        ChatStream,
        sse(chat_chunk({"content": "a"}), chat_chunk({}, "abort")),
        TurnOutcome("chatcmpl-1", stop_reason="abort", error=True),
    ),
    "messages, aborted": (
        MessagesStream,
        sse(
            {"type": "message_start", "message": {"id": "msg_1"}},
            {"type": "message_delta", "delta": {"stop_reason": None}},
            {"type": "message_stop"},
        ),
        TurnOutcome("msg_1", error=True),
    ),
    "messages, error": (
        MessagesStream,
        sse({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}),
        TurnOutcome(error=True),
    ),
    "responses, parallel": (
        ResponsesStream,
        PARALLEL_RESPONSES,
        TurnOutcome(
            "resp_1",
            [
                ToolCall.of("call_a", "exec_command", "{}"),
                ToolCall.of("call_b", "mcp__git.log", '{"n": 1}'),
                ToolCall.of("call_c", "apply_patch", "*** x"),
            ],
            "completed",
            Usage(50, 7, 32),
        ),
    ),
    "responses, data on several lines": (
        ResponsesStream,
        b'event: response.failed\ndata: {"type":"response.failed",\n'
        b'data: "response":{"id":"r",\ndata: "status":"failed"}}\n\n',
        TurnOutcome("r", stop_reason="failed", error=True),
    ),
    "responses, failed": (
        ResponsesStream,
        sse({"type": "response.failed", "response": {"id": "r", "status": "failed"}}),
        TurnOutcome("r", stop_reason="failed", error=True),
    ),
}
ALL_STREAMS: list[tuple[type[Observer], bytes]] = [
    *((kind, stream) for kind, stream, _ in MADE.values()),
    *((dialect_of(path).stream, path.read_bytes()) for path in sorted(VLLM.glob("*.sse"))),  # type: ignore[misc]
]


@pytest.mark.parametrize("name", MADE)
def test_the_outcome_of_a_made_stream_is_read(name: str) -> None:
    kind, stream, expected = MADE[name]
    assert watch(kind(), stream) == expected


@given(
    which=st.sampled_from(ALL_STREAMS),
    crlf=st.booleans(),
    noise=st.lists(
        st.tuples(
            st.integers(0, 40),
            st.sampled_from(
                [
                    b": keepalive\n\n",
                    b": keepalive\n",
                    b"\n",
                    b'event: unknown\ndata: {"type":"unknown"}\n\n',
                    b"data: not json\n\n",
                    b"data: [1]\n\n",
                    b"id: 7\nretry: 100\n\n",
                ]
            ),
        ),
        max_size=5,
    ),
    ending=st.booleans(),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_any_cutting_framing_and_noise_gives_the_same_outcome(
    which: tuple[type[Observer], bytes],
    crlf: bool,
    noise: list[tuple[int, bytes]],
    ending: bool,
    data: st.DataObject,
) -> None:
    kind, stream = which
    expected = watch(kind(), stream)
    events = stream.split(b"\n\n")
    for at, thing in noise:
        # A comment line may also stand inside an event, before its first line.
        events.insert(at % len(events), thing.removesuffix(b"\n\n"))
    wire = b"\n\n".join(events)
    if crlf:
        wire = wire.replace(b"\n", b"\r\n")
    if not ending:
        wire = wire.rstrip(b"\r\n")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=30), label="cuts"))
    chunks = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert watch(kind(), *chunks) == expected


@pytest.mark.parametrize("crlf", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_same_outcome_byte_by_byte(size: int, crlf: bool) -> None:
    for kind, stream in ALL_STREAMS:
        wire = stream.replace(b"\n", b"\r\n") if crlf else stream
        chunks = [wire[i : i + size] for i in range(0, len(wire), size)]
        assert watch(kind(), *chunks) == watch(kind(), stream)


@pytest.mark.parametrize(("kind", "stream"), ALL_STREAMS)
def test_skipping_never_changes_the_outcome(kind: type[SseObserver], stream: bytes) -> None:
    assert watch(kind(), stream) == watch(every_event_parsed(kind), stream)


words = st.sampled_from(
    [
        "",
        "x",
        ".delta",
        '"finish_reason":null',
        '"tool_calls"',
        '"usage":{',
        "content_block_delta",
        "input_json_delta",
        "response.output_item.done",
        "response.completed",
        "event: response.x.delta\n",
        "data: [DONE]\n\n",
    ]
)
index = st.integers(0, 2)
usage = st.none() | st.fixed_dictionaries(
    {"prompt_tokens": st.integers(0, 99), "completion_tokens": st.integers(0, 99)}
)
chat_events = st.fixed_dictionaries(
    {
        "id": st.just("c"),
        "choices": st.lists(
            st.fixed_dictionaries(
                {
                    "index": index,
                    "delta": st.fixed_dictionaries(
                        {},
                        optional={
                            "content": words,
                            "tool_calls": st.lists(
                                st.fixed_dictionaries(
                                    {"index": index},
                                    optional={
                                        "id": words,
                                        "function": st.fixed_dictionaries(
                                            {"arguments": words}, optional={"name": words}
                                        ),
                                    },
                                ),
                                max_size=2,
                            ),
                        },
                    ),
                    "finish_reason": st.none() | words,
                }
            ),
            max_size=2,
        ),
    },
    optional={"usage": usage, "error": st.none() | st.fixed_dictionaries({"message": words})},
)
messages_events = st.one_of(
    st.fixed_dictionaries(
        {
            "type": st.just("content_block_start"),
            "index": index,
            "content_block": st.fixed_dictionaries(
                {
                    "type": st.sampled_from(["text", "tool_use"]),
                    "id": words,
                    "name": words,
                    "input": st.dictionaries(words, words, max_size=2),
                }
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("content_block_delta"),
            "index": index,
            "delta": st.one_of(
                st.fixed_dictionaries({"type": st.just("input_json_delta"), "partial_json": words}),
                st.fixed_dictionaries({"type": st.just("text_delta"), "text": words}),
            ),
        }
    ),
    st.fixed_dictionaries({"type": st.just("content_block_stop"), "index": index}),
    st.fixed_dictionaries(
        {
            "type": st.just("message_delta"),
            "delta": st.fixed_dictionaries({"stop_reason": words, "stop_sequence": words}),
            "usage": st.dictionaries(
                st.sampled_from(["input_tokens", "output_tokens", "cache_read_input_tokens"]),
                st.integers(0, 99),
            ),
        }
    ),
)
responses_events = st.one_of(
    st.fixed_dictionaries({"type": st.just("response.output_text.delta"), "delta": words}),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["response.output_item.added", "response.output_item.done"]),
            "item": st.fixed_dictionaries(
                {
                    "type": st.sampled_from(["message", "function_call"]),
                    "call_id": words,
                    "name": words,
                    "arguments": words,
                }
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(
                ["response.created", "response.completed", "response.incomplete"]
            ),
            "response": st.fixed_dictionaries({"id": words, "status": words, "output": words}),
        }
    ),
)


@given(
    st.one_of(
        st.tuples(st.just(ChatStream), st.lists(chat_events, max_size=8)),
        st.tuples(st.just(MessagesStream), st.lists(messages_events, max_size=8)),
        st.tuples(st.just(ResponsesStream), st.lists(responses_events, max_size=8)),
    )
)
@settings(max_examples=100, deadline=None)
def test_no_text_in_an_event_makes_it_skipped_wrongly(
    case: tuple[type[SseObserver], list[dict[str, Any]]],
) -> None:
    kind, events = case
    stream = sse(*events)
    assert watch(kind(), stream) == watch(every_event_parsed(kind), stream)


def test_text_events_of_each_dialect_are_skipped() -> None:
    chat = ChatStream()
    watch(chat, sse(chat_chunk({"content": "a"})))
    assert chat.skippable(sse(chat_chunk({"content": "a"})))
    assert MessagesStream().skippable(
        sse({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}})
    )
    assert ResponsesStream().skippable(sse({"type": "response.output_text.delta", "delta": "a"}))


# -- hostile pods ---------------------------------------------------------------------------------

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
FIELDS = """
type id choices delta tool_calls index function name arguments finish_reason usage error message
content_block input partial_json stop_reason response item status output content input_tokens
cache_read_input_tokens prompt_tokens prompt_tokens_details cached_tokens
"""
TYPES = """
message_start content_block_start content_block_delta content_block_stop message_delta tool_use
function_call response.created response.completed response.output_item.done
"""
odd_objects = st.recursive(
    json_values | st.sampled_from(TYPES.split()),
    lambda inner: (
        st.dictionaries(st.sampled_from(FIELDS.split()), inner) | st.lists(inner, max_size=2)
    ),
    max_leaves=20,
)


@given(st.lists(odd_objects, max_size=4), st.sampled_from(DIALECTS))
@settings(max_examples=100, deadline=None)
def test_an_answer_of_any_shape_never_raises(values: list[Any], dialect: Dialect) -> None:
    for value in values:
        body = json.dumps(value).encode()
        watch(dialect.whole(), body)
    outcome = watch(
        dialect.stream(), *(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)
    )
    assert outcome.stop_reason is None or isinstance(outcome.stop_reason, str)
    assert all(isinstance(call.id + call.name, str) for call in outcome.tool_calls)


@given(st.lists(st.binary(max_size=60) | st.sampled_from([b"\n", b"\r", b"\n\n", b"data:"])))
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes_never_raise(chunks: list[bytes]) -> None:
    for dialect in DIALECTS:
        watch(dialect.stream(), *chunks)
        watch(dialect.whole(), *chunks)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("chunk", [b"data: " + b"x" * 65_530, b"data: y\n" * 8_192, b"\r" * 65_535])
def test_an_endless_event_costs_bounded_memory(kind: type[SseObserver], chunk: bytes) -> None:
    observer = kind()
    chunks = 4 * MAX_EVENT_BYTES // len(chunk)
    tracemalloc.start()
    try:
        for _ in range(chunks):
            observer.feed(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MAX_EVENT_BYTES
    assert observer._size <= MAX_EVENT_BYTES + 2


@given(
    lengths=st.lists(st.sampled_from([1, 20, 54, 55, 56, 57, 58, 59, 60, 80, 200]), max_size=6),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_only_an_overlong_event_is_given_up_however_it_is_cut(
    lengths: list[int], data: st.DataObject
) -> None:
    class Lengths(SseObserver):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def skippable(self, event: bytes) -> bool:
            return False

        def event(self, value: dict[str, Any]) -> None:
            self.seen.append(len(value["x"]))

    wire = b"".join(b'data: {"x":"%b"}\n\n' % (b"a" * length) for length in lengths)
    overhead = len(b'data: {"x":""}')
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sse_module, "MAX_EVENT_BYTES", 71)
        observer = Lengths()
        for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True):
            observer.feed(wire[a:b])
        observer.finish()
    # A chunk that is one event carries its blank line with it.
    near = range(71 - overhead - 1, 71 - overhead + 1)
    assume(not any(length in near for length in lengths))
    assert observer.seen == [length for length in lengths if length + overhead <= 71]


def test_an_overlong_event_does_not_hide_the_next() -> None:
    observer = MessagesStream()
    observer.feed(b"data: " + b"x" * (MAX_EVENT_BYTES + 10) + b"\n")
    observer.feed(b"\n")
    outcome = watch(observer, PARALLEL_MESSAGES)
    assert outcome == MADE["messages, parallel"][2]


def test_arguments_are_kept_up_to_a_bound_and_counted_beyond() -> None:
    piece = "x" * 1000
    pieces = 100
    chat = ChatStream()
    messages = MessagesStream()
    chat.feed(sse(chat_chunk(call_piece(0, "", id="a", name="write"))))
    block = {"type": "tool_use", "id": "a", "name": "write", "input": {}}
    messages.feed(sse({"type": "content_block_start", "index": 0, "content_block": block}))
    for _ in range(pieces):
        chat.feed(sse(chat_chunk(call_piece(0, piece))))
        delta = {"type": "input_json_delta", "partial_json": piece}
        messages.feed(sse({"type": "content_block_delta", "index": 0, "delta": delta}))
    for observer in (chat, messages):
        (call,) = watch(observer).tool_calls
        assert call.arguments == "x" * MAX_ARGUMENT_CHARS
        assert call.arguments_chars == pieces * 1000


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_number_of_calls_kept_is_bounded(dialect: Dialect) -> None:
    number = MAX_CALLS + 50
    item = {"type": "function_call", "call_id": "c", "name": "n", "arguments": ""}
    block = {"type": "tool_use", "id": "c", "name": "n", "input": {}}
    events: dict[str, list[dict[str, Any]]] = {
        "chat": [chat_chunk(call_piece(i, "", id=f"c{i}", name="n")) for i in range(number)],
        "responses": [{"type": "response.output_item.done", "item": item}] * number,
        "messages": [
            {"type": "content_block_start", "index": i, "content_block": block}
            for i in range(number)
        ],
    }
    events["completions"] = events["chat"]
    assert len(watch(dialect.stream(), sse(*events[dialect.wire])).tool_calls) == MAX_CALLS


def test_a_whole_answer_beyond_the_bound_is_not_kept() -> None:
    observer = BY_WIRE["chat"].whole()
    for _ in range(40):
        observer.feed(b" " * (1 << 20))
    assert watch(observer, (VLLM / "chat.json").read_bytes()) == TurnOutcome()


# -- the embedded pod's streams -------------------------------------------------------------------


@pytest.fixture
async def pod() -> AsyncIterator[httpx.AsyncClient]:
    async with (
        EmbeddedFleet(pods=1, speedup=1000) as fleet,
        httpx.AsyncClient(base_url=fleet.urls[0], trust_env=False) as client,
    ):
        yield client


PROMPT = "Read the failing test, then run it again. " * 40
FUNCTION = {"name": "bash", "parameters": {"type": "object", "properties": {}}}
EMBEDDED: dict[str, dict[str, Any]] = {
    "chat": {
        "messages": [{"role": "user", "content": PROMPT}],
        "tools": [{"type": "function", "function": FUNCTION}],
        "stream_options": {"include_usage": True},
    },
    "completions": {"prompt": PROMPT, "stream_options": {"include_usage": True}},
    "responses": {"input": PROMPT, "tools": [{"type": "function", **FUNCTION}]},
    "messages": {
        "messages": [{"role": "user", "content": PROMPT}],
        "tools": [{"name": "bash", "input_schema": {"type": "object"}}],
        "max_tokens": 500,
    },
}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.wire)
async def test_the_embedded_pod_is_read_alike_streamed_and_whole(
    pod: httpx.AsyncClient, dialect: Dialect
) -> None:
    calls = [
        {"name": "bash", "arguments": {"command": "ls", "nested": {"a": [1, "ü"]}}},
        {"name": "bash", "arguments": {}},
    ]
    script = {"turns": [{"text": "I look.", "tool_calls": calls}]}
    headers = {"x-embedded-script": json.dumps(script)}
    body = EMBEDDED[dialect.wire] | {"model": "embedded"}
    outcomes = []
    for stream in (True, False):
        response = await pod.post(dialect.path, json=body | {"stream": stream}, headers=headers)
        assert response.status_code == 200, response.text
        observer = dialect.stream() if stream else dialect.whole()
        outcomes.append(watch(observer, response.content))
    for outcome in outcomes:
        assert outcome.response_id
        assert not outcome.error
        if dialect.wire != "completions":
            assert [json.loads(call.arguments) for call in outcome.tool_calls] == [
                call["arguments"] for call in calls
            ]
            assert len({call.id for call in outcome.tool_calls}) == 2
    streamed, whole = outcomes
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage is not None
    assert whole.usage is not None
    assert streamed.usage.cached_tokens == 0
    assert whole.usage.cached_tokens is not None
    assert 0 < whole.usage.cached_tokens <= whole.usage.prompt_tokens
    assert streamed.usage.prompt_tokens == whole.usage.prompt_tokens
    assert streamed.usage.output_tokens == whole.usage.output_tokens


# -- requests -------------------------------------------------------------------------------------


def test_a_chat_request_is_read() -> None:
    request = parse(
        BY_WIRE["chat"],
        orjson.dumps(
            {
                "model": "m",
                "stream": True,
                "unknown": [1],
                "tools": [{"type": "function", "function": {"name": "bash"}}],
                "prompt_cache_key": "key",
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}, {"id": 1}]},
                    {"role": "tool", "tool_call_id": "a", "content": "out"},
                    {"role": "nobody", "content": "?"},
                    "not an object",
                ],
            }
        ),
    )
    assert (request.wire, request.model, request.stream) == ("chat", "m", True)
    assert request.has_tools
    items = [request.item(i) for i in range(2, 8)]
    assert [i.role for i in items] == ["system", "user", "assistant", "tool", "other", "other"]
    assert items[1].text == "hi"
    assert items[2].call_ids == ("a",)
    assert items[3].results == (ToolResult("a", False, "out"),)
    assert bytes(request.ids.prompt_cache_key) == b'"key"'


def test_a_messages_request_is_read() -> None:
    reminder = "<system-reminder>now <task-notification>t</system-reminder>"
    request = parse(
        BY_WIRE["messages"],
        orjson.dumps(
            {
                "model": "m",
                "system": [
                    {"type": "text", "text": "x-anthropic-billing-header: cc_version=1;"},
                    {"type": "text", "text": "You are an agent."},
                ],
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "<system-reminder>a</system-reminder>"},
                            {"type": "text", "text": f"fix it{reminder}"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "t1"}]},
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t1",
                                "is_error": True,
                                "content": [{"type": "text", "text": "no"}],
                            }
                        ],
                    },
                    {"role": "system", "content": "mid-conversation"},
                ],
                "output_config": {
                    "format": {
                        "type": "json_schema",
                        "schema": {"properties": {"title": {"type": "string"}}},
                    }
                },
                "metadata": {"user_id": "u"},
            }
        ),
    )
    assert not request.stream
    assert not request.has_tools
    assert request.title_format
    assert request.item(1).text == "You are an agent."
    assert b"billing" not in request.item(1).canonical
    assert request.item(2).text == "fix it<task-notification>t</system-reminder>"
    assert request.item(3).call_ids == ("t1",)
    assert request.item(4).results == (ToolResult("t1", True, "no"),)
    assert request.item(4).text == ""
    assert request.item(5).role == "system"


def test_a_responses_request_is_read() -> None:
    request = parse(
        BY_WIRE["responses"],
        orjson.dumps(
            {
                "model": "m",
                "instructions": "Be brief.",
                "input": [
                    {"role": "user", "content": "hi"},
                    {"type": "reasoning", "id": "rs_1", "summary": []},
                    {"type": "function_call", "call_id": "c1", "name": "n", "arguments": "{}"},
                    {"type": "custom_tool_call", "call_id": "c2", "name": "n", "input": ""},
                    {"type": "function_call_output", "call_id": "c1", "output": "done"},
                    {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
                    {"type": "message", "role": "developer", "content": "rules"},
                ],
                "previous_response_id": "resp_0",
            }
        ),
    )
    roles = [request.item(i).role for i in range(2, 9)]
    assert roles == ["user", *["assistant"] * 3, "tool", "tool", "system"]
    assert request.item(1).text == "Be brief."
    assert request.item(4).call_ids == ("c1",)
    assert request.item(5).call_ids == ("c2",)
    assert request.item(6).results == (ToolResult("c1", False, "done"),)
    assert bytes(request.ids.previous_response_id) == b'"resp_0"'
    text = parse(BY_WIRE["responses"], b'{"model":"m","input":"hi"}')
    assert text.item(2) == request.item(2)


def test_a_completions_request_has_one_segment_for_its_prompt() -> None:
    request = parse(BY_WIRE["completions"], b'{"model":"m","prompt":"once","session_id":"s"}')
    assert len(request.segments) == 3
    assert request.item(2).role == "user"
    assert bytes(request.ids.session_id) == b'"s"'


@pytest.mark.parametrize("none", ["null", "[]", "[ ]", None])
@pytest.mark.parametrize("wire", ["chat", "messages", "responses"])
def test_no_tools_are_no_tools_however_they_are_written(wire: str, none: str | None) -> None:
    field = f',"tools":{none}' if none is not None else ""
    body = f'{{"model":"m","messages":[],"input":[]{field}}}'
    request = parse(BY_WIRE[wire], body.encode())  # type: ignore[index]
    assert not request.has_tools
    assert request.item(0).canonical == b""


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"model":null}',
        b'{"model":["a"]}',
        b'{"model":"a"} x',
        b'{"model":"a"',
        b'\xef\xbb\xbf{"model":"a"}',
        b'{"model":"\xff"}',
        b'{"model":"\\ud800"}',
        b'{"model":"a","messages":["\\ud83d, half a pair"],"input":[]}',
        b'{"model":"a","messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"model":"a","x":' + b'{"x":' * 200_000 + b"1" + b"}" * 200_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_cannot_be_read_is_refused(dialect: Dialect, body: bytes) -> None:
    with pytest.raises(MalformedRequestError, match="request body"):
        parse(dialect, body)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "rest",
    [
        b'"messages":"no list","input":5',
        b'"stream":"yes"',
        b'"input":"\xff","messages":[{"role":"user","content":"\xff"}]',
        b'"max_tokens":' + b"9" * 10_000 + b',"messages":[1e999999],"input":[1e999999]',
        b'"messages":[' + b"[" * 900 + b"]" * 900 + b'],"input":[]',
    ],
    ids=lambda rest: repr(rest[:24]),
)
def test_a_body_with_a_model_is_left_to_the_pod(dialect: Dialect, rest: bytes) -> None:
    request = parse(dialect, b'{"model":"a",' + rest + b"}")
    assert request.model == "a"
    for i in range(len(request.segments)):
        request.item(i)


@given(st.sampled_from(DIALECTS), st.binary(max_size=200) | json_values.map(json.dumps))
@settings(max_examples=120, deadline=None)
def test_parse_raises_nothing_but_malformed(dialect: Dialect, body: bytes | str) -> None:
    raw = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    try:
        request = parse(dialect, raw)
    except MalformedRequestError:
        return
    for i in range(len(request.segments)):
        request.item(i)


MESSAGE_FIELDS = """
role content type tool_calls tool_call_id call_id id name text output tool_use_id is_error
cache_control input status function
"""
BODY_FIELDS = """
messages input prompt tools functions system instructions metadata output_config stream
prompt_cache_key conversation client_metadata
"""
odd_messages = json_values | st.lists(
    st.dictionaries(
        st.sampled_from(MESSAGE_FIELDS.split()),
        json_values
        | st.sampled_from(["user", "assistant", "tool", "tool_result", "function_call"]),
    ),
    max_size=3,
)
request_objects = st.fixed_dictionaries(
    {"model": st.text(max_size=5)}, optional=dict.fromkeys(BODY_FIELDS.split(), odd_messages)
)


@given(st.sampled_from(DIALECTS), request_objects)
@settings(max_examples=100, deadline=None)
def test_every_segment_of_any_request_can_be_looked_at(
    dialect: Dialect, value: dict[str, Any]
) -> None:
    body = json.dumps(value).encode()
    try:
        request = parse(dialect, body)
    except MalformedRequestError:
        return
    for i in range(len(request.segments)):
        item = request.item(i)
        assert item is request.item(i)
        assert isinstance(item.canonical, bytes)
        assert isinstance(item.text, str)
        assert all(isinstance(call_id, str) for call_id in item.call_ids)


# -- the model's name is spliced ------------------------------------------------------------------

model_names = st.sampled_from(["m", "model", "claude-haiku", 'a"b', "ü/ß", "x\\y", "\n"]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=6
)


def object_pairs(body: bytes) -> Any:
    """The JSON value with objects as lists of pairs: order and duplicates show."""
    return json.loads(body, object_pairs_hook=lambda pairs: [list(pair) for pair in pairs])


@given(
    model=model_names,
    served=model_names,
    pairs=st.lists(
        st.tuples(st.sampled_from(["x", "m", "model ", "messages", "models"]), json_values),
        max_size=4,
    ),
    nested=st.booleans(),
    at=st.integers(0, 6),
    ascii_only=st.booleans(),
    separators=st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :\t")]),
)
@settings(max_examples=100, deadline=None)
def test_only_the_models_value_is_spliced(
    model: str,
    served: str,
    pairs: list[tuple[str, Any]],
    nested: bool,
    at: int,
    ascii_only: bool,
    separators: tuple[str, str],
) -> None:
    def write(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, separators=separators)

    assume(model != served)
    if nested:
        pairs = [*pairs, ("metadata", {"model": model, model: {"model": [model]}}), (model, model)]
        pairs = [pair for pair in pairs if pair[0] != "model"]
    at = min(at, len(pairs))
    members = [f"{write(key)}{separators[1]}{write(value)}" for key, value in pairs]
    lead = f"{write('model')}{separators[1]}"
    before = separators[0].join([*members[:at], lead])
    after = (separators[0] if members[at:] else "") + separators[0].join(members[at:])
    try:
        body = f"{{{before}{write(model)}{after}}}".encode()
    except UnicodeEncodeError:
        assume(False)
        raise
    try:
        assume(read_model(body)[0] == model)
    except MalformedRequestError:
        assume(False)
    spliced = splice_model(body, model, served)
    assert spliced == f"{{{before}".encode() + orjson.dumps(served) + f"{after}}}".encode()
    assert read_model(spliced)[0] == served
    assert object_pairs(spliced) == [
        ["model", served] if i == at else pair for i, pair in enumerate(object_pairs(body))
    ]


def test_of_two_models_the_one_that_counts_is_spliced() -> None:
    body = b'{"model":"a","x":"a","model":"a"}'
    assert splice_model(body, "a", "b") == b'{"model":"a","x":"a","model":"b"}'


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"\\u0061lias"}',  # an escape that no common writer makes
        b'{"x":[' + b'"alias",' * 100 + b'1],"model":"alias"}',
    ],
)
def test_a_model_that_cannot_be_found_cheaply_is_refused_with_advice(body: bytes) -> None:
    with pytest.raises(MalformedRequestError, match='put "model" first'):
        splice_model(body, "alias", "served")
