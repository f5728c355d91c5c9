"""The least a Python gateway can do: parse the body, pass bytes on. The floor to compare with."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

UPSTREAM = os.environ.get("BENCH_UPSTREAM", "")


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as client:
        app.state.client = client
        yield


async def chat(request: Request) -> Response:
    body = await request.body()
    if "model" not in orjson.loads(body):
        return JSONResponse({"error": {"message": "model is required"}}, 400)
    upstream = await request.app.state.client.post(
        f"{UPSTREAM}/v1/chat/completions", data=body, headers={"content-type": "application/json"}
    )
    content_type = upstream.headers["content-type"]
    if upstream.content_length is not None:
        async with upstream:
            return Response(await upstream.read(), upstream.status, media_type=content_type)

    async def chunks() -> AsyncIterator[bytes]:
        async with upstream:
            async for chunk in upstream.content.iter_any():
                yield chunk

    return StreamingResponse(chunks(), upstream.status, media_type=content_type)


app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])], lifespan=_lifespan)
