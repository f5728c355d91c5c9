"""The pod's HTTP face: vLLM's endpoints in front of an embedded engine."""

from __future__ import annotations

import asyncio
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_patch import metrics as patch_metrics
from engine_patch.endpoints import HintEndpoints, malformed
from engine_patch.hints import Envelope, HintError, Parsed, parse_field
from gateway.embedded.answer import Answer
from gateway.embedded.dialects.base import (
    JSON,
    Dialect,
    Exchange,
    RequestError,
    Usage,
    openai_error,
)
from gateway.embedded.dialects.chat import ChatExchange
from gateway.embedded.dialects.completions import CompletionExchange
from gateway.embedded.dialects.messages import MessagesExchange, anthropic_error
from gateway.embedded.dialects.responses import ResponsesExchange
from gateway.embedded.engine import EmbeddedEngine, EngineDeadError, Generation
from gateway.embedded.metrics import create_registry
from gateway.embedded.prompt import BYTES_PER_TOKEN, render_prompt
from gateway.embedded.script import HEADER as SCRIPT_HEADER
from gateway.embedded.script import Fail, PlannedTurn, ScriptError, plan_turn

VERSION = "0.32.0+cachewise.embedded"
EMBEDDED_HEADER = (b"x-cachewise-embedded", b"true")
DISCONNECT_EXTENSION = "cachewise.disconnect"  # the fleet's servers offer it: drops the connection

CHAT = Dialect(ChatExchange, openai_error)
COMPLETIONS = Dialect(CompletionExchange, openai_error)
RESPONSES = Dialect(ResponsesExchange, openai_error)
MESSAGES = Dialect(MessagesExchange, anthropic_error)


def create_pod_app(
    engine: EmbeddedEngine, *, model: str = "embedded", name: str = "embedded-0"
) -> Starlette:
    """The ASGI app of one pod that serves `model`; `name` is what scripts call it."""
    pod = _Pod(engine, model, name)

    def generate(dialect: Dialect) -> Callable[[Request], Awaitable[Any]]:
        async def endpoint(request: Request) -> ASGIApp:
            return await pod.generate(request, dialect)

        return endpoint

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await engine.aclose()

    return Starlette(
        routes=[
            Route("/v1/chat/completions", generate(CHAT), methods=["POST"]),
            Route("/v1/completions", generate(COMPLETIONS), methods=["POST"]),
            Route("/v1/responses", generate(RESPONSES), methods=["POST"]),
            Route("/v1/messages", generate(MESSAGES), methods=["POST"]),
            Route("/v1/messages/count_tokens", pod.count_tokens, methods=["POST"]),
            Route("/tokenize", pod.tokenize, methods=["POST"]),
            Route("/v1/models", pod.models),
            Route("/metrics", pod.metrics),
            Route("/version", pod.version),
            Route("/health", pod.health),
            Route("/ping", pod.health, methods=["GET", "POST"]),
            *HintEndpoints(lambda _request: pod.call).routes(),
        ],
        middleware=[Middleware(_SayEmbedded)],
        lifespan=lifespan,
    )


class _SayEmbedded:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), EMBEDDED_HEADER]
            await send(message)

        await self.app(scope, receive, marked)


class _Pod:
    def __init__(self, engine: EmbeddedEngine, model: str, name: str) -> None:
        self._engine = engine
        self._model = model
        self._name = name
        self._created = int(time.time())
        self._registry = create_registry(engine, model)

    async def generate(self, request: Request, dialect: Dialect) -> ASGIApp:
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        try:
            body = await self._body(request)
            exchange = dialect.exchange(body, self._model, request_id)
            turn = plan_turn(exchange.conversation, request.headers.get(SCRIPT_HEADER))
            prompt = render_prompt(exchange.conversation)
            exchange.max_tokens = self._max_tokens(prompt, exchange)
            answer = Answer(turn, exchange.max_tokens)
            hints = body.get("kv_hints")
            kv_hints = parse_field(hints) if hints is not None else None
        except HintError as error:
            return malformed(error)
        except ScriptError as error:
            return _refusal(dialect, RequestError(str(error), param=SCRIPT_HEADER))
        except RequestError as error:
            return _refusal(dialect, error)
        session_id = body.get("session_id") or request.headers.get("x-session-id")
        return _Answering(
            self._engine,
            dialect,
            exchange,
            answer,
            prompt,
            stream=bool(body.get("stream")),
            session_id=session_id if isinstance(session_id, str) else None,
            kv_hints=kv_hints,
            fail=self._failure(turn),
        )

    async def count_tokens(self, request: Request) -> Response:
        try:
            body = await self._body(request)
            exchange = MessagesExchange(body, self._model, "")
        except RequestError as error:
            return _refusal(MESSAGES, error)
        tokens = len(render_prompt(exchange.conversation)) // BYTES_PER_TOKEN
        return JSONResponse(
            {"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}
        )

    async def tokenize(self, request: Request) -> Response:
        try:
            body = await self._body(request)
            dialect = CHAT if "messages" in body else COMPLETIONS
            prompt = render_prompt(dialect.exchange(body, self._model, "").conversation)
        except RequestError as error:
            return _refusal(CHAT, error)
        count = len(prompt) // BYTES_PER_TOKEN
        return _json(
            {
                "count": count,
                "max_model_len": self._engine.config.max_model_len,
                "tokens": struct.unpack(f"<{count}I", prompt),
                "token_strs": None,
            }
        )

    async def models(self, _request: Request) -> Response:
        card = {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "vllm",
            "root": self._model,
            "parent": None,
            "max_model_len": self._engine.config.max_model_len,
            "permission": [],
        }
        return JSONResponse({"object": "list", "data": [card]})

    async def call(self, operation: str, argument: str) -> list[JSON]:
        """The engine's answer to one operation of the hint endpoints."""
        return [self._engine.scheduler.reuse.call(operation, argument)]

    async def metrics(self, _request: Request) -> Response:
        text = generate_latest(self._registry)
        text += patch_metrics.render(await self.call("metrics", ""))
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def version(self, _request: Request) -> Response:
        return JSONResponse({"version": VERSION})

    async def health(self, _request: Request) -> Response:
        return Response(status_code=503 if self._engine.closed else 200)

    async def _body(self, request: Request) -> JSON:
        try:
            body = orjson.loads(await request.body())
        except orjson.JSONDecodeError as error:
            raise RequestError(f"JSON decode error: {error}", err_type="Bad Request") from error
        if not isinstance(body, dict):
            raise RequestError("Input should be a valid dictionary", err_type="Bad Request")
        model = body.get("model")
        if model and model != self._model:
            raise RequestError(
                f"The model `{model}` does not exist.", 404, "NotFoundError", "model"
            )
        return body

    def _max_tokens(self, prompt: bytes, exchange: Exchange) -> int:
        """As many tokens as were asked for and fit; RequestError if none do, as vLLM says it."""
        limit = self._engine.config.max_model_len
        tokens, wanted = len(prompt) // BYTES_PER_TOKEN, exchange.max_tokens
        if tokens >= limit:
            raise RequestError(
                f"This model's maximum context length is {limit} tokens. However, your prompt "
                f"contains {tokens} input tokens, which exceeds this limit even without any "
                "output tokens. Please reduce the length of the input prompt. "
                f"(parameter=input_tokens, value={tokens})",
                param="input_tokens",
            )
        return min(limit - tokens, wanted or limit)

    def _failure(self, turn: PlannedTurn) -> Fail | None:
        fail = turn.fail
        return fail if fail and fail.pod in (None, self._name) else None


class _Answering:
    """One answer on its way out. A client that goes away aborts the engine's request at once."""

    def __init__(
        self,
        engine: EmbeddedEngine,
        dialect: Dialect,
        exchange: Exchange,
        answer: Answer,
        prompt: bytes,
        *,
        stream: bool,
        session_id: str | None,
        kv_hints: tuple[Envelope, Parsed] | None,
        fail: Fail | None,
    ) -> None:
        self._engine = engine
        self._dialect = dialect
        self._exchange = exchange
        self._answer = answer
        self._prompt = prompt
        self._stream = stream
        self._session_id = session_id
        self._kv_hints = kv_hints
        self._fail = fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.ensure_future(self._respond(scope, receive, send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        if not answering.cancelled():
            answering.result()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        fail = self._fail
        if fail is not None and (fail.after_chunks == 0 or not self._stream):
            if fail.status == "disconnect":
                await _drop(scope, receive)
            else:
                await _refusal(self._dialect, _scripted_error(fail.status))(scope, receive, send)
            return
        tokens = self._answer.tokens(self._prompt, self._engine.config.block_size_tokens)
        finish = "length" if self._answer.finish_reason == "length" else "stop"
        try:
            with self._engine.generate(
                tokens,
                finish_reason=finish,
                session_id=self._session_id,
                kv_hints=self._kv_hints,
            ) as generation:
                if self._stream:
                    await self._send_events(generation, scope, receive, send)
                else:
                    await self._send_whole(generation, scope, receive, send)
        except EngineDeadError:
            # Before the stream began; _send_events tells its own client.
            error = RequestError("EngineCore encountered an issue.", 500, "InternalServerError")
            await _refusal(self._dialect, error)(scope, receive, send)

    async def _send_whole(
        self, generation: Generation, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async for _tokens in generation.progress():
            pass
        usage = self._usage(generation, self._answer.output_tokens)
        message, finish = self._answer.message(), self._answer.finish_reason
        await _json(self._exchange.whole(message, finish, usage))(scope, receive, send)

    async def _send_events(
        self, generation: Generation, scope: Scope, receive: Receive, send: Send
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        exchange, answer, fail = self._exchange, self._answer, self._fail
        reader = answer.deltas()
        chunks = 0
        try:
            async for tokens in generation.progress():
                usage = self._usage(generation, tokens)
                data = exchange.opening(usage) if chunks == 0 else b""
                data += exchange.delta(reader.advance(tokens), usage)
                last = tokens >= answer.output_tokens
                if last and fail is None:
                    data += exchange.closing(answer.finish_reason, usage)
                if data:
                    await send(_chunk(data))
                chunks += 1
                if fail is not None and (last or chunks >= fail.after_chunks):
                    if fail.status == "disconnect":
                        await _drop(scope, receive)
                        return
                    await send(_chunk(exchange.failure(_scripted_error(fail.status))))
                    break
        except EngineDeadError:
            error = RequestError("EngineCore encountered an issue.", 500, "InternalServerError")
            await send(_chunk(exchange.failure(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _usage(self, generation: Generation, tokens: int) -> Usage:
        request = generation.request
        return Usage(
            request.prompt_tokens, tokens, generation.cached_tokens, self._answer.reasoning_tokens
        )


def _chunk(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


def _json(content: JSON, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _refusal(dialect: Dialect, error: RequestError) -> Response:
    return _json(dialect.error_body(error), error.status)


def _scripted_error(status: int) -> RequestError:
    return RequestError("Failure asked for by the request's script.", status, "ScriptedError")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drop(scope: Scope, receive: Receive) -> None:
    """Break the connection without another byte, where the server can."""
    disconnect = scope.get("extensions", {}).get(DISCONNECT_EXTENSION)
    if disconnect is not None:
        disconnect()
        await asyncio.Event().wait()  # cancelled when the server reports the disconnect
