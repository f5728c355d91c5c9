"""Discovery by the Kubernetes API, against a server that speaks its list and watch."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import ConfigError, DiscoverySettings
from gateway.fleet import kubernetes
from gateway.fleet.discovery import Found, discovery
from gateway.fleet.kubernetes import Collection, KubernetesDiscovery
from tests.kubernetes_api import ApiServer, endpoint, pod, slice_of
from tests.served import until


class Seen:
    """What discovery told, each time."""

    def __init__(self) -> None:
        self.all: list[list[Found]] = []

    @property
    def names(self) -> list[str]:
        return [found.name for found in self.all[-1]] if self.all else []

    def __getitem__(self, name: str) -> Found:
        return next(found for found in self.all[-1] if found.name == name)

    async def shows(self, *names: str) -> None:
        await until(lambda: bool(self.all) and self.names == list(names), 5)


Discover = Callable[..., Any]


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    monkeypatch.setattr(kubernetes, "BACKOFF_S", (0.01, 0.05))
    async with ApiServer().serving() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "config")))
        yield server


@asynccontextmanager
async def discovering(**settings: Any) -> AsyncIterator[tuple[Seen, KubernetesDiscovery]]:
    given = {"service": None, "selector": None, "namespace": None, "port": None, "scheme": "http"}
    source = KubernetesDiscovery(**(given | settings))
    seen = Seen()
    task = asyncio.create_task(source.run(lambda found: seen.all.append(list(found))))
    try:
        yield seen, source
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def watched(api: ApiServer, plural: str = "pods") -> None:
    await until(lambda: api.watching(plural) == 1, 5)


async def test_pods_of_a_selector_come_and_go(api: ApiServer) -> None:
    api.put("pods", pod("a", "10.0.0.1"))
    api.put("pods", pod("other", "10.0.0.9", labels={"app": "db"}))
    async with discovering(selector="app=vllm", port=9000) as (seen, _):
        await seen.shows("a")
        assert seen["a"].url == "http://10.0.0.1:9000"
        await watched(api)
        api.put("pods", pod("b", "fd00::2"))
        await seen.shows("a", "b")
        assert seen["b"].url == "http://[fd00::2]:9000"
        api.delete("pods", "a")
        await seen.shows("b")
        api.put("pods", pod("b", "fd00::2", labels={"app": "other"}))
        api.say(
            "pods",
            "DELETED",
            api.objects["pods"]["b"]
            | {"metadata": {**api.objects["pods"]["b"]["metadata"], "labels": {"app": "vllm"}}},
        )
        await seen.shows()
        api.put("pods", pod("b", "fd00::2"))  # its labels match again: the same pod is back
        await seen.shows("b")


async def test_a_pod_without_an_address_or_that_is_over_is_none(api: ApiServer) -> None:
    api.put("pods", pod("pending", None, container=None, phase="Pending"))
    api.put("pods", pod("done", phase="Succeeded"))
    async with discovering(selector="app=vllm") as (seen, _):
        await until(lambda: bool(seen.all))
        assert seen.all == [[]]


async def test_readiness_and_deletion_are_told(api: ApiServer) -> None:
    api.put("pods", pod("a", ready=False))
    async with discovering(selector="app=vllm") as (seen, _):
        await seen.shows("a")
        assert (seen["a"].serving, seen["a"].leaving) == (False, False)
        await watched(api)
        api.put("pods", pod("a"))
        await until(lambda: seen["a"].serving)
        api.put("pods", pod("a", deleting=True))
        await until(lambda: seen["a"].leaving)


async def test_a_restart_of_the_engine_and_not_of_a_sidecar_is_another_start(
    api: ApiServer,
) -> None:
    api.put("pods", pod("a", container=None))
    async with discovering(selector="app=vllm") as (seen, _):
        await seen.shows("a")
        assert seen["a"].start is None
        await watched(api)
        api.put("pods", pod("a", container="containerd://1"))
        await until(lambda: seen["a"].start is not None)
        first = seen["a"].start
        changed = pod("a", container="containerd://1", ready=False)
        changed["status"]["containerStatuses"][0]["containerID"] = "containerd://sidecar-2"
        api.put("pods", changed)
        await until(lambda: not seen["a"].serving)
        assert seen["a"].start == first
        api.put("pods", pod("a", container="containerd://2"))
        await until(lambda: seen["a"].serving)
        assert seen["a"].start != first
        second = seen["a"].start
        api.put("pods", pod("a", container="containerd://2", ready=False), uid="uid-new")
        await until(lambda: not seen["a"].serving)
        assert seen["a"].start not in (first, second)


async def test_long_lists_come_in_pages(api: ApiServer) -> None:
    api.page = 2
    for number in range(5):
        api.put("pods", pod(f"p{number}", f"10.0.0.{number + 1}"))
    async with discovering(selector="app=vllm") as (seen, _):
        await seen.shows("p0", "p1", "p2", "p3", "p4")
        assert api.lists("pods") == 3
        assert len(seen.all) == 1


async def test_a_dropped_watch_is_taken_up_where_it_ended(api: ApiServer) -> None:
    api.put("pods", pod("a", "10.0.0.1"))
    async with discovering(selector="app=vllm") as (seen, _):
        await seen.shows("a")
        await watched(api)
        api.put("pods", pod("b", "10.0.0.2"))
        await seen.shows("a", "b")
        at = str(api.version)
        api.drop_watches()
        await until(lambda: api.watching("pods") == 0)
        api.put("pods", pod("c", "10.0.0.3"))
        await seen.shows("a", "b", "c")
        assert api.watches("pods")[-1]["resourceVersion"] == at
        assert api.lists("pods") == 1


async def test_bookmarks_are_asked_for_and_keep_the_place_fresh(api: ApiServer) -> None:
    api.put("pods", pod("a"))
    async with discovering(selector="app=vllm") as (seen, source):
        await seen.shows("a")
        await watched(api)
        assert api.watches("pods")[0]["allowWatchBookmarks"] == "true"
        api.version += 50  # other kinds change
        api.bookmark("pods")
        assert source.pods is not None
        await until(lambda: source.pods._version == str(api.version))  # type: ignore[union-attr]
        api.compact()
        api.drop_watches()
        await until(lambda: len(api.watches("pods")) == 2)
        await watched(api)
        assert api.lists("pods") == 1
        assert len(seen.all) == 1


@pytest.mark.parametrize("by_event", [True, False])
async def test_a_place_that_is_gone_starts_a_new_list(api: ApiServer, by_event: bool) -> None:
    api.gone_by_event = by_event
    api.put("pods", pod("a", "10.0.0.1"))
    api.put("pods", pod("b", "10.0.0.2"))
    async with discovering(selector="app=vllm") as (seen, _):
        await seen.shows("a", "b")
        await watched(api)
        api.drop_watches()
        await until(lambda: api.watching("pods") == 0)
        api.delete("pods", "a")
        api.put("pods", pod("c", "10.0.0.3"))
        api.compact()
        await seen.shows("b", "c")
        assert api.lists("pods") == 2
        await watched(api)
        api.put("pods", pod("d", "10.0.0.4"))
        await seen.shows("b", "c", "d")


async def test_duplicates_and_late_events_change_nothing(api: ApiServer) -> None:
    old = api.put("pods", pod("a", "10.0.0.1", ready=False))
    async with discovering(selector="app=vllm") as (seen, _):
        await seen.shows("a")
        await watched(api)
        new = api.put("pods", pod("a", "10.0.0.1"))
        await until(lambda: seen["a"].serving)
        told = len(seen.all)
        for item in (new, old):
            api.say("pods", "MODIFIED", item)
            api.say("pods", "ADDED", item)
        gone = api.delete("pods", "a")
        await seen.shows()
        for kind, item in (("MODIFIED", new), ("DELETED", gone), ("ADDED", old)):
            api.say("pods", kind, item)
        again = api.put("pods", pod("a", "10.0.0.5"), uid="uid-again")
        await seen.shows("a")
        api.say("pods", "DELETED", gone)
        api.put("pods", pod("z", "10.0.0.6"))
        await seen.shows("a", "z")
        assert seen["a"].start == f"{again['metadata']['uid']}/containerd://1"
        assert len(seen.all) == told + 3


async def test_malformed_events_are_survived(api: ApiServer) -> None:
    api.put("pods", pod("a", "10.0.0.1"))
    async with discovering(selector="app=vllm") as (seen, source):
        await seen.shows("a")
        for number, bad in enumerate(
            (b"not json\n", b'{"type": "ADDED"}\n', b"[]\n", b'{"type":"ERROR","object":{}}\n'), 1
        ):
            await until(lambda n=number: api.opened["pods"] == n)  # type: ignore[misc]
            api.raw("pods", bad)
            await until(lambda n=number: source.failures == n)  # type: ignore[misc]
        await until(lambda: api.opened["pods"] == 5)
        api.raw("pods", b"\n")
        api.raw("pods", b'{"type":"NEW_KIND","object":{"metadata":{"name":"x","uid":"u",')
        api.raw("pods", b'"resourceVersion":"1"}}}\n')
        broken = pod("b", "10.0.0.2")
        broken["spec"]["containers"] = []
        api.put("pods", broken)
        api.put("pods", pod("c", "10.0.0.3") | {"note": "\u0085 \u2028"})
        await seen.shows("a", "c")
        assert api.lists("pods") == 1


async def test_what_is_known_stands_while_the_server_is_away(
    api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    api.put("pods", pod("a", "10.0.0.1"))
    async with discovering(selector="app=vllm") as (seen, source):
        await seen.shows("a")
        await watched(api)
        api.broken = True
        api.drop_watches()
        await until(lambda: source.failures > 3)
        assert seen.names == ["a"]
        api.put("pods", pod("b", "10.0.0.2"))
        api.broken = False
        await seen.shows("a", "b")
    said = [r.getMessage() for r in caplog.records if r.name == "gateway.fleet"]
    assert sum("cannot be watched" in line for line in said) == 1
    assert ApiServer.TOKEN not in caplog.text


async def test_what_it_may_not_read_is_said_and_tried_again(
    api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    api.forbidden = {"pods"}
    api.put("pods", pod("a", "10.0.0.1"))
    async with discovering(selector="app=vllm") as (seen, source):
        await until(lambda: source.failures > 0)
        assert "pods is forbidden" in caplog.text
        assert not seen.all
        api.forbidden = set()
        await seen.shows("a")


async def test_endpoints_of_a_service(api: ApiServer) -> None:
    api.put(
        "endpointslices",
        slice_of(
            "vllm-1",
            endpoint("10.0.0.1", "vllm-0", "u0"),
            endpoint("10.0.0.2", "vllm-1", "u1", ready=False, serving=False),
            endpoint("10.0.0.3", "vllm-2", "u2", ready=False, terminating=True),
            endpoint("192.0.2.1", ready=None, serving=None, terminating=None),
        ),
    )
    api.put("endpointslices", slice_of("db-1", endpoint("10.0.0.9"), service="db"))
    async with discovering(service="vllm") as (seen, _):
        await seen.shows("192.0.2.1", "vllm-0", "vllm-1", "vllm-2")
        assert seen["vllm-0"] == Found("vllm-0", "http://10.0.0.1:8000", start="u0")
        assert not seen["vllm-1"].serving
        assert seen["vllm-2"].leaving
        assert seen["vllm-2"].serving
        assert seen["192.0.2.1"] == Found("192.0.2.1", "http://192.0.2.1:8000")
        await watched(api, "endpointslices")
        api.put("endpointslices", slice_of("vllm-1"))
        await seen.shows()
        assert api.lists("pods") == 0, "pods are not asked for without a selector"


async def test_a_pod_in_two_slices_is_one(api: ApiServer) -> None:
    api.put("endpointslices", slice_of("v6", endpoint("fd00::1", "a", "u"), family="IPv6"))
    api.put("endpointslices", slice_of("v4", endpoint("10.0.0.1", "a", "u")))
    moving = endpoint("10.0.0.1", "a", "u", serving=False, terminating=True)
    api.put("endpointslices", slice_of("v4-2", moving))
    async with discovering(service="vllm") as (seen, _):
        await seen.shows("a")
        assert seen["a"] == Found("a", "http://10.0.0.1:8000", start="u")
        await watched(api, "endpointslices")
        api.delete("endpointslices", "v4-2")
        leaving = endpoint("10.0.0.1", "a", "u", terminating=True)
        api.put("endpointslices", slice_of("v4", leaving, endpoint("10.0.0.7", "a", "u-new")))
        await until(lambda: seen["a"].url == "http://10.0.0.7:8000")
        assert seen["a"].start == "u-new"


async def test_a_slice_with_a_port_for_each_rank_is_a_pod_for_each(api: ApiServer) -> None:
    ports = [
        {"name": "http-1", "port": 8001, "protocol": "TCP"},
        {"name": "http-0", "port": 8000, "protocol": "TCP"},
        {"name": "metrics", "port": 9000, "protocol": "TCP"},
    ]
    api.put("endpointslices", slice_of("s", endpoint("10.0.0.1", "a", "u"), ports=ports))
    async with discovering(service="vllm") as (seen, _):
        await seen.shows("a:8000", "a:8001")
        assert seen["a:8001"].url == "http://10.0.0.1:8001"


async def test_with_service_and_selector_the_pod_tells_of_its_starts(api: ApiServer) -> None:
    async with discovering(service="vllm", selector="app=vllm") as (seen, _):
        await seen.shows()
        await watched(api)
        await watched(api, "endpointslices")
        # The slice may be first, or last: either way the pod is told of once both are there.
        api.put("endpointslices", slice_of("s", endpoint("10.0.0.1", "a", "u-a")))
        api.put("pods", pod("a", "10.0.0.1"), uid="u-a")
        await seen.shows("a")
        assert seen["a"].start == "u-a/containerd://1"
        api.put("pods", pod("a", "10.0.0.1", deleting=True))
        await until(lambda: seen["a"].leaving)
        api.delete("pods", "a")
        await seen.shows()
        api.put("pods", pod("a", "10.0.0.2"), uid="u-b")
        api.put("endpointslices", slice_of("s", endpoint("10.0.0.2", "a", "u-b")))
        await seen.shows("a")
        assert seen["a"].start == "u-b/containerd://1"


def test_without_a_cluster_the_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"^discovery\.kind: 'kubernetes' finds no cluster; allowed: "
    ):
        KubernetesDiscovery(service="v", selector=None, namespace=None, port=None, scheme="http")


def test_without_the_client_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kr8s", None)
    monkeypatch.delitem(sys.modules, "gateway.fleet.kubernetes")
    settings = DiscoverySettings(kind="kubernetes", service="vllm")
    with pytest.raises(ConfigError, match=r"pip install 'cachewise-gateway\[kubernetes\]'$"):
        discovery(settings)


EVENTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "delete", "recreate"])), max_size=12
)


@given(EVENTS, st.randoms(use_true_random=False))
def test_any_order_within_an_object_ends_where_the_server_is(
    steps: list[tuple[str, str]], random: Any
) -> None:
    """Events of a watch, each told up to three times and out of order, end in the server's state
    once the latest of each object has been told."""
    server = ApiServer()
    for name, step in steps:
        if step == "put" or name not in server.objects["pods"]:
            server.put("pods", pod(name))
        else:
            server.delete("pods", name)
            if step == "recreate":
                server.put("pods", pod(name))
    told = [(kind, item) for _, kind, _, item in server.log for _ in range(random.randint(1, 3))]
    random.shuffle(told)
    known: Collection[str] = Collection(
        None,  # type: ignore[arg-type]
        "v1",
        "pods",
        "fleet",
        "",
        lambda item: item["metadata"]["uid"],
        lambda: None,
    )
    for kind, item in told:
        known._take(kind, item)
    assert {name: k.uid for name, k in known.objects.items()} == {
        name: item["metadata"]["uid"] for name, item in server.objects["pods"].items()
    }
