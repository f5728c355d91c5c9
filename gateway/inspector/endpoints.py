"""The page at ``/ui`` and what it reads: the feed, turns with their reasons, how to connect.

The page's files hold no data and are open to all; what it reads is behind the admin token.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import __version__, connect
from gateway.api import admin_only, error_response, json_response
from gateway.connection import abort
from gateway.errors import GatewayError
from gateway.gateway import Gateway
from gateway.inspector.feed import MAX_ROWS, MAX_WATCHERS, Feed, TooManyWatchers, Watcher
from gateway.relay import ClientGoneError, Departure
from gateway.turn_history import TURNS_KEPT

PAGE: Final = Path(__file__).parent / "page"
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
MAX_SESSIONS_ASKED: Final = 100
BEAT_S: Final = 10.0
"""A frame is sent at least so often."""
STALL_S: Final = 20.0
"""A watcher that takes nothing for so long is dropped."""


async def _to_page(request: Request) -> Response:
    return RedirectResponse("ui/")  # relative: the gateway may stand below a path


class Page:
    """The page's files, read once."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, str, str]] = {}
        for path in sorted(PAGE.iterdir()):
            if path.suffix in TYPES:
                body = path.read_bytes()
                tag = f'"{blake2b(body, digest_size=12).hexdigest()}"'
                self._files[path.name] = (body, TYPES[path.suffix], tag)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(Request(scope))(scope, receive, send)

    def _answer(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            response = error_response(
                GatewayError(405, "method_not_allowed", f"{request.method} is not served here.")
            )
            response.headers["allow"] = "GET, HEAD"
            return response
        found = self._files.get(request.path_params["name"] or "index.html")
        if found is None:
            return error_response(GatewayError(404, "not_found", "The page has no such file."))
        body, content_type, tag = found
        headers = HEADERS | {"etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers | {"content-type": content_type})


class Inspector:
    """The page and the handlers of what it reads, over one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.feed = Feed(gateway)

    def routes(self) -> list[Route]:
        gateway, admin = self.gateway, "/v1/cachewise"
        return [
            Route("/ui", _to_page),
            Route("/ui/{name:path}", Page()),
            Route(f"{admin}/events", admin_only(gateway, self.events)),
            Route(f"{admin}/turns", admin_only(gateway, self.turns)),
            Route(f"{admin}/sessions/{{sid}}/turns", admin_only(gateway, self.session_turns)),
            Route(f"{admin}/connect", admin_only(gateway, self.connect)),
        ]

    async def events(self, request: Request) -> ASGIApp:
        """Sessions, pods and turns as server-sent events: all there are, then what changes."""
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if len(self.feed.watchers) >= MAX_WATCHERS:
            return error_response(_too_many())
        return EventStream(self.feed)

    async def turns(self, request: Request) -> Response:
        """The latest turns that are over, oldest first, of the sessions asked for. Query:
        ``session``, up to `MAX_SESSIONS_ASKED` times."""
        sids = request.query_params.getlist("session")
        if not 1 <= len(sids) <= MAX_SESSIONS_ASKED:
            return error_response(
                GatewayError(
                    400,
                    "invalid_request",
                    f"session: given {len(sids)} times; allowed: 1 to {MAX_SESSIONS_ASKED} times",
                )
            )
        history = self.gateway.history
        return json_response({"object": "list", "data": {sid: history.spans(sid) for sid in sids}})

    async def session_turns(self, request: Request) -> Response:
        """The latest turns of one session with the reasons of what was done, newest first."""
        sid = request.path_params["sid"]
        found = self.gateway.history.explained(sid)
        if not found and self.gateway.sessions.by_sid(sid) is None:
            return error_response(
                GatewayError(404, "session_not_found", "No session of this id is known.")
            )
        return json_response({"object": "list", "data": found})

    async def connect(self, request: Request) -> Response:
        """How to point agents here. In ``setup``, ``{url}``, ``{model}`` and ``{key}`` stand for
        the gateway's address, a model and a key."""
        blanks = {"url": "{url}", "model": "{model}", "key": "{key}"}
        clients = [
            asdict(client)
            | {"setup": client.setup.format(**blanks), "notes": client.notes.format(**blanks)}
            for client in connect.CLIENTS
        ]
        gateway = self.gateway
        return json_response(
            {
                "clients": clients,
                "models": sorted(gateway.fleet.models),
                "keys_required": gateway.access.keys_required,
            }
        )


def _too_many() -> GatewayError:
    return GatewayError(
        503,
        "too_many_watchers",
        f"{MAX_WATCHERS} inspectors watch already; close one of them.",
        retry_after_s=10,
    )


class EventStream:
    """The answer to one watcher, for as long as it stays."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self.feed.watching() as watcher:
                async with Departure(receive):
                    await self._stream(watcher, send)
        except ClientGoneError:
            pass
        except TooManyWatchers:
            await error_response(_too_many())(scope, receive, send)
        except TimeoutError:
            abort(scope)
            await asyncio.sleep(0)  # the server notices

    async def _stream(self, watcher: Watcher, send: Send) -> None:
        gateway = self.feed.gateway
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.feed.warm()
        hello = {
            "version": __version__,
            "sessions": len(self.feed.sessions),
            "limits": {"sessions": MAX_ROWS, "turns": TURNS_KEPT},
        }
        await self._send(send, b"hello", hello)
        while not gateway.draining:
            await self._send(send, b"frame", watcher.frame(self._now()))
            if not watcher.behind:
                await self._news(watcher)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _now(self) -> float:
        return time.monotonic() + self.feed.gateway.wall_minus_monotonic_s

    @staticmethod
    async def _news(watcher: Watcher) -> None:
        """Until there is something to send, or for `BEAT_S`."""
        watcher.news.clear()
        try:
            async with asyncio.timeout(BEAT_S):
                await watcher.news.wait()
        except TimeoutError:
            pass

    @staticmethod
    async def _send(send: Send, name: bytes, data: dict[str, Any]) -> None:
        body = b"event: %b\ndata: %b\n\n" % (name, orjson.dumps(data))
        async with asyncio.timeout(STALL_S):
            await send({"type": "http.response.body", "body": body, "more_body": True})
