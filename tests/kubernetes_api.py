"""A Kubernetes API server on loopback, as far as list and watch go.

It keeps objects under one rising resource version and a log of events; a watch sends the events
after the version it asks for as chunked JSON lines, then what happens next. What the log no longer
holds is 410 Gone, in the answer's status or as an ERROR event, as the real server does.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

Object = dict[str, Any]


def pod(
    name: str,
    ip: str | None = "10.0.0.1",
    *,
    labels: dict[str, str] | None = None,
    container: str | None = "containerd://1",
    ready: bool = True,
    deleting: bool = False,
    phase: str = "Running",
) -> Object:
    """A Pod as the API gives it, with an engine and a sidecar."""
    meta: Object = {"name": name, "labels": labels if labels is not None else {"app": "vllm"}}
    if deleting:
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    statuses = [{"name": "sidecar", "containerID": "containerd://sidecar"}]
    if container is not None:
        statuses.append({"name": "vllm", "containerID": container})
    return {
        "metadata": meta,
        "spec": {"containers": [{"name": "vllm"}, {"name": "sidecar"}]},
        "status": {
            "phase": phase,
            **({"podIP": ip} if ip else {}),
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": statuses,
        },
    }


def endpoint(
    address: str,
    pod_name: str | None = None,
    uid: str | None = None,
    *,
    ready: bool | None = True,
    serving: bool | None = True,
    terminating: bool | None = False,
) -> Object:
    found: Object = {
        "addresses": [address],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
    }
    if pod_name is not None:
        found["targetRef"] = {"kind": "Pod", "name": pod_name, "uid": uid}
    return found


def slice_of(
    name: str,
    *endpoints: Object,
    service: str = "vllm",
    ports: list[Object] | None = None,
    family: str = "IPv4",
) -> Object:
    """An EndpointSlice; without endpoints its list is null, as Go writes it."""
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": list(endpoints) or None,
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}] if ports is None else ports,
    }


NOT_OBJECTS = ("ERROR", "BOOKMARK")


@dataclass(eq=False)
class Watch:
    """One open watch. Of its lines, an empty one ends it well and None cuts the connection."""

    plural: str
    selector: dict[str, str]
    lines: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)

    def tell(self, kind: str, item: Object) -> None:
        self.lines.put_nowait(
            json.dumps({"type": kind, "object": item}, ensure_ascii=False).encode() + b"\n"
        )


class ApiServer:
    """Namespace ``fleet`` of a cluster. Collections: ``pods`` and ``endpointslices``."""

    TOKEN = "a-service-account-token"

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Object]] = {"pods": {}, "endpointslices": {}}
        self.log: list[tuple[int, str, str, Object]] = []
        self.version = 100
        self.compacted = 0
        """Events up to this version are forgotten."""
        self.gone_by_event = True
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.forbidden: set[str] = set()
        self.broken = False
        """Answer everything with 500."""
        self.page: int | None = None
        """Give lists in pages of this size at the most."""
        self.url = ""
        self._uids = count(1)
        self._watches: list[Watch] = []
        self.opened: Counter[str] = Counter()
        """Watches so far, by collection; one that its client left may be served a little longer."""

    # -- what happens in the cluster ---------------------------------------------------------------

    def put(self, plural: str, item: Object, *, uid: str | None = None) -> Object:
        """Create or replace an object; a replaced one keeps its uid unless another is given."""
        name = item["metadata"]["name"]
        known = self.objects[plural].get(name)
        self.version += 1
        keep = known["metadata"]["uid"] if known is not None else f"uid-{next(self._uids)}"
        meta = {
            **item["metadata"],
            "namespace": "fleet",
            "uid": uid or keep,
            "resourceVersion": str(self.version),
        }
        item = {**item, "metadata": meta}
        self.objects[plural][name] = item
        self._happen("ADDED" if known is None else "MODIFIED", plural, item)
        return item

    def delete(self, plural: str, name: str) -> Object:
        self.version += 1
        item = self.objects[plural].pop(name)
        meta = {**item["metadata"], "resourceVersion": str(self.version)}
        item = {**item, "metadata": meta}
        self._happen("DELETED", plural, item)
        return item

    def _happen(self, kind: str, plural: str, item: Object) -> None:
        self.log.append((self.version, kind, plural, item))
        self.say(plural, kind, item)

    def say(self, plural: str, kind: str, item: Object) -> None:
        """An event to every watch of the kind, whether it happened or not."""
        for watch in self._watches:
            if watch.plural == plural and (kind in NOT_OBJECTS or matches(watch.selector, item)):
                watch.tell(kind, item)

    def bookmark(self, plural: str) -> None:
        """What a watch is told when nothing happens: how far the server is. As the server does, the
        rest of the object is its empty form."""
        empty = {"spec": {"containers": None}, "status": {}} if plural == "pods" else {}
        meta = {"resourceVersion": str(self.version), "creationTimestamp": None}
        self.say(plural, "BOOKMARK", {"metadata": meta, **empty})

    def raw(self, plural: str, data: bytes) -> None:
        """Bytes into the stream of every watch of the kind."""
        for watch in self._watches:
            if watch.plural == plural:
                watch.lines.put_nowait(data)

    def drop_watches(self) -> None:
        """Cut every watch as a broken connection does."""
        for watch in self._watches:
            watch.lines.put_nowait(None)

    def compact(self) -> None:
        """Forget all events so far."""
        self.compacted = self.version

    def watching(self, plural: str) -> int:
        return sum(watch.plural == plural for watch in self._watches)

    def lists(self, plural: str) -> int:
        return sum(p == plural and "watch" not in query for p, query in self.requests)

    def watches(self, plural: str) -> list[dict[str, str]]:
        return [query for p, query in self.requests if p == plural and "watch" in query]

    # -- the protocol ------------------------------------------------------------------------------

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        plural, query = request.match_info["plural"], dict(request.query)
        self.requests.append((plural, query))
        if self.broken:
            return web.json_response({"kind": "Status", "message": "etcd is away"}, status=500)
        if request.headers.get("Authorization") != f"Bearer {self.TOKEN}":
            return _status(401, "Unauthorized")
        if plural in self.forbidden:
            return _status(403, f"{plural} is forbidden")
        selector = dict(p.split("=") for p in query.get("labelSelector", "").split(",") if p)
        if query.get("watch") != "true":
            return self._list(plural, selector, query)
        after = int(query["resourceVersion"])
        if after < self.compacted and not self.gone_by_event:
            return _status(410, "too old resource version")
        stream = web.StreamResponse(headers={"Content-Type": "application/json"})
        stream.enable_chunked_encoding()
        await stream.prepare(request)
        watch = Watch(plural, selector)
        if after < self.compacted:
            gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
            watch.tell("ERROR", gone)
            watch.lines.put_nowait(b"")
        for version, kind, of, item in self.log:
            if of == plural and version > max(after, self.compacted) and matches(selector, item):
                watch.tell(kind, item)
        self._watches.append(watch)
        self.opened[plural] += 1
        try:
            async with asyncio.timeout(int(query["timeoutSeconds"])):
                while line := await watch.lines.get():
                    await stream.write(line)
                if line is None and request.transport is not None:
                    request.transport.abort()
        except TimeoutError:
            pass
        finally:
            self._watches.remove(watch)
        return stream

    def _list(self, plural: str, selector: dict[str, str], query: dict[str, str]) -> web.Response:
        found = [item for item in self.objects[plural].values() if matches(selector, item)]
        at = int(query.get("continue", 0))
        size = min(int(query.get("limit", 500)), self.page or 500)
        meta = {"resourceVersion": str(self.version)}
        if at + size < len(found):
            meta["continue"] = str(at + size)
        kind = {"pods": "PodList", "endpointslices": "EndpointSliceList"}[plural]
        return web.json_response({"kind": kind, "metadata": meta, "items": found[at : at + size]})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ApiServer]:
        async def version(_: web.Request) -> web.Response:
            return web.json_response({"major": "1", "minor": "35", "gitVersion": "v1.35.0"})

        app = web.Application()
        app.router.add_get("/version/", version)
        app.router.add_get("/api/v1/namespaces/fleet/{plural:pods}", self._answer)
        app.router.add_get(
            "/apis/discovery.k8s.io/v1/namespaces/fleet/{plural:endpointslices}", self._answer
        )
        runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self.drop_watches()
            await runner.cleanup()

    def kubeconfig(self, file: Path) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [
                {
                    "name": "test",
                    "context": {"cluster": "test", "user": "test", "namespace": "fleet"},
                }
            ],
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": self.TOKEN}}],
        }
        file.write_text(yaml.safe_dump(config))
        return file


def matches(selector: dict[str, str], item: Object) -> bool:
    labels = item["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in selector.items())


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)
