"""Embedded pods, each on a loopback port of its own, inside the running event loop."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from gateway.embedded.app import DISCONNECT_EXTENSION, create_pod_app
from gateway.embedded.engine import EmbeddedEngine
from gateway.embedded.scheduler import EngineConfig

if TYPE_CHECKING:
    from gateway.embedded.kv_events import KvEvents

_CLOSE_TIMEOUT_S = 5.0


class _PodProtocol(HttpToolsProtocol):
    """Logs no requests, and lets the app drop its connection, for scripted faults."""

    def __init__(self, config: Config, state: ServerState) -> None:
        super().__init__(config, state, app_state={})
        self.access_log = False

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope = cast("dict[str, Any]", self.scope)
        scope["extensions"] = {DISCONNECT_EXTENSION: self.transport.abort}


@dataclass(slots=True)
class _Server:
    """uvicorn's protocol on one socket, without its process-wide parts: signals and logging."""

    listener: asyncio.Server
    state: ServerState

    async def close(self) -> None:
        """Stop listening and drop every connection, then wait for their requests to end."""
        self.listener.close()
        for connection in list(self.state.connections):
            connection.transport.abort()
        await self.listener.wait_closed()
        if self.state.tasks:
            await asyncio.wait(self.state.tasks, timeout=_CLOSE_TIMEOUT_S)


class EmbeddedFleet:
    """`pods` embedded pods while the context lasts.

    `urls[i]` reaches the pod whose engine is `pods[i]`; `events[i]` publishes its KV events, if
    that is asked for. The arguments are those of the `embedded` settings; `speedup` divides the
    modelled time. OSError if no port is free.
    """

    def __init__(
        self,
        *,
        pods: int = 2,
        model: str = "embedded",
        speedup: float = 20.0,
        config: EngineConfig | None = None,
        kv_events: bool = False,
    ) -> None:
        self.model = model
        self.pods = [EmbeddedEngine(config, speedup=speedup) for _ in range(pods)]
        self.urls: list[str] = []
        self.events: list[KvEvents] = []
        self._publishing = kv_events
        self._servers: list[_Server] = []

    async def __aenter__(self) -> EmbeddedFleet:
        try:
            for index, engine in enumerate(self.pods):
                app = create_pod_app(engine, model=self.model, name=f"embedded-{index}")
                server, port = await _serve(app)
                self._servers.append(server)
                self.urls.append(f"http://127.0.0.1:{port}")
                if self._publishing:
                    self._publish(engine)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _publish(self, engine: EmbeddedEngine) -> None:
        from gateway.embedded.kv_events import KvEvents

        events = KvEvents(engine.config.block_size_tokens)
        self.events.append(events)
        engine.publish_to(events)

    async def kill(self, index: int) -> None:
        """Let pod `index` die: its port refuses, its connections are reset, its KV is gone."""
        await self._servers[index].close()
        await self.pods[index].aclose()

    async def aclose(self) -> None:
        """Close every pod; killed ones stay closed."""
        for server in self._servers:
            await server.close()
        for engine in self.pods:
            await engine.aclose()


async def _serve(app: Any) -> tuple[_Server, int]:
    config = Config(app, lifespan="off", log_config=None, ws="none")
    config.load()
    state = ServerState()
    state.default_headers = config.encoded_headers
    listening = socket.create_server(("127.0.0.1", 0))
    try:
        listener = await asyncio.get_running_loop().create_server(
            lambda: _PodProtocol(config, state), sock=listening, backlog=2048
        )
    except BaseException:
        listening.close()
        raise
    return _Server(listener, state), listening.getsockname()[1]
