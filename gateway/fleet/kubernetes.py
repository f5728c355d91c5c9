"""Pods by the Kubernetes API: EndpointSlices of a Service, pods of a label selector, or both.

Each kind is listed once and then watched from the list's version on. A watch that ends is taken up
where it ended (bookmarks keep that place fresh); one whose place the server has forgotten (410
Gone) starts with a new list. What is told to the fleet is always computed from all objects known,
so that duplicates and the order between the two watches do not matter; within a kind, an event
older than what is known of its object is passed over.

It needs `list` and `watch` on the kinds it is told to use, in one namespace, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import warnings
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Generic, Never, TypeVar

import httpx
import orjson

from gateway.config import ConfigError
from gateway.fleet.discovery import Found

try:
    import kr8s
    import kr8s.asyncio
except ImportError:
    raise ConfigError(
        "discovery.kind: 'kubernetes' needs a client that is not installed; allowed: static, dns,"
        " or kubernetes after pip install 'cachewise-gateway[kubernetes]'"
    ) from None

logger = logging.getLogger("gateway.fleet")

DEFAULT_PORT: Final = 8000
SERVICE_LABEL: Final = "kubernetes.io/service-name"
ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PAGE: Final = 500
WATCH_S: Final = 120
"""A watch is asked to end after this long; one silent for longer is dead."""
REQUEST_S: Final = 15.0
BACKOFF_S: Final = (0.25, 20.0)
MAX_LINE_BYTES: Final = 16 * 1024 * 1024
MAX_GRAVES: Final = 4096

Json = Mapping[str, Any]
T = TypeVar("T")


class GoneError(Exception):
    """The version to go on from is no longer kept by the server."""


class AnswerError(Exception):
    """The server's answer cannot be used."""


@dataclass(frozen=True, slots=True)
class Known(Generic[T]):
    """An object of the API, reduced to what is read of it."""

    uid: str
    version: str
    value: T


class Collection(Generic[T]):
    """The objects of one kind by name, kept as the server has them.

    ``read`` reduces an object; ``changed`` is called after each change, not before the first list
    is complete.
    """

    def __init__(
        self,
        api: kr8s.asyncio.Api,
        version: str,
        plural: str,
        namespace: str,
        selector: str,
        read: Callable[[Json], T],
        changed: Callable[[], None],
    ) -> None:
        self.objects: dict[str, Known[T]] = {}
        self.synced = False
        self.failures = 0
        self._api = api
        self._version_of_api = version
        self._namespace = namespace
        self.plural = plural
        self._selector = selector
        self._read = read
        self._changed = changed
        self._version: str | None = None
        self._graves: OrderedDict[str, str] = OrderedDict()
        """Identities deleted since the last list, and at which version: a late event does not bring
        them back."""
        self._failed = False

    async def run(self) -> Never:
        """List, then watch, whatever happens."""
        low_s, high_s = BACKOFF_S
        backoff_s = low_s
        loop = asyncio.get_running_loop()
        while True:
            began_at = loop.time()
            try:
                if self._version is None:
                    await self._list()
                await self._watch()
                self._well()
                if loop.time() - began_at > 1:
                    backoff_s = low_s
                    continue
            except GoneError:
                self._version = None
            except Exception as error:
                self._unwell(error)
            if loop.time() - began_at > high_s:
                backoff_s = low_s
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1))
            backoff_s = min(2 * backoff_s, high_s)

    def _ask(
        self, params: dict[str, str | int], timeout: httpx.Timeout | float, stream: bool = False
    ) -> AbstractAsyncContextManager[httpx.Response]:
        return self._api.call_api(
            "GET",
            version=self._version_of_api,
            namespace=self._namespace,
            url=self.plural,
            stream=stream,
            params=params,
            timeout=timeout,
        )

    def _unwell(self, error: Exception) -> None:
        self.failures += 1
        if not self._failed:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            logger.warning("Kubernetes: %s cannot be watched: %s", self.plural, reason)
        self._failed = True

    def _well(self) -> None:
        if self._failed:
            logger.info("Kubernetes: %s can be watched again", self.plural)
        self._failed = False

    async def _list(self) -> None:
        objects: dict[str, Known[T]] = {}
        params: dict[str, str | int] = {"labelSelector": self._selector, "limit": PAGE}
        while True:
            try:
                async with self._ask(params, REQUEST_S) as response:
                    page = response.json()
            except kr8s.ServerError as error:
                raise _gone_or(error) from error
            except ValueError:
                raise AnswerError("the list is not JSON") from None
            try:
                meta = page["metadata"]
                for item in page.get("items") or ():
                    self._enter(objects, item)
                version = meta["resourceVersion"]
            except (KeyError, TypeError, AttributeError):
                raise AnswerError("what was answered is no list") from None
            if not meta.get("continue"):
                break
            params["continue"] = meta["continue"]
        self.objects = objects
        self._graves.clear()
        self._version = version
        self.synced = True
        self._well()
        self._changed()

    def _enter(self, objects: dict[str, Known[T]], item: Json) -> None:
        meta = item["metadata"]
        try:
            value = self._read(item)
        except (KeyError, TypeError, AttributeError, ValueError):
            logger.warning("Kubernetes: %s %s is not read", self.plural, meta["name"])
            return
        objects[meta["name"]] = Known(meta["uid"], meta["resourceVersion"], value)

    async def _watch(self) -> None:
        params: dict[str, str | int] = {
            "labelSelector": self._selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version or "",
            "timeoutSeconds": WATCH_S,
        }
        timeout = httpx.Timeout(REQUEST_S, read=WATCH_S + REQUEST_S)
        try:
            async with self._ask(params, timeout, stream=True) as response:
                async for line in _lines(response):
                    try:
                        event = orjson.loads(line)
                        self._take(event["type"], event["object"])
                    except (ValueError, KeyError, TypeError):
                        raise AnswerError("an event of the watch is malformed") from None
                    self._well()
        except kr8s.ServerError as error:
            raise _gone_or(error) from error

    def _take(self, kind: str, item: Json) -> None:
        if kind == "ERROR":
            if item.get("code") == httpx.codes.GONE:
                raise GoneError
            raise AnswerError(str(item.get("message")))
        meta = item["metadata"]
        version = meta["resourceVersion"]
        if self._version is None or not _older(version, self._version):
            self._version = version
        if kind == "BOOKMARK":
            return
        name, uid = meta["name"], meta["uid"]
        known = self.objects.get(name)
        if kind == "DELETED":  # or its labels do not match any more: then it may come back
            self._graves[uid] = version
            while len(self._graves) > MAX_GRAVES:
                self._graves.popitem(last=False)
            if known is None or known.uid != uid:
                return
            del self.objects[name]
        elif kind in ("ADDED", "MODIFIED"):
            past = (self._graves.get(uid), known.version if known is not None else None)
            if any(last and (version == last or _older(version, last)) for last in past):
                return
            self._graves.pop(uid, None)
            self._enter(self.objects, item)
        else:
            return
        self._changed()


def _older(version: str, other: str) -> bool:
    """Whether a resource version comes before another. Kubernetes 1.35 fixes that they are numbers
    that rise; before, and on servers where they are not, the order of arrival stands."""
    return version.isdecimal() and other.isdecimal() and int(version) < int(other)


def _gone_or(error: kr8s.ServerError) -> Exception:
    status = error.response.status_code if error.response is not None else None
    return GoneError() if status == httpx.codes.GONE else error


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Whole lines. (httpx's own splits at characters that JSON may hold.)"""
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line.strip():
                yield line
        if len(rest) > MAX_LINE_BYTES:
            raise AnswerError("an event of the watch is too long")


@dataclass(frozen=True, slots=True)
class PodObject:
    """What is read of a Pod."""

    name: str
    uid: str
    address: str | None
    container: str | None
    """Id of the engine's container; it changes at each start."""
    ready: bool
    leaving: bool

    @property
    def start(self) -> str | None:
        return f"{self.uid}/{self.container}" if self.container else None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is read of one endpoint of an EndpointSlice."""

    pod: str | None
    uid: str | None
    address: str
    serving: bool
    leaving: bool


@dataclass(frozen=True, slots=True)
class Slice:
    family: str
    ports: tuple[int, ...]
    endpoints: tuple[Endpoint, ...]


def read_pod(item: Json) -> PodObject:
    """A Pod. The engine's container is the first, by Kubernetes' order of the specification."""
    meta = item["metadata"]
    status = item.get("status") or {}
    over = status.get("phase") in ("Succeeded", "Failed")
    first = item["spec"]["containers"][0]["name"]
    containers = {c["name"]: c.get("containerID") for c in status.get("containerStatuses") or ()}
    ready = any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in status.get("conditions") or ()
    )
    return PodObject(
        name=meta["name"],
        uid=meta["uid"],
        address=None if over else status.get("podIP") or None,
        container=containers.get(first) or None,
        ready=ready,
        leaving=meta.get("deletionTimestamp") is not None,
    )


def read_slice(item: Json) -> Slice:
    """An EndpointSlice. Its ports are those named `http…`, or the only one; several are the ranks
    of a pod that gives each a port of its own."""
    ports = [p for p in item.get("ports") or () if p.get("port") and p.get("protocol") != "UDP"]
    named = [p for p in ports if str(p.get("name") or "").startswith("http")]
    endpoints = []
    for endpoint in item.get("endpoints") or ():
        conditions = endpoint.get("conditions") or {}
        ready, serving = conditions.get("ready"), conditions.get("serving")
        target = endpoint.get("targetRef") or {}
        is_pod = target.get("kind") == "Pod"
        endpoints.append(
            Endpoint(
                pod=target.get("name") if is_pod else None,
                uid=target.get("uid") if is_pod else None,
                address=endpoint["addresses"][0],
                # Not given means true; `ready` is false of whatever terminates.
                serving=serving if serving is not None else ready is not False,
                leaving=conditions.get("terminating") is True,
            )
        )
    return Slice(
        family=item["addressType"],
        ports=tuple(sorted(p["port"] for p in named or ports[:1])),
        endpoints=tuple(endpoints),
    )


class KubernetesDiscovery:
    """EndpointSlices of ``service`` and pods of ``selector``, whichever is given; with both, an
    endpoint counts while its pod matches, and the pod says when it was started anew.

    ``port`` overrides the ports that the slices name.
    """

    def __init__(
        self,
        *,
        service: str | None,
        selector: str | None,
        namespace: str | None,
        port: int | None,
        scheme: str,
    ) -> None:
        if not _credentials():
            raise ConfigError(
                "discovery.kind: 'kubernetes' finds no cluster; allowed: in a pod with a service"
                " account's token, or where KUBECONFIG or ~/.kube/config names a cluster"
            )
        self.service = service
        self.selector = selector
        self.namespace = namespace
        self.port = port
        self.scheme = scheme
        self._refused = 0
        self.slices: Collection[Slice] | None = None
        self.pods: Collection[PodObject] | None = None

    @property
    def failures(self) -> int:
        return self._refused + sum(kind.failures for kind in self._kinds)

    @property
    def _kinds(self) -> list[Collection[Any]]:
        return [kind for kind in (self.slices, self.pods) if kind is not None]

    async def run(self, found: Callable[[Sequence[Found]], None]) -> Never:
        """See `Discovery.run`."""
        api = await self._connect()
        namespace = self.namespace or _own_namespace() or api.namespace
        last: list[Found] | None = None

        def changed() -> None:
            nonlocal last
            if all(kind.synced for kind in self._kinds):
                now = self.snapshot()
                if now != last:
                    last = now
                    found(now)

        if self.service is not None:
            self.slices = Collection(
                api,
                "discovery.k8s.io/v1",
                "endpointslices",
                namespace,
                f"{SERVICE_LABEL}={self.service}",
                read_slice,
                changed,
            )
        if self.selector is not None:
            self.pods = Collection(api, "v1", "pods", namespace, self.selector, read_pod, changed)
        async with asyncio.TaskGroup() as tasks:
            for kind in self._kinds:
                tasks.create_task(kind.run())
        raise AssertionError("a collection never ends")

    async def _connect(self) -> kr8s.asyncio.Api:
        backoff_s, high_s = BACKOFF_S
        while True:
            try:
                with warnings.catch_warnings(
                    action="ignore"
                ):  # on a newer Kubernetes than it knows
                    api = await kr8s.asyncio.api()
            except Exception as error:
                self._refused += 1
                if self._refused == 1:
                    logger.warning("Kubernetes: no way to the API: %s", error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, high_s)
            else:
                return api

    def snapshot(self) -> list[Found]:
        """All pods, from the objects known."""
        if self.slices is None:
            assert self.pods is not None
            pods = sorted((known.value for known in self.pods.objects.values()), key=_name)
            return [
                self._found(pod.name, pod.address, port, pod)
                for pod in pods
                if pod.address is not None
                for port in (self.port or DEFAULT_PORT,)
            ]
        seen: dict[str, Found] = {}
        slices = sorted((k.value for k in self.slices.objects.values()), key=lambda s: s.family)
        for part in slices:
            ports = (self.port,) if self.port is not None else part.ports or (DEFAULT_PORT,)
            for endpoint in part.endpoints:
                for one in self._endpoint(endpoint, ports):
                    other = seen.get(one.name)
                    seen[one.name] = one if other is None else _merged(other, one)
        return sorted(seen.values(), key=_name)

    def _endpoint(self, endpoint: Endpoint, ports: Sequence[int]) -> Iterable[Found]:
        pod = None
        if self.pods is not None:
            known = self.pods.objects.get(endpoint.pod or "")
            if known is None or known.uid != endpoint.uid:
                return  # not selected, or the one watch is ahead of the other
            pod = known.value
        name = endpoint.pod or endpoint.address
        for port in ports:
            one = self._found(
                name if len(ports) == 1 else f"{name}:{port}", endpoint.address, port, pod
            )
            yield replace(
                one,
                start=one.start if pod is not None else endpoint.uid,
                serving=endpoint.serving and one.serving,
                leaving=endpoint.leaving or one.leaving,
            )

    def _found(self, name: str, address: str, port: int, pod: PodObject | None) -> Found:
        host = f"[{address}]" if ":" in address else address
        url = f"{self.scheme}://{host}:{port}"
        if pod is None:
            return Found(name, url)
        return Found(name, url, start=pod.start, serving=pod.ready, leaving=pod.leaving)


def _merged(one: Found, other: Found) -> Found:
    """A pod told of by two slices: while it moves between them, or by its two address families. The
    first address stands; what either knows of its end holds."""
    if one.url != other.url:
        return other if one.leaving and not other.leaving else one
    return replace(one, serving=one.serving or other.serving, leaving=one.leaving and other.leaving)


def _name(one: Found | PodObject) -> str:
    return one.name


def _credentials() -> bool:
    """Whether there is a service account's token or a kubeconfig."""
    config = os.environ.get("KUBECONFIG", "~/.kube/config")
    files = [Path(file).expanduser() for file in config.split(os.pathsep)]
    return (ACCOUNT / "token").is_file() or any(file.is_file() for file in files)


def _own_namespace() -> str | None:
    try:
        return (ACCOUNT / "namespace").read_text().strip()
    except OSError:
        return None
