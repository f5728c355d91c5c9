"""The data plane: bytes from the client to a pod and back, untouched.

`Relay.open` sends a request and waits for the pod's first byte; until then nothing has reached the
client and the turn may still be given to another pod. `Answer.pass_on` then hands every chunk to
the client as it comes and shows a copy to an observer. An event stream is only ever cut between two
events, so that an error event can end it well.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import aiohttp
from yarl import URL

from gateway.config import RelaySettings
from gateway.connection import cannot_write
from gateway.errors import GatewayError
from gateway.fleet.pod import Pod
from gateway.splice import Splice

Send = Callable[[dict[str, Any]], Awaitable[None]]
HeaderList = Iterable[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Headers that belong to one connection (RFC 9110 §7.6.1)."""
NOT_SENT_ON = HOP_BY_HOP | {
    b"accept-encoding",
    b"content-encoding",
    b"content-length",
    b"expect",
    b"host",
    b"x-cachewise-admin-token",
    b"x-cachewise-priority",
    b"x-cachewise-route",
    b"x-data-parallel-rank",
    b"x-kv-hints-token",
    b"x-session-id",
}
"""Request headers the gateway answers for itself. Pods answer uncompressed, so that the observer
can read; the body was decompressed; session id, rank, right to hint are the gateway's own."""
CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
NOT_PASSED_BACK = HOP_BY_HOP | {b"date", b"server"}

MAX_WHOLE_BYTES = 8 * 1024 * 1024
"""An answer that is no event stream and not longer than this reaches the client whole or not at
all; a longer one is passed on as it comes."""
EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
MAX_HELD_BYTES = 256 * 1024
"""Bytes of an unfinished event that are held back at the most."""


Reason = Literal[
    "connect_timeout", "refused", "disconnected", "lost", "failed", "first_byte_timeout"
]


class PodError(Exception):
    """The pod failed before its first byte."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Refused(PodError):  # noqa: N818
    """No connection: the pod is not there."""


class Dropped(PodError):  # noqa: N818
    """The connection broke; if it was a kept one, the pod may just have closed it for age."""


class TimedOut(PodError):  # noqa: N818
    """The pod said nothing in time."""


class BrokenOffError(Exception):
    """The pod failed in the middle of its answer."""


@lru_cache(maxsize=256)
def _url(base: str, path: str, query: str) -> URL:
    return URL(f"{base}{path}?{query}" if query else base + path, encoded=True)


class Relay:
    """Sends requests to pods over kept connections. Use as an async context manager."""

    def __init__(self, settings: RelaySettings, *, forward_client_key: bool) -> None:
        self.settings = settings
        self._not_sent_on = NOT_SENT_ON if forward_client_key else NOT_SENT_ON | CREDENTIALS
        self._timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=settings.connect_timeout_s,
        )
        self._client: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Relay:
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                # vLLM's server closes idle connections after 5 s; be first.
                keepalive_timeout=4.0,
                ttl_dns_cache=10,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            timeout=self._timeout,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    def headers_for(
        self, pod: Pod, headers: HeaderList, session_id: str | None
    ) -> list[tuple[str, str]]:
        """The client's headers as the pod gets them."""
        drop = self._not_sent_on | nominated(headers)
        if pod.api_key is not None:
            drop |= {b"authorization"}  # the pod's key stands in its place
        sent = [
            (name.decode("latin-1"), value.decode(errors="replace"))
            for name, value in headers
            if name not in drop
        ]
        if pod.api_key is not None:
            sent.append(("Authorization", f"Bearer {pod.api_key}"))
        if session_id is not None and pod.takes_session_id:
            sent.append(("X-Session-ID", session_id))
        if pod.rank is not None:
            sent.append(("X-data-parallel-rank", str(pod.rank)))
        return sent

    async def open(
        self,
        pod: Pod,
        method: str,
        path: str,
        query: str,
        headers: list[tuple[str, str]],
        body: bytes | None,
    ) -> Answer:
        """Send a request and wait for the first byte of the answer. Raises `PodError`."""
        assert self._client is not None
        data = io.BytesIO(body) if body is not None and len(body) > 1 << 20 else body
        answer: Answer | None = None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                give_up = partial(limit.reschedule, loop.time())
                with Patience(pod, self.settings.first_byte_timeout_s, give_up):
                    response = await self._client.request(
                        method,
                        _url(pod.url, path, query),
                        data=data,
                        headers=headers,
                        allow_redirects=False,
                    )
                    answer = Answer(pod, response, self.settings.idle_timeout_s)
                    if not 200 <= response.status <= 599:
                        raise Dropped("failed", "its answer has a status that is none")
                    await answer.begin()
        except BaseException as error:
            if answer is not None:
                answer.close()
            if isinstance(error, TimeoutError) and limit.expired() and not pod.ready:
                raise Dropped("lost", "the pod was lost before the answer began") from None
            if isinstance(error, Exception):
                raise _pod_error(error) from error
            raise
        return answer


def _pod_error(error: Exception) -> PodError:
    match error:
        case PodError():
            return error
        case aiohttp.ConnectionTimeoutError():
            return Refused("connect_timeout", "the connection was not accepted in time")
        case aiohttp.ClientConnectorError():
            return Refused("refused", "the connection was refused")
        case TimeoutError():
            return TimedOut("first_byte_timeout", "no answer in time")
        case aiohttp.ClientError() | OSError():
            return Dropped("disconnected", "the connection broke before the answer began")
        case _:
            return Dropped("failed", "its connection failed")


class Answer:
    """A pod's answer whose first byte is there. `close` it on every exit."""

    def __init__(self, pod: Pod, response: aiohttp.ClientResponse, idle_timeout_s: float) -> None:
        self._pod = pod
        self._response = response
        self._idle_timeout_s = idle_timeout_s
        self.status = response.status
        self.event_stream = response.content_type == "text/event-stream"
        self.whole = False
        self._first = b""
        self._splice: Splice | None = None
        # A chunk that is not framed as one makes aiohttp close the connection without telling the
        # reader of the body, who would wait for ever.
        connection = response.connection
        protocol = connection.protocol if connection is not None else None
        self._lost = protocol.closed if protocol is not None else None
        if self._lost is not None:
            self._lost.add_done_callback(self._connection_lost)
            self._lost.remove_done_callback(_retrieve)
            self._lost.add_done_callback(_retrieve)  # once, and there when this answer is closed

    def _connection_lost(self, _: asyncio.Future[None]) -> None:
        content = self._response.content
        if not content.is_eof() and content.exception() is None:
            self._break(aiohttp.ClientPayloadError("the connection broke"))

    def _fell_silent(self) -> None:
        self._break(TimeoutError("the pod has gone silent"))

    def _break(self, error: Exception) -> None:
        self._response.content.set_exception(error)
        if self._splice is not None:
            self._splice.look()

    async def begin(self) -> None:
        """Wait for the first chunk, or for all of an answer that is handed on whole."""
        response = self._response
        length = response.content_length
        if not self.event_stream and (length or 0) <= MAX_WHOLE_BYTES:
            chunks: list[bytes] = []
            size = 0
            while chunk := await response.content.readany():
                chunks.append(chunk)
                if (size := size + len(chunk)) > MAX_WHOLE_BYTES:
                    break
            else:
                self.whole = True
            self._first = b"".join(chunks)
        else:
            self._first = await response.content.readany()

    async def pass_on(
        self,
        send: Send,
        extra: Sequence[tuple[bytes, bytes]] = (),
        observe: Callable[[bytes], None] | None = None,
        unobserved: Callable[[], None] | None = None,
        begun: bool = False,
        write: Callable[[bytes], bool] = cannot_write,
    ) -> None:
        """Give the client the answer; with ``begun`` without its headers, as they went out while
        the turn was held. ``write`` is a quicker way than ``send`` for what has more to come, and
        may be refused (`gateway.connection.WRITE`).

        ``observe`` sees a copy of each chunk; if it raises it is not called again, and
        ``unobserved`` is, once, within the handling of its exception. Raises `BrokenOffError` if
        the pod fails on the way; the client then has only whole events.
        """
        raw_headers = self._response.raw_headers
        drop = NOT_PASSED_BACK | nominated(raw_headers)
        if self.event_stream:
            drop |= {b"content-length"}  # an error event may have to follow
        headers = [(n, v) for n, v in raw_headers if n.lower() not in drop]
        headers.extend(extra)
        if not begun:
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
        chunk, self._first = self._first, b""
        if self.whole:
            await send({"type": "http.response.body", "body": chunk, "more_body": False})
            if observe is not None:
                observe(chunk)  # which only keeps it
            return
        content = self._response.content
        event_stream = self.event_stream
        held = b""

        def show(chunk: bytes) -> None:
            nonlocal observe
            if observe is not None:
                try:
                    observe(chunk)
                except Exception:
                    observe = None
                    if unobserved is not None:
                        unobserved()

        def passes(chunk: bytes) -> bool:
            if not chunk.endswith(EVENT_ENDS) or not write(chunk):
                return False
            show(chunk)
            patience.steps += 2
            return True

        if event_stream:
            self._splice = Splice.of(self._response, passes)
        try:
            with Patience(self._pod, self._idle_timeout_s, self._fell_silent) as patience:
                while chunk:
                    patience.steps += 1
                    if event_stream and (held or not chunk.endswith(EVENT_ENDS)):
                        ready, held = whole_events(held + chunk)
                    else:
                        ready = chunk
                    last = not held and content.at_eof()
                    if ready:
                        body = {"type": "http.response.body", "body": ready, "more_body": not last}
                        await send(body)
                    show(chunk)
                    patience.steps += 1
                    if last:
                        return
                    if self._splice is None or held:
                        chunk = await content.readany()
                    else:
                        chunk = await self._splice.next()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise BrokenOffError(type(error).__name__) from error
        await send({"type": "http.response.body", "body": held, "more_body": False})

    @property
    def body(self) -> bytes:
        """All of an answer that is `whole`, else what has come of it."""
        return self._first

    def close(self) -> None:
        """Give the connection back if the answer was read to its end, else cut it: the pod then
        aborts the request."""
        self._splice = None  # which refers to what refers to this
        if self._lost is not None:
            self._lost.remove_done_callback(self._connection_lost)
        if self._response.content.is_eof() and self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Patience:
    """Ends the wait for a pod that stays silent: after ``idle_s``, or after `LOST_S` if the pod is
    not ready any more (vLLM 0.32, ended by SIGTERM, may leave a stream open without another byte);
    up to `LOST_S` later, since one timer looks now and then.

    aiohttp's own timeout is set anew at each chunk and costs a stream a tenth of its CPU time.
    """

    LOST_S = 5.0

    def __init__(self, pod: Pod, idle_s: float, give_up: Callable[[], None]) -> None:
        self._pod = pod
        self._looks = max(1, round(idle_s / self.LOST_S))
        self._period_s = min(idle_s, self.LOST_S)
        self._give_up = give_up
        self._silent_looks = 0
        self._steps_seen = 0
        self.steps = 0
        """To be raised when the pod has said something, and again when the wait for it goes on:
        while the number is odd it is the client who is waited for."""

    def __enter__(self) -> Patience:
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._period_s, self._look)
        return self

    def _look(self) -> None:
        silent = self.steps == self._steps_seen and self.steps % 2 == 0
        self._silent_looks = self._silent_looks + 1 if silent else 0
        self._steps_seen = self.steps
        if self._silent_looks >= (self._looks if self._pod.ready else 1):
            self._give_up()
        else:
            self._timer = self._loop.call_later(self._period_s, self._look)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _retrieve(lost: asyncio.Future[None]) -> None:
    lost.exception()


def nominated(headers: HeaderList) -> frozenset[bytes]:
    """Names of the headers that ``Connection`` declares to be of this connection alone."""
    return frozenset(
        token.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for token in value.split(b",")
    )


def whole_events(data: bytes) -> tuple[bytes, bytes]:
    """Cut a piece of an event stream after its last whole event."""
    cut = data.rfind(b"\n\n") + 2
    crlf = data.rfind(b"\r\n\r\n") + 4
    if crlf > 3:
        cut = max(cut, crlf)
    if cut < 2 or len(data) - cut > MAX_HELD_BYTES:
        cut = len(data) if len(data) > MAX_HELD_BYTES else 0
    return data[:cut], data[cut:]


async def read_body(receive: Callable[[], Awaitable[Any]], limit_bytes: int) -> bytes:
    """The whole request body. Raises `GatewayError` 413 above the limit, and
    `ClientGoneError` if the client leaves meanwhile."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        chunks = [body]
        size = len(body)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunk = message.get("body", b"")
            chunks.append(chunk)
            size += len(chunk)
            if size > limit_bytes:
                raise too_large(limit_bytes)
            if not message.get("more_body", False):
                break
        body = b"".join(chunks)
    if len(body) > limit_bytes:
        raise too_large(limit_bytes)
    return body


def too_large(limit_bytes: int) -> GatewayError:
    return GatewayError(
        413,
        "request_too_large",
        f"The request body is larger than this gateway takes ({limit_bytes} bytes; the operator's "
        "setting is relay.max_body_bytes).",
    )


class ClientGoneError(Exception):
    """The client closed its connection."""


class Departure:
    """Cancels the current task when the client leaves, as a context manager.

    Inside, a client's disconnect raises `asyncio.CancelledError` at the next await; on exit it is
    turned into `ClientGoneError`. A cancellation from elsewhere (shutdown) stays what it is. The
    watch begins `WATCH_AFTER_S` after entry: most short turns end without the cost of a task.
    """

    WATCH_AFTER_S = 0.02

    def __init__(self, receive: Callable[[], Awaitable[Any]]) -> None:
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None
        self.gone = False

    async def __aenter__(self) -> Departure:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._start = asyncio.get_running_loop().call_later(self.WATCH_AFTER_S, self._begin)
        return self

    def _begin(self) -> None:
        self._watcher = asyncio.create_task(self._watch(), name="departure")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._task.cancel()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        self._start.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self.gone and self._task.uncancel() == 0 and exc_type is asyncio.CancelledError:
            raise ClientGoneError from None
