"""The fleet: all pods, watched by one prober each, and who can serve which model.

A pod is added by the settings or found by discovery. One that discovery no longer finds, or finds
to be leaving, gets no new turns and is removed when its running ones have ended. One that was
started anew is another pod of the same name: what was known of the old one goes with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal
from urllib.parse import urlsplit

import httpx

from gateway.config import PodSettings, ProbeSettings
from gateway.fleet.discovery import Discovery, Found
from gateway.fleet.ledger import Ledger, Trouble
from gateway.fleet.pod import Pod
from gateway.fleet.probe import ProbeResult, probe

logger = logging.getLogger("gateway.fleet")

Event = Literal["ready", "lost", "restarted", "capacity", "draining"]


class Fleet:
    """The pods by name. `watched` keeps their state fresh while it is entered.

    Discovered pods have ``ranks`` engines each, and publish and replay their KV events at
    ``events_ports``.
    """

    def __init__(
        self,
        pods: Sequence[PodSettings],
        settings: ProbeSettings,
        pod_api_key: str | None = None,
        discovery: Discovery | None = None,
        ranks: int = 1,
        events_ports: tuple[int | None, int | None] = (None, None),
    ) -> None:
        self.settings = settings
        self.pod_api_key = pod_api_key
        self.discovery = discovery
        self.ranks = ranks
        self.events_ports = events_ports
        self.pods: dict[str, Pod] = {}
        self._found: dict[str, Found] = {}
        """What discovery said of the pods that it brought, by their names here."""
        self._gone: set[str] = set()
        """Of these, the names that it does not find any more."""
        self._leaving: set[str] = set()
        """Of these, the names that it drains."""
        self._watchers: dict[Pod, asyncio.Task[None]] = {}
        self._start_watcher: Callable[[Pod], asyncio.Task[None]] | None = None
        self._followers: dict[Pod, asyncio.Task[None]] = {}
        self.events_troubled: Callable[[Pod, Trouble], None] = lambda pod, trouble: None
        """Called when KV events of a pod were missed, or cannot be used."""
        self.changed: Callable[[Pod, Event], None] = lambda pod, event: None
        """Called after a pod's state has changed."""
        self.removed: Callable[[Pod], None] = lambda pod: None
        """Called with each pod that has left."""
        for pod in pods:
            self.add(pod)

    def add(self, pod: PodSettings) -> None:
        """Take a pod in, as one for each of its ranks; it gets turns once a probe finds it
        ready."""
        name = pod.name or pod.url.partition("://")[2]
        key = pod.api_key.get_secret_value() if pod.api_key is not None else self.pod_api_key
        for one, rank in _by_rank(name, pod.dp_ranks):
            events = _events(pod.kv_events, pod.kv_events_replay, rank)
            self._enter(Pod(name=one, url=pod.url, api_key=key, rank=rank, kv_events=events))

    def _enter(self, pod: Pod) -> None:
        self.pods[pod.name] = pod
        if self._start_watcher is not None:
            self._watchers[pod] = self._start_watcher(pod)
            self._follow(pod)

    def _follow(self, pod: Pod) -> None:
        """Subscribe to the pod's KV events, if it publishes them."""
        if pod.kv_events is None:
            return
        from gateway.fleet.kv_events import Subscription

        ledger = pod.residency.ledger = Ledger()
        ledger.on_emptied = pod.residency.clear
        subscription = Subscription(
            pod.name, *pod.kv_events, ledger, lambda trouble: self.events_troubled(pod, trouble)
        )
        self._followers[pod] = asyncio.create_task(
            subscription.run(), name=f"KV events of {pod.name}"
        )

    def _unfollow(self, pod: Pod) -> None:
        follower = self._followers.pop(pod, None)
        if follower is not None:
            follower.cancel()
        pod.residency.ledger = None

    def _remove(self, pod: Pod) -> None:
        if self.pods.get(pod.name) is pod:
            del self.pods[pod.name]
        self._found.pop(pod.name, None)
        self._gone.discard(pod.name)
        self._leaving.discard(pod.name)
        watcher = self._watchers.pop(pod, None)
        if watcher is not None:
            watcher.cancel()
        self._unfollow(pod)
        ready, pod.ready = pod.ready, False
        try:
            if ready:
                self.changed(pod, "lost")
            self.changed(pod, "restarted")  # its cache is no more; one of its name begins anew
            self.removed(pod)
        except Exception:
            logger.exception("that pod %s has left was not taken in", pod.name)

    def reconcile(self, found: Sequence[Found]) -> None:
        """Make the discovered part of the fleet what discovery says it is."""
        named = {
            name: (one, rank) for one in found for name, rank in _by_rank(one.name, self.ranks)
        }
        for name, (one, rank) in named.items():
            pod = self.pods.get(name)
            before = self._found.get(name)
            if pod is not None and before is None:
                continue  # a pod of the settings has the name
            if pod is not None and before is not None and _is_another(before, one):
                logger.info("pod %s was started anew", name)
                self._remove(pod)
                pod = before = None
            if pod is None:
                if one.leaving:
                    continue
                logger.info("pod %s is found at %s", name, one.url)
                pod = Pod(name=name, url=one.url, api_key=self.pod_api_key, rank=rank)
                pod.kv_events = self._events_at(one.url, rank)
                self._enter(pod)
            start = one.start or (before.start if before is not None else None)
            self._found[name] = replace(one, start=start)
            self._gone.discard(name)
            if pod.url != one.url:
                self._unfollow(pod)
                pod.url, pod.kv_events = one.url, self._events_at(one.url, rank)
                if self._start_watcher is not None:
                    self._follow(pod)
            self._withhold(pod, not one.serving)
            self._leave(pod, one.leaving)
        for name in [name for name in self._found if name not in named]:
            self._gone.add(name)
            self._leave(self.pods[name], True)
            self._retire(self.pods[name])

    def _events_at(self, url: str, rank: int | None) -> tuple[str, str | None] | None:
        port, replay_port = self.events_ports
        host = urlsplit(url).netloc.rpartition("@")[2]
        host = host[: host.rindex("]") + 1] if "]" in host else host.partition(":")[0]
        if port is None:
            return None
        replay = f"tcp://{host}:{replay_port}" if replay_port is not None else None
        return _events(f"tcp://{host}:{port}", replay, rank)

    def _retire(self, pod: Pod) -> None:
        """Remove the pod if it is gone and its last turn has ended."""
        if pod.name in self._gone and not pod.in_flight:
            self._remove(pod)

    def _leave(self, pod: Pod, leaving: bool) -> None:
        """Drain a pod that is stopping or gone; take back what was drained so."""
        if leaving != (pod.name in self._leaving):
            (self._leaving.add if leaving else self._leaving.discard)(pod.name)
            self.drain(pod, leaving)

    def _withhold(self, pod: Pod, withheld: bool) -> None:
        if pod.withheld != withheld:
            pod.withheld = withheld
            if withheld:
                self.changed(pod, "draining")
            elif pod.takes_turns:
                self.changed(pod, "ready")

    def __iter__(self) -> Iterator[Pod]:
        return iter(self.pods.values())

    @property
    def models(self) -> dict[str, Pod]:
        """Every model served by a ready pod, with one such pod, in the pods' order."""
        found: dict[str, Pod] = {}
        for pod in self.pods.values():
            if pod.ready:
                for model in pod.models:
                    found.setdefault(model, pod)
        return found

    def knows(self, model: str) -> bool:
        """Whether any pod, ready or not, serves the model."""
        return any(model in pod.models for pod in self.pods.values())

    def able(self, model: str, but: Sequence[Pod] = ()) -> list[Pod]:
        """Pods that can take a turn of the model now."""
        return [
            pod
            for pod in self.pods.values()
            if pod.takes_turns and model in pod.models and pod not in but
        ]

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Probe every pod once, then keep probing and discovering until left."""
        async with httpx.AsyncClient(timeout=self.settings.timeout_s, trust_env=False) as client:
            await asyncio.gather(*(self._probe(client, pod) for pod in self.pods.values()))
            async with asyncio.TaskGroup() as tasks:

                def start(pod: Pod) -> asyncio.Task[None]:
                    return tasks.create_task(self._watch(client, pod), name=f"probe {pod.name}")

                self._start_watcher = start
                self._watchers = {pod: start(pod) for pod in self.pods.values()}
                for pod in self.pods.values():
                    self._follow(pod)
                discovering = tasks.create_task(self._discover(), name="discovery")
                try:
                    yield
                finally:
                    self._start_watcher = None
                    discovering.cancel()
                    for watcher in self._watchers.values():
                        watcher.cancel()
                    self._watchers = {}
                    followers = list(self._followers.values())
                    for pod in list(self._followers):
                        self._unfollow(pod)
                    await asyncio.gather(*followers, return_exceptions=True)

    async def _discover(self) -> None:
        while self.discovery is not None:
            try:
                await self.discovery.run(self.reconcile)
            except Exception:
                logger.exception("discovery failed; it starts anew")
            await asyncio.sleep(self.settings.interval_s)

    async def _watch(self, client: httpx.AsyncClient, pod: Pod) -> None:
        while True:
            if pod.probed is not None or pod.failures:
                await asyncio.sleep(self.settings.interval_s)
            try:
                await self._probe(client, pod)
            except Exception:
                pod.failures += 1
                logger.exception("probe of pod %s failed", pod.name)
            self._retire(pod)

    async def _probe(self, client: httpx.AsyncClient, pod: Pod) -> None:
        known = pod.probed if pod.ready else None
        result = await probe(client, pod.url, pod.api_key, self.settings.timeout_s, known, pod.rank)
        self.apply(pod, result)

    def apply(self, pod: Pod, result: ProbeResult) -> None:
        """Take in what a probe found. A ready pod is given up after ``unhealthy_after`` failures in
        a row; one good probe brings it back, with an empty cache if its counters started anew. Why
        a pod is not ready is logged once, and again when it is for another reason."""
        if not result.ready:
            pod.failures += 1
            reason = str(result.error)
            if pod.failures < self.settings.unhealthy_after:
                return
            if pod.ready:
                self.lost(pod, reason)
            elif pod.trouble != reason:
                logger.warning("pod %s is not ready: %s", pod.name, reason)
                pod.trouble = reason
            return
        before = pod.probed
        pod.failures, pod.trouble = 0, None
        pod.probed = result
        pod.models = {model.id: model.max_model_len for model in result.models}
        for warning in result.warnings:
            if before is None or warning not in before.warnings:
                logger.warning("pod %s: %s", pod.name, warning)
        if result.load is not None:
            capacity_tokens = pod.residency.capacity_tokens
            pod.residency.set_capacity(result.load.capacity_tokens)
            if pod.ready and pod.residency.capacity_tokens != capacity_tokens:
                self.changed(pod, "capacity")
        if before is not None and _restarted(before, result):
            logger.warning("pod %s has restarted: its cache is empty", pod.name)
            pod.residency.clear()
            pod.probed = None  # the next probe asks for version and capabilities anew
            self.changed(pod, "restarted")
        if not pod.ready:
            pod.ready = True
            logger.info("pod %s is ready: %s", pod.name, ", ".join(pod.models))
            self.changed(pod, "ready")

    def lost(self, pod: Pod, reason: str) -> None:
        """The pod does not answer: no turn goes there until a probe finds it well again."""
        if pod.ready:
            logger.warning("pod %s is lost: %s", pod.name, reason)
            pod.ready, pod.trouble = False, reason
            self.changed(pod, "lost")

    def drain(self, pod: Pod, draining: bool) -> None:
        """Give the pod no more turns; those it has go on. Or, with ``draining`` off, again."""
        if pod.draining != draining:
            pod.draining = draining
            logger.info("pod %s is %s", pod.name, "draining" if draining else "in use again")
            if draining:
                self.changed(pod, "draining")
            elif pod.takes_turns:
                self.changed(pod, "ready")


def _by_rank(name: str, ranks: int) -> list[tuple[str, int | None]]:
    """The names and ranks of the pods that an address stands for."""
    return [(name, None)] if ranks == 1 else [(f"{name}/{rank}", rank) for rank in range(ranks)]


def _events(
    endpoint: str | None, replay: str | None, rank: int | None
) -> tuple[str, str | None] | None:
    """The endpoints of one rank: vLLM raises the port by it."""

    def of_rank(address: str) -> str:
        host, _, port = address.rpartition(":")
        return f"{host}:{int(port) + (rank or 0)}"

    if endpoint is None:
        return None
    return of_rank(endpoint), of_rank(replay) if replay is not None else None


def _is_another(before: Found, now: Found) -> bool:
    """Whether the name now stands for an engine with another cache."""
    if before.start is not None and now.start is not None:
        return before.start != now.start
    return before.url != now.url


def _restarted(before: ProbeResult, now: ProbeResult) -> bool:
    """Whether a counter that only grows has shrunk."""
    return (
        before.load is not None
        and now.load is not None
        and (before.load.prompt_tokens or 0) > (now.load.prompt_tokens or 0)
    )
