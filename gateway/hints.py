"""What a pod is told about a session: `kv_hints` envelopes (docs/hint-protocol.md).

Building them is pure; delivery is out of band and never on a turn's way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from itertools import count as counter
from secrets import token_hex
from typing import Any, Final, get_args

import aiohttp
import orjson

from engine_patch.endpoints import PATH, TOKEN_HEADER
from engine_patch.hints import ACTION_VERSIONS, MAX_ACTIONS, MAX_POINTS, PROTOCOL_VERSION, Status
from gateway.admission import GapForecast
from gateway.fleet.pod import Pod
from gateway.idle import IdleKind

logger = logging.getLogger("gateway.hints")

MAX_QUEUED: Final = 1_024
"""Hints that wait for one pod."""
GATHER_S: Final = 0.02
"""Hints wait this long for others to go with them: a request costs as much as many hints."""
_STATUSES: Final = frozenset(get_args(Status))

_WIRE_KIND: Final[dict[IdleKind, str]] = {
    "tool": "tool",
    "human": "human",
    "background": "tool",
    "ended": "ended",
}


def envelope(message_id: str, *actions: dict[str, Any]) -> dict[str, Any]:
    """A message of actions, numbered."""
    return {
        "protocol_version": PROTOCOL_VERSION,
        "message_id": message_id,
        "actions": [{"action_id": str(i), **action} for i, action in enumerate(actions)],
    }


def reuse(
    session_id: str, idle_kind: IdleKind, forecast: GapForecast | None, elapsed_s: float = 0.0
) -> dict[str, Any]:
    """`cachewise.reuse`: when the session will need its KV again. Without a forecast it will not
    (``ended``)."""
    ended = idle_kind == "ended" or forecast is None
    return {
        "action_type": "cachewise.reuse",
        "action_version": ACTION_VERSIONS["cachewise.reuse"],
        "payload": {
            "session_id": session_id,
            "idle_kind": "ended" if ended else _WIRE_KIND[idle_kind],
            "survival": []
            if forecast is None
            else [[t_s, p] for t_s, p in forecast.curve()][:MAX_POINTS],
            "p_return": 0.0 if ended or forecast is None else forecast.p_return,
            "elapsed_s": elapsed_s,
        },
    }


class HintSender:
    """Delivers hints to pods, out of band. Use as an async context manager.

    `send` only queues. One task a pod posts what has gathered, up to `MAX_ACTIONS` an envelope; a
    session's newer hint takes the place of its older one; beyond `MAX_QUEUED` the oldest is
    dropped. A hint that cannot be delivered is counted and given up: it would be stale.
    """

    def __init__(
        self, count: Callable[[str, int], None], token: str | None, timeout_s: float = 2.0
    ) -> None:
        self._count = count
        self._token = token
        self._timeout_s = timeout_s
        self._queues: dict[str, OrderedDict[str, dict[str, Any]]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._client: aiohttp.ClientSession | None = None
        self._origin = token_hex(6)
        self._messages = counter()

    async def __aenter__(self) -> HintSender:
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0, ttl_dns_cache=10),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
            self._client = None

    def queued(self, pod: str) -> int:
        """Hints that wait to be sent to the pod."""
        return len(self._queues.get(pod, ()))

    def send(self, pod: Pod, action: dict[str, Any]) -> None:
        """Queue a `reuse` action for the pod, if it takes hints. Never blocks."""
        if self._client is None or not pod.ready or not pod.takes_hints:
            return
        queue = self._queues.setdefault(pod.name, OrderedDict())
        sid = action["payload"]["session_id"]
        queue[sid] = action
        queue.move_to_end(sid)
        if len(queue) > MAX_QUEUED:
            queue.popitem(last=False)
            self._count("dropped", 1)
        if pod.name not in self._tasks:
            self._tasks[pod.name] = asyncio.create_task(self._drain(pod), name=f"hints {pod.name}")

    def forget(self, pod: Pod) -> None:
        """The pod has left: what waits for it is dropped."""
        queue = self._queues.pop(pod.name, None)
        if queue:
            self._count("dropped", len(queue))
            queue.clear()

    async def _drain(self, pod: Pod) -> None:
        queue = self._queues[pod.name]
        try:
            while queue:
                await asyncio.sleep(GATHER_S)
                batch = [queue.popitem(last=False)[1] for _ in range(min(len(queue), MAX_ACTIONS))]
                try:
                    statuses = await self._post(pod, batch)
                except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as error:
                    logger.debug("hints to pod %s failed: %s", pod.name, type(error).__name__)
                    self._count("failed", len(batch))
                else:
                    for status, number in Counter(statuses).items():
                        self._count(status, number)
        finally:
            del self._tasks[pod.name]

    async def _post(self, pod: Pod, batch: list[dict[str, Any]]) -> list[str]:
        assert self._client is not None
        headers = {"Content-Type": "application/json"}
        if pod.api_key is not None:
            headers["Authorization"] = f"Bearer {pod.api_key}"
        if self._token is not None:
            headers[TOKEN_HEADER] = self._token
        message = envelope(f"{self._origin}-{next(self._messages)}", *batch)
        async with self._client.post(
            pod.url + PATH, data=orjson.dumps(message), headers=headers, allow_redirects=False
        ) as response:
            if response.status != 200:
                return ["failed"] * len(batch)
            results = orjson.loads(await response.read())["results"]
        found = [result["status"] for result in results]
        return [status if status in _STATUSES else "failed" for status in found]
