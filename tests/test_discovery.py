"""Pods found by DNS, and what the fleet makes of what discovery says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Never

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import pytest

from gateway.config import ConfigError, DiscoverySettings, ProbeSettings, load_settings
from gateway.fleet import kubernetes
from gateway.fleet.discovery import Found, discovery
from gateway.fleet.dns import DnsDiscovery
from gateway.fleet.fleet import Fleet
from tests.kubernetes_api import ApiServer, pod
from tests.served import Exchange, Pod, Running, gateway_over, until

# -- DNS -------------------------------------------------------------------------------------------


class DnsServer(asyncio.DatagramProtocol):
    """A DNS server on loopback: UDP, and TCP for answers that do not fit."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self.fault: dns.rcode.Rcode | None = None
        self.silent = False
        self.truncate = False
        self.asked: list[str] = []
        self.port = 0

    def set(self, name: str, **records: Sequence[str]) -> None:
        self.records = {key: found for key, found in self.records.items() if key[0] != name}
        self.records |= {(name, kind): list(found) for kind, found in records.items() if found}

    def answer(self, wire: bytes, udp: bool) -> bytes | None:
        query = dns.message.from_wire(wire)
        name, kind = query.question[0].name, dns.rdatatype.to_text(query.question[0].rdtype)
        self.asked.append(f"{kind} {name}")
        if self.silent:
            return None
        response = dns.message.make_response(query)
        found = self.records.get((name.to_text(), kind))
        if self.fault is not None:
            response.set_rcode(self.fault)
        elif udp and self.truncate:
            response.flags |= dns.flags.TC
        elif found is not None:
            response.answer.append(dns.rrset.from_text(name, 5, "IN", kind, *found))
        elif not any(known == name.to_text() for known, _ in self.records):
            response.set_rcode(dns.rcode.NXDOMAIN)
        return response.to_wire()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if (reply := self.answer(data, udp=True)) is not None:
            self.transport.sendto(reply, addr)

    async def _tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            size = int.from_bytes(await reader.readexactly(2), "big")
            reply = self.answer(await reader.readexactly(size), udp=False) or b""
            writer.write(len(reply).to_bytes(2, "big") + reply)
            await writer.drain()
        writer.close()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[DnsServer]:
        server = await asyncio.start_server(self._tcp, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: self, local_addr=("127.0.0.1", self.port)
        )
        try:
            yield self
        finally:
            self.transport.close()
            server.close()

    def discovery(self, name: str, **settings: Any) -> DnsDiscovery:
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers = ["127.0.0.1"]
        resolver.port = self.port
        given = {"port": None, "scheme": "http", "interval_s": 0.02, "resolver": resolver}
        return DnsDiscovery(name, **(given | settings))


@pytest.fixture
async def server() -> AsyncIterator[DnsServer]:
    async with DnsServer().serving() as running:
        yield running


@asynccontextmanager
async def told(source: DnsDiscovery) -> AsyncIterator[list[list[Found]]]:
    seen: list[list[Found]] = []
    task = asyncio.create_task(source.run(lambda found: seen.append(list(found))))
    try:
        yield seen
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_every_address_of_a_name_is_a_pod(server: DnsServer) -> None:
    server.set("vllm.fleet.svc.", A=["10.0.0.10", "10.0.0.9"])
    assert await server.discovery("vllm.fleet.svc.").resolve() == [
        Found("10.0.0.9:8000", "http://10.0.0.9:8000"),
        Found("10.0.0.10:8000", "http://10.0.0.10:8000"),
    ]
    server.set("vllm.fleet.svc.", AAAA=["fd00::1"])
    found = await server.discovery("vllm.fleet.svc.", port=9, scheme="https").resolve()
    assert found == [Found("[fd00::1]:9", "https://[fd00::1]:9")]
    server.set("vllm.fleet.svc.", A=["10.0.0.9"], AAAA=["fd00::1"])
    assert len(await server.discovery("vllm.fleet.svc.").resolve()) == 1, "one pod, two families"


async def test_the_targets_of_an_srv_name_are_pods_with_their_ports(server: DnsServer) -> None:
    name = "_http._tcp.vllm.fleet.svc."
    server.set(name, SRV=["0 50 8000 vllm-0.vllm.", "0 50 8001 vllm-0.vllm.", "0 0 8000 gone."])
    server.set("vllm-0.vllm.", A=["10.0.0.1"])
    source = server.discovery(name)
    assert await source.resolve() == [
        Found("vllm-0.vllm:8000", "http://10.0.0.1:8000", start="10.0.0.1"),
        Found("vllm-0.vllm:8001", "http://10.0.0.1:8001", start="10.0.0.1"),
    ]
    server.set("vllm-0.vllm.", A=["10.0.0.2"])
    assert {found.start for found in await source.resolve()} == {"10.0.0.2"}


async def test_a_name_is_asked_for_again_and_only_changes_are_told(server: DnsServer) -> None:
    server.set("v.", A=["10.0.0.1"])
    async with told(server.discovery("v.")) as seen:
        await until(lambda: server.asked.count("A v.") > 3)
        assert len(seen) == 1
        server.set("v.", A=["10.0.0.2", "10.0.0.1"])
        await until(lambda: len(seen) == 2)
        assert [found.url for found in seen[-1]] == ["http://10.0.0.1:8000", "http://10.0.0.2:8000"]


async def test_many_addresses_come_over_tcp(server: DnsServer) -> None:
    server.truncate = True
    server.set("v.", A=[f"10.0.{n // 250}.{n % 250 + 1}" for n in range(600)])
    assert len(await server.discovery("v.").resolve()) == 600


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED])
async def test_what_is_known_stands_while_dns_fails(
    server: DnsServer, rcode: dns.rcode.Rcode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.fleet.dns.LIFETIME_S", 0.2)
    server.set("v.", A=["10.0.0.1"])
    source = server.discovery("v.")
    async with told(source) as seen:
        await until(lambda: len(seen) == 1)
        server.fault = rcode
        await until(lambda: source.failures >= 2)
        server.fault, server.silent = None, True
        failures = source.failures
        await until(lambda: source.failures > failures)
        server.silent = False
        server.set("v.", A=["10.0.0.2"])
        await until(lambda: len(seen) == 2)
    assert [len(found) for found in seen] == [1, 1]


async def test_a_name_without_addresses_is_believed_the_third_time(server: DnsServer) -> None:
    server.set("v.", A=["10.0.0.1"])
    async with told(server.discovery("v.", interval_s=0.05)) as seen:
        await until(lambda: len(seen) == 1)
        asked = server.asked.count("A v.")
        server.set("v.")
        await until(lambda: len(seen) == 2)
        assert seen[-1] == []
        assert server.asked.count("A v.") - asked >= 3


# -- the fleet -------------------------------------------------------------------------------------


def fleet(ranks: int = 1) -> tuple[Fleet, list[str]]:
    made = Fleet((), ProbeSettings(), ranks=ranks)
    left: list[str] = []
    made.removed = lambda pod: left.append(pod.name)
    return made, left


A = Found("a", "http://10.0.0.1:8000", start="1")
B = Found("b", "http://10.0.0.2:8000", start="1")


def test_a_pod_that_is_not_found_any_more_leaves_at_once_if_idle() -> None:
    made, left = fleet()
    made.reconcile([A, B])
    assert set(made.pods) == {"a", "b"}
    made.reconcile([B])
    assert set(made.pods) == {"b"}
    assert left == ["a"]


def test_a_leaving_pod_lets_its_turns_finish() -> None:
    made, left = fleet()
    made.reconcile([A])
    pod = made.pods["a"]
    pod.ready, pod.models = True, {"m": None}
    assert made.able("m") == [pod]
    with pod.serving(10):
        made.reconcile([Found(A.name, A.url, A.start, leaving=True)])
        assert made.able("m") == []
        made.reconcile([])
        assert made.pods["a"] is pod
    made.reconcile([])
    assert left == ["a"]


def test_a_pod_unfit_for_its_source_gets_no_turns_until_it_is_fit() -> None:
    made, _ = fleet()
    made.reconcile([A])
    pod = made.pods["a"]
    pod.ready, pod.models = True, {"m": None}
    made.reconcile([Found(A.name, A.url, A.start, serving=False)])
    assert made.able("m") == []
    made.reconcile([A])
    assert made.able("m") == [pod]


@pytest.mark.parametrize(
    "again",
    [
        Found("a", "http://10.0.0.1:8000", start="2"),
        Found("a", "http://10.0.0.7:8000", start="2"),
        Found("a", "http://10.0.0.7:8000"),
    ],
)
def test_another_start_under_a_name_is_another_pod(again: Found) -> None:
    made, left = fleet()
    made.reconcile([A])
    pod = made.pods["a"]
    with pod.serving(10):
        pod.residency.touch("s", 1000, [])
        made.reconcile([again])
        new = made.pods["a"]
        assert new is not pod
        assert (new.in_flight, new.residency.tokens("s"), new.url) == (0, 0, again.url)
        assert left == ["a"]
    assert made.pods["a"] is new


def test_an_unknown_start_is_the_same_pod() -> None:
    made, _ = fleet()
    made.reconcile([Found("a", A.url)])
    pod = made.pods["a"]
    made.reconcile([A])
    made.reconcile([Found("a", A.url)])
    assert made.pods["a"] is pod
    made.reconcile([Found("a", A.url, start="2")])
    assert made.pods["a"] is not pod, "the start known last still counts"


def test_a_pod_that_comes_back_before_it_left_takes_turns_again() -> None:
    made, left = fleet()
    made.reconcile([A])
    pod = made.pods["a"]
    with pod.serving(10):
        made.reconcile([])
        assert pod.draining
        made.reconcile([A])
        assert not pod.draining
    made.reconcile([A])
    assert not left
    assert made.pods["a"] is pod


def test_a_pod_that_is_found_leaving_is_not_taken_in() -> None:
    made, _ = fleet()
    made.reconcile([Found(A.name, A.url, leaving=True)])
    assert not made.pods


def test_each_rank_behind_an_address_is_a_pod() -> None:
    made, left = fleet(ranks=2)
    made.reconcile([A])
    assert {name: pod.rank for name, pod in made.pods.items()} == {"a/0": 0, "a/1": 1}
    with made.pods["a/1"].serving(1):
        made.reconcile([])
        assert (list(made.pods), left) == (["a/1"], ["a/0"])


def test_a_drain_by_hand_is_not_lifted_by_discovery() -> None:
    made, _ = fleet()
    made.reconcile([A])
    made.drain(made.pods["a"], True)
    made.reconcile([A, B])
    assert made.pods["a"].draining


def test_what_happens_to_pods_is_told() -> None:
    made, _ = fleet()
    told: list[tuple[str, str]] = []
    made.changed = lambda pod, event: told.append((pod.name, event))
    made.reconcile([A])
    made.pods["a"].ready = True
    made.reconcile([Found(A.name, A.url, A.start, serving=False)])
    made.reconcile([A])
    made.reconcile([Found(A.name, A.url, A.start, leaving=True)])
    made.reconcile([A])
    made.reconcile([Found(A.name, A.url, start="2")])
    made.pods["a"].ready = True
    made.reconcile([])
    assert told == [
        ("a", event)
        for event in (
            *("draining", "ready"),  # unfit, fit
            *("draining", "ready"),  # leaving, back
            *("lost", "restarted"),  # another start
            *("draining", "lost", "restarted"),  # gone
        )
    ]


def test_pods_of_the_settings_are_left_alone() -> None:
    settings = load_settings({"pods": [{"url": "http://x:1", "name": "a"}]}, None, {})
    made = Fleet(settings.pods, settings.probe)
    made.reconcile([A, B])
    assert made.pods["a"].url == "http://x:1"
    made.reconcile([])
    assert set(made.pods) == {"a"}


# -- the whole gateway -----------------------------------------------------------------------------


class Scripted:
    """A source that a test speaks through."""

    failures = 0

    def __init__(self) -> None:
        self.found: Callable[[Sequence[Found]], None] | None = None

    async def run(self, found: Callable[[Sequence[Found]], None]) -> Never:
        self.found = found
        await asyncio.Event().wait()
        raise AssertionError


@asynccontextmanager
async def gateway_in(api: ApiServer, tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Running]:
    monkeypatch.setattr(kubernetes, "BACKOFF_S", (0.01, 0.05))
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "config")))
    found = {"kind": "kubernetes", "selector": "app=vllm"}
    async with gateway_over(discovery=found, probe={"interval_s": 0.02}) as running:
        yield running


async def test_pods_join_drain_and_leave_under_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def slowly(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.chunk(b'data: {"id":"1","choices":[]}\n\n')
        await go_on.wait()
        exchange.chunk(b"data: [DONE]\n\n")
        exchange.end_stream()

    async with (
        ApiServer().serving() as api,
        Pod(slowly) as first,
        Pod() as second,
        gateway_in(api, tmp_path, monkeypatch) as running,
    ):
        # Both pods have loopback's address here, so their names carry the port.
        async def found_at(name: str, engine: Pod, **state: Any) -> None:
            api.put("pods", pod(name, f"127.0.0.1:{engine.url.rpartition(':')[2]}", **state))

        monkeypatch.setattr(kubernetes.KubernetesDiscovery, "_found", as_given)
        assert (await running.get("/ready")).status == 503
        await found_at("first", first)
        await until(lambda: bool(running.gateway.fleet.able("m")))
        assert (await running.get("/ready")).json["pods"] == {"first": True}

        turn = asyncio.create_task(running.post("chat"))
        await first.arrived.wait()
        await found_at("second", second)
        await found_at("first", first, deleting=True)
        fleet = running.gateway.fleet
        await until(lambda: [pod.name for pod in fleet.able("m")] == ["second"])
        assert (await running.post("chat")).status == 200
        assert len(second.turns) == 1
        api.delete("pods", "first")
        await asyncio.sleep(0.1)
        assert not turn.done()
        assert "first" in fleet.pods
        assert await running.metric('cachewise_pod_in_flight_turns{pod="first"}') == 1
        go_on.set()
        reply = await turn
        assert reply.status == 200
        assert b"[DONE]" in reply.data
        await until(lambda: set(fleet.pods) == {"second"})
        assert set(running.gateway.loop.admission.books) == {"second"}
        assert 'pod="first"' not in (await running.get("/metrics")).text
        assert running.settled()


def as_given(self: Any, name: str, address: str, port: int, pod: Any) -> Found:
    return Found(name, f"http://{address}", pod.start, pod.ready, pod.leaving)


async def test_a_turn_of_a_rank_names_it_and_a_client_cannot() -> None:
    async with Pod() as engine:
        settings = {"url": engine.url, "name": "p", "dp_ranks": 2}
        async with gateway_over(pods=[settings], routing={"policy": "round_robin"}) as running:
            for _ in range(2):
                reply = await running.post("chat", headers={"X-Data-Parallel-Rank": "7"})
                assert reply.status == 200
            asked = [turn.header(b"x-data-parallel-rank") for turn in engine.turns]
            assert sorted(asked) == [[b"0"], [b"1"]]
            pods = (await running.get("/v1/cachewise/pods")).json["data"]
            assert [(p["name"], p["rank"]) for p in pods] == [("p/0", 0), ("p/1", 1)]
    async with Pod() as engine, gateway_over(engine) as running:
        await running.post("chat", headers={"X-Data-Parallel-Rank": "7"})
        assert engine.turns[0].header(b"x-data-parallel-rank") == []


async def test_a_restarted_pod_is_believed_empty_and_its_metrics_begin_anew() -> None:
    answer = {
        "id": "1",
        "object": "chat.completion",
        "choices": [],
        "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105},
    }

    async def whole(exchange: Exchange) -> None:
        exchange.whole(json.dumps(answer).encode())

    async with Pod(whole) as engine, gateway_over() as running:
        fleet = running.gateway.fleet
        for name in list(fleet.pods):
            fleet._remove(fleet.pods[name])
        fleet.reconcile([Found("a", engine.url, start="1")])
        await until(lambda: fleet.pods["a"].ready)
        assert (await running.post("chat")).status == 200
        assert fleet.pods["a"].residency.total_tokens > 0
        assert await running.metric('cachewise_prompt_tokens_total{pod="a"}') == 100
        fleet.reconcile([Found("a", engine.url, start="2")])
        assert fleet.pods["a"].residency.total_tokens == 0
        assert not fleet.pods["a"].ready
        assert await running.metric('cachewise_prompt_tokens_total{pod="a"}') == 0
        await until(lambda: fleet.pods["a"].ready)
        assert (await running.post("chat")).status == 200


async def test_a_source_that_breaks_is_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(Scripted):
        runs = 0

        async def run(self, found: Callable[[Sequence[Found]], None]) -> Never:
            self.runs += 1
            if self.runs == 1:
                raise RuntimeError("broken")
            return await super().run(found)

    source = Breaking()
    made = Fleet((), ProbeSettings(interval_s=0.01), discovery=source)
    async with made.watched():
        await until(lambda: source.runs == 2)


# -- settings --------------------------------------------------------------------------------------


def problem(**discovery: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings({"discovery": discovery}, None, {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"kind": "consul"},
            "discovery.kind: 'consul' is not one of the choices; allowed: static, dns, kubernetes",
        ),
        ({"kind": "dns"}, "discovery.dns_name: is missing; allowed: a DNS name, for kind dns"),
        (
            {"kind": "dns", "dns_name": "http://vllm"},
            "discovery.dns_name: 'http://vllm' is not of that form; allowed: a DNS name,"
            " for kind dns",
        ),
        (
            {"dns_name": "vllm"},
            "discovery.dns_name: 'vllm' is set while discovery.kind is 'static'; allowed: a DNS"
            " name, for kind dns",
        ),
        (
            {"kind": "kubernetes"},
            "discovery.selector: is missing; allowed: a label selector such as app=vllm, for kind"
            " kubernetes; this or discovery.service",
        ),
        (
            {"kind": "kubernetes", "selector": "app = = x"},
            "discovery.selector: 'app = = x' is not of that form; allowed: a label selector such as"
            " app=vllm, for kind kubernetes; this or discovery.service",
        ),
        (
            {"kind": "kubernetes", "service": "My_Service"},
            "discovery.service: 'My_Service' is not of that form; allowed: the name of a Service,"
            " for kind kubernetes",
        ),
        (
            {"kind": "dns", "dns_name": "v", "port": 0},
            "discovery.port: 0 is out of range; allowed: a whole number from 1 to 65535",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(given: dict[str, Any], line: str) -> None:
    assert problem(**given).removesuffix(" (from the command line)") == line


@pytest.mark.parametrize(
    "selector",
    [
        "app=vllm",
        "app==vllm,tier!=dev",
        "app.kubernetes.io/name in (vllm, sglang), gpu",
        "!cordoned",
    ],
)
def test_label_selectors_are_taken(selector: str) -> None:
    made = load_settings({"discovery": {"kind": "kubernetes", "selector": selector}}, None, {})
    assert made.discovery.selector == selector


def test_settings_choose_the_source() -> None:
    assert discovery(DiscoverySettings()) is None
    source = discovery(DiscoverySettings(kind="dns", dns_name="vllm", port=9000))
    assert isinstance(source, DnsDiscovery)
    env = {
        "CACHEWISE_DISCOVERY__KIND": "kubernetes",
        "CACHEWISE_DISCOVERY__SERVICE": "vllm",
    }
    assert load_settings({}, None, env).discovery.service == "vllm"
