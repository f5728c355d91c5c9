"""The official SDKs, talking to a real server, raise what they should for our own errors."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import anthropic
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from gateway.errors import GatewayError, render, stream_error

MESSAGE = "No pod serves 'nope'. Served: 'embedded'."
MESSAGES = [{"role": "user", "content": "hi"}]

CHAT_CHUNK = (
    b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
)
COMPLETIONS_CHUNK = (
    b'data: {"id":"1","object":"text_completion","created":1,"model":"m",'
    b'"choices":[{"index":0,"text":"hi"}]}\n\n'
)
RESPONSES_CHUNK = (
    b'event: response.created\ndata: {"type":"response.created","sequence_number":0,"response":'
    b'{"id":"resp_1","object":"response","created_at":1,"model":"m","output":[],'
    b'"status":"in_progress"}}\n\n'
)
MESSAGES_CHUNK = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1",'
    b'"type":"message","role":"assistant","content":[],"model":"m","stop_reason":null,'
    b'"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}}}\n\n'
)


class Failing:
    """A server that answers everything with one error, as a response or at the end of a stream."""

    error: GatewayError
    before: bytes | None = None
    url: str

    async def answer(self, request: Request) -> Response:
        wire = request.url.path.rpartition("/")[2]
        if self.before is None:
            status, headers, body = render(
                self.error, "anthropic" if wire == "messages" else "openai"
            )
            response = Response(body, status)
            response.raw_headers = headers
            return response
        body = self.before + stream_error(self.error, wire)  # type: ignore[arg-type]
        return StreamingResponse(iter([body]), media_type="text/event-stream")


@pytest.fixture
async def server() -> AsyncIterator[Failing]:
    failing = Failing()
    app = Starlette(routes=[Route("/v1/{path:path}", failing.answer, methods=["POST"])])
    app.add_route("/v1/chat/{path:path}", failing.answer, methods=["POST"])
    listening = socket.create_server(("127.0.0.1", 0))
    failing.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    task = asyncio.create_task(uvicorn_server.serve(sockets=[listening]))
    yield failing
    uvicorn_server.should_exit = True
    await task


@pytest.fixture
async def openai_client(server: Failing) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=server.url + "/v1", api_key="k", max_retries=0
    ) as client:
        yield client


@pytest.fixture
async def anthropic_client(server: Failing) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="k", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("status", "raised"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (413, openai.APIStatusError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (502, openai.InternalServerError),
        (503, openai.InternalServerError),
        (504, openai.InternalServerError),
    ],
)
async def test_openai_sdk_raises_the_class_of_the_status_and_shows_the_message(
    server: Failing,
    openai_client: openai.AsyncOpenAI,
    status: int,
    raised: type[openai.APIStatusError],
) -> None:
    server.error = GatewayError(status, "some_code", MESSAGE)
    for call in (
        openai_client.chat.completions.create(model="nope", messages=MESSAGES),
        openai_client.responses.create(model="nope", input="hi"),
        openai_client.completions.create(model="nope", prompt="hi"),
    ):
        with pytest.raises(raised) as caught:
            await call
        assert caught.value.status_code == status
        assert caught.value.code == "some_code"
        assert MESSAGE in str(caught.value)


@pytest.mark.parametrize(
    ("status", "raised", "kind"),
    [
        (400, anthropic.BadRequestError, "invalid_request_error"),
        (401, anthropic.AuthenticationError, "authentication_error"),
        (403, anthropic.PermissionDeniedError, "permission_error"),
        (404, anthropic.NotFoundError, "not_found_error"),
        (413, anthropic.APIStatusError, "request_too_large"),
        (429, anthropic.RateLimitError, "rate_limit_error"),
        (500, anthropic.InternalServerError, "api_error"),
        (502, anthropic.InternalServerError, "api_error"),
        (503, anthropic.APIStatusError, "overloaded_error"),
        (504, anthropic.APIStatusError, "timeout_error"),
        (529, anthropic.APIStatusError, "overloaded_error"),
    ],
)
async def test_anthropic_sdk_raises_the_class_of_the_status_and_shows_the_message(
    server: Failing,
    anthropic_client: anthropic.AsyncAnthropic,
    status: int,
    raised: type[anthropic.APIStatusError],
    kind: str,
) -> None:
    server.error = GatewayError(status, "some_code", MESSAGE)
    with pytest.raises(raised) as caught:
        await anthropic_client.messages.create(model="nope", max_tokens=8, messages=MESSAGES)
    assert caught.value.status_code == status
    assert caught.value.type == kind
    assert "No pod serves" in str(caught.value)


@pytest.mark.parametrize(("given_s", "sent"), [(0.0, "1"), (0.2, "1"), (4.2, "5"), (600.0, "60")])
@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
async def test_retry_after_is_in_whole_seconds_of_at_most_a_minute(
    server: Failing,
    openai_client: openai.AsyncOpenAI,
    anthropic_client: anthropic.AsyncAnthropic,
    dialect: str,
    given_s: float,
    sent: str,
) -> None:
    server.error = GatewayError(429, "too_many_turns", MESSAGE, retry_after_s=given_s)
    if dialect == "openai":
        with pytest.raises(openai.RateLimitError) as caught:
            await openai_client.chat.completions.create(model="m", messages=MESSAGES)
        headers = caught.value.response.headers
    else:
        with pytest.raises(anthropic.RateLimitError) as caught_too:
            await anthropic_client.messages.create(model="m", max_tokens=8, messages=MESSAGES)
        headers = caught_too.value.response.headers
    assert headers["retry-after"] == sent


async def test_a_retried_request_succeeds_as_the_sdk_honours_retry_after(server: Failing) -> None:
    server.error = GatewayError(429, "too_many_turns", MESSAGE, retry_after_s=0.1)
    async with openai.AsyncOpenAI(
        base_url=server.url + "/v1", api_key="k", max_retries=1
    ) as client:
        call = asyncio.create_task(
            client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        )
        await asyncio.sleep(0.3)
        server.before = CHAT_CHUNK
        chunks = aiter(await call)
        assert (await anext(chunks)).choices[0].delta.content == "hi"
        with pytest.raises(openai.APIError):
            await anext(chunks)


async def drained(events: AsyncIterator[object]) -> None:
    async for _ in events:
        pass


async def drained_helper(manager: AbstractAsyncContextManager[AsyncIterator[object]]) -> None:
    async with manager as events:
        await drained(events)


async def test_chat_stream_yields_what_came_then_raises_with_the_message(
    server: Failing, openai_client: openai.AsyncOpenAI
) -> None:
    server.error, server.before = GatewayError(502, "pod_failed", MESSAGE), CHAT_CHUNK
    stream = aiter(
        await openai_client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    )
    assert (await anext(stream)).choices[0].delta.content == "hi"
    with pytest.raises(openai.APIError, match="No pod serves") as caught:
        await anext(stream)
    assert caught.value.code == "pod_failed"


async def test_completions_stream_yields_what_came_then_raises_with_the_message(
    server: Failing, openai_client: openai.AsyncOpenAI
) -> None:
    server.error, server.before = GatewayError(502, "pod_failed", MESSAGE), COMPLETIONS_CHUNK
    stream = aiter(await openai_client.completions.create(model="m", prompt="hi", stream=True))
    assert (await anext(stream)).choices[0].text == "hi"
    with pytest.raises(openai.APIError, match="No pod serves") as caught:
        await anext(stream)
    assert caught.value.code == "pod_failed"


@pytest.mark.parametrize("before", [RESPONSES_CHUNK, b": keepalive\n\n"])
async def test_responses_stream_raises_with_the_message_in_both_sdk_forms(
    server: Failing, openai_client: openai.AsyncOpenAI, before: bytes
) -> None:
    server.error, server.before = GatewayError(502, "pod_failed", MESSAGE), before
    with pytest.raises(openai.APIError, match="No pod serves") as caught:
        await drained(await openai_client.responses.create(model="m", input="hi", stream=True))
    assert caught.value.code == "pod_failed"
    with pytest.raises(openai.APIError, match="No pod serves"):
        await drained_helper(openai_client.responses.stream(model="m", input="hi"))


@pytest.mark.parametrize(("status", "code"), [(429, "rate_limit_exceeded"), (502, "server_error")])
def test_responses_stream_ends_with_a_failed_response_for_clients_that_read_that(
    status: int, code: str
) -> None:
    from openai.types.responses import ResponseErrorEvent, ResponseFailedEvent

    events = stream_error(GatewayError(status, "c", MESSAGE), "responses").split(b"\n\n")
    error, failed = (json.loads(e.partition(b"data: ")[2]) for e in events if e.strip())
    assert ResponseErrorEvent.model_validate(error).message == MESSAGE
    assert failed["response"]["error"] == {"code": code, "message": MESSAGE}
    assert ResponseFailedEvent.construct(**failed).response.error.code == code  # type: ignore[union-attr]


@pytest.mark.parametrize("before", [MESSAGES_CHUNK, b": keepalive\n\n"])
async def test_messages_stream_raises_with_the_message_in_both_sdk_forms(
    server: Failing, anthropic_client: anthropic.AsyncAnthropic, before: bytes
) -> None:
    server.error, server.before = GatewayError(503, "no_pod", MESSAGE), before
    with pytest.raises(anthropic.APIStatusError, match="No pod serves") as caught:
        await drained(
            await anthropic_client.messages.create(
                model="m", max_tokens=8, messages=MESSAGES, stream=True
            )
        )
    assert caught.value.type == "overloaded_error"
    with pytest.raises(anthropic.APIStatusError, match="No pod serves"):
        await drained_helper(
            anthropic_client.messages.stream(model="m", max_tokens=8, messages=MESSAGES)
        )


async def test_a_torn_event_still_ends_in_an_error(
    server: Failing, openai_client: openai.AsyncOpenAI, anthropic_client: anthropic.AsyncAnthropic
) -> None:
    server.error, server.before = GatewayError(502, "pod_failed", MESSAGE), MESSAGES_CHUNK[:90]
    with pytest.raises(anthropic.APIStatusError, match="No pod serves"):
        await drained(
            await anthropic_client.messages.create(
                model="m", max_tokens=8, messages=MESSAGES, stream=True
            )
        )
    server.before = CHAT_CHUNK[:50]
    with pytest.raises((openai.APIError, ValueError)):
        await drained(
            await openai_client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        )
