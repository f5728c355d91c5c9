"""The ASGI app: routes, and what starts and stops with the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.api import Api, admin_only, error_response, json_response
from gateway.config import PodSettings, Settings
from gateway.count_tokens import CountTokensEndpoint
from gateway.dialects import DIALECTS
from gateway.embedded.fleet import EmbeddedFleet
from gateway.embedded.scheduler import EngineConfig
from gateway.errors import Dialect as Family
from gateway.errors import GatewayError
from gateway.gateway import Gateway
from gateway.inspector.endpoints import Inspector
from gateway.logs import dropped_total
from gateway.request import authenticate
from gateway.turns import TurnEndpoint

logger = logging.getLogger("gateway.app")

HOUSEKEEPING_S = 1.0
TICK_S = 0.5


class App(Starlette):
    """The gateway as an ASGI app.

    Turns go straight to their endpoints, which see to their own errors: each layer of middleware
    would cost every chunk of a stream a call.
    """

    gateway: Gateway
    turns: dict[str, TurnEndpoint]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self.turns.get(scope["path"])
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def create_app(settings: Settings) -> App:
    """The gateway as an ASGI app. Without pods in ``settings`` it starts embedded ones."""
    gateway = Gateway(settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if gateway.tracer is not None:
                await stack.enter_async_context(gateway.tracer.running())
            if gateway.recorder is not None:
                await stack.enter_async_context(gateway.recorder.running())
            if not settings.pods and settings.discovery.kind == "static":
                await stack.enter_async_context(embedded_fleet(gateway))
            await stack.enter_async_context(gateway.relay)
            await stack.enter_async_context(gateway.loop.hints)
            await stack.enter_async_context(gateway.fleet.watched())
            await stack.enter_async_context(gateway.foresight.kept())
            if gateway.sharing is not None:
                await stack.enter_async_context(gateway.sharing.running())
            await stack.enter_async_context(running(keep_house(gateway), "housekeeping"))
            await stack.enter_async_context(running(keep_time(gateway), "admission"))
            yield
            gateway.shut_down()

    turns = {dialect.path: TurnEndpoint(gateway, dialect) for dialect in DIALECTS}
    plain = Plain(gateway)
    api = Api(gateway)
    inspector = Inspector(gateway)
    admin = "/v1/cachewise"
    app = App(
        lifespan=lifespan,
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in turns.items()),
            Route("/v1/responses", plain.no_websocket, methods=["GET"]),
            Route(
                "/v1/messages/count_tokens",
                CountTokensEndpoint(gateway, "/v1/messages/count_tokens", "anthropic"),
                methods=["POST"],
            ),
            Route("/v1/models", plain.models),
            Route("/", plain.hello, methods=["GET"]),
            Route("/api/hello", plain.hello, methods=["GET"]),
            Route("/health", plain.health),
            Route("/ready", plain.ready),
            Route("/metrics", plain.metrics),
            Route(f"{admin}/sessions", admin_only(gateway, api.sessions)),
            Route(f"{admin}/sessions/{{sid}}", admin_only(gateway, api.session)),
            Route(f"{admin}/pods", admin_only(gateway, api.pods)),
            Route(
                f"{admin}/pods/{{name}}/drain",
                admin_only(gateway, api.drain),
                methods=["POST", "DELETE"],
            ),
            *inspector.routes(),
        ],
        exception_handlers={404: not_found, 405: not_found},
    )
    app.router.redirect_slashes = False  # to where, behind a proxy, only that knows
    app.gateway = gateway
    app.turns = turns
    app.state.gateway = gateway
    app.state.inspector = inspector
    return app


@asynccontextmanager
async def embedded_fleet(gateway: Gateway) -> AsyncIterator[None]:
    """Start embedded pods and make them the gateway's fleet; any model name reaches them."""
    settings = gateway.settings.embedded
    config = EngineConfig(
        block_size_tokens=settings.block_size_tokens,
        kv_capacity_tokens=settings.kv_capacity_tokens,
        max_model_len=settings.max_model_len,
    )
    async with EmbeddedFleet(
        pods=settings.pods,
        model=settings.model,
        speedup=settings.speedup,
        config=config,
        kv_events=settings.kv_events,
    ) as embedded:
        for number, url in enumerate(embedded.urls):
            pod = {"url": url, "name": f"embedded-{number}"}
            if settings.kv_events:
                events = embedded.events[number]
                pod |= {"kv_events": events.endpoint, "kv_events_replay": events.replay_endpoint}
            gateway.fleet.add(PodSettings.model_validate(pod))
        gateway.aliases.setdefault("*", settings.model)
        yield


async def keep_house(gateway: Gateway) -> None:
    """Forget old sessions and measure the event loop's lag, once a second."""
    lags: deque[float] = deque(maxlen=10)
    while True:
        due = time.monotonic() + HOUSEKEEPING_S
        await asyncio.sleep(HOUSEKEEPING_S)
        lags.append(max(0.0, time.monotonic() - due))
        gateway.metrics.loop_lag.set(max(lags))
        gateway.sessions.expire(time.monotonic())


async def keep_time(gateway: Gateway) -> None:
    """Tell admission and hints that time has passed, twice a second."""
    while True:
        await asyncio.sleep(TICK_S)
        try:
            gateway.loop.tick(time.monotonic())
        except Exception:
            gateway.metrics.degraded.labels("tick").inc()
            logger.exception("the tick of admission failed")


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Work that goes on in the background for as long as the context lasts."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Plain:
    """The small endpoints."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def hello(self, request: Request) -> Response:
        return PlainTextResponse("CacheWise Gateway\n")

    async def health(self, request: Request) -> Response:
        """The process lives."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Turns can be taken: at least one pod is ready and the gateway is not shutting down."""
        pods = {pod.name: pod.takes_turns for pod in self.gateway.fleet}
        ready = any(pods.values()) and not self.gateway.draining
        response = json_response({"status": "ready" if ready else "not_ready", "pods": pods})
        response.status_code = 200 if ready else 503
        return response

    async def models(self, request: Request) -> Response:
        """All models and aliases, in a shape that OpenAI's and Anthropic's clients both read."""
        gateway = self.gateway
        try:
            authenticate(gateway, request.scope)
        except GatewayError as error:
            return error_response(error)
        served = gateway.fleet.models
        named = {name: (name, pod) for name, pod in served.items()}
        for alias, name in gateway.aliases.items():
            if alias != "*" and name in served:
                named.setdefault(alias, (name, served[name]))
        created = int(time.time())
        data = [
            {
                "id": name,
                "object": "model",
                "type": "model",
                "display_name": name,
                "created": created,
                "created_at": "1970-01-01T00:00:00Z",
                "owned_by": "cachewise",
                "root": root,
                "max_model_len": pod.models.get(root),
            }
            for name, (root, pod) in named.items()
        ]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return json_response({"object": "list", "data": data, "has_more": False, **ends})

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        gateway = self.gateway
        gateway.metrics.forecast_nodes.set(len(gateway.foresight.predictor.table))
        gateway.metrics.refresh(
            gateway.fleet, gateway.sessions, gateway.loop.admission, dropped_total()
        )
        return Response(
            generate_latest(gateway.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    async def no_websocket(self, request: Request) -> Response:
        """Codex tries a WebSocket first; 426 sends it to HTTP at once (`clients.md` §0.7)."""
        if request.headers.get("upgrade", "").lower() == "websocket":
            response = error_response(
                GatewayError(426, "upgrade_required", "Responses are served over HTTP here.")
            )
            response.headers.update({"upgrade": "HTTP/1.1", "connection": "Upgrade"})
            return response
        raise HTTPException(405, headers={"allow": "POST"})


async def not_found(request: Request, error: Exception) -> Response:
    """No such path, or not with this method; in the dialect that the path belongs to."""
    path = request.url.path
    family: Family = "anthropic" if path.startswith("/v1/messages") else "openai"
    if isinstance(error, HTTPException) and error.status_code == 405:
        text = f"{request.method} is not served at {path[:200]}."
        response = error_response(GatewayError(405, "method_not_allowed", text), family)
        response.headers.update(error.headers or {})
        return response
    text = f"{path[:200]} is not served by this gateway."
    return error_response(GatewayError(404, "not_found", text), family)
