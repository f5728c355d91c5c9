"""The fleet: all pods, watched by one prober each, and who can serve which model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import httpx

from gateway.config import PodSettings, ProbeSettings
from gateway.fleet.pod import Pod
from gateway.fleet.probe import ProbeResult, probe

logger = logging.getLogger("gateway.fleet")

Event = Literal["ready", "lost", "restarted", "capacity", "draining"]


class Fleet:
    """The pods by name. `watched` keeps their state fresh while it is entered."""

    def __init__(
        self, pods: Sequence[PodSettings], settings: ProbeSettings, pod_api_key: str | None = None
    ) -> None:
        self.settings = settings
        self.pod_api_key = pod_api_key
        self.pods: dict[str, Pod] = {}
        self.changed: Callable[[Pod, Event], None] = lambda pod, event: None
        """Called after a pod's state has changed."""
        for pod in pods:
            self.add(pod)

    def add(self, pod: PodSettings) -> None:
        """Take a pod in; it gets turns once a probe finds it ready."""
        name = pod.name or pod.url.partition("://")[2]
        key = pod.api_key.get_secret_value() if pod.api_key is not None else self.pod_api_key
        self.pods[name] = Pod(name=name, url=pod.url, api_key=key)

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
            if pod.ready and not pod.draining and model in pod.models and pod not in but
        ]

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Probe every pod once, then keep probing until left."""
        async with httpx.AsyncClient(timeout=self.settings.timeout_s, trust_env=False) as client:
            await asyncio.gather(*(self._probe(client, pod) for pod in self.pods.values()))
            async with asyncio.TaskGroup() as tasks:
                watchers = [
                    tasks.create_task(self._watch(client, pod), name=f"probe {pod.name}")
                    for pod in self.pods.values()
                ]
                try:
                    yield
                finally:
                    for watcher in watchers:
                        watcher.cancel()

    async def _watch(self, client: httpx.AsyncClient, pod: Pod) -> None:
        while True:
            await asyncio.sleep(self.settings.interval_s)
            try:
                await self._probe(client, pod)
            except Exception:
                logger.exception("probe of pod %s failed", pod.name)

    async def _probe(self, client: httpx.AsyncClient, pod: Pod) -> None:
        known = pod.probed if pod.ready else None
        result = await probe(client, pod.url, pod.api_key, self.settings.timeout_s, known)
        self.apply(pod, result)

    def apply(self, pod: Pod, result: ProbeResult) -> None:
        """Take in what a probe found. A ready pod is given up after ``unhealthy_after`` failures in
        a row; one good probe brings it back, with an empty cache if its counters started anew."""
        if not result.ready:
            pod.failures += 1
            if pod.ready and pod.failures >= self.settings.unhealthy_after:
                self.lost(pod, str(result.error))
            return
        before = pod.probed
        pod.failures = 0
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
            pod.ready = False
            self.changed(pod, "lost")

    def drain(self, pod: Pod, draining: bool) -> None:
        """Give the pod no more turns; those it has go on. Or, with ``draining`` off, again."""
        if pod.draining != draining:
            pod.draining = draining
            logger.info("pod %s is %s", pod.name, "draining" if draining else "in use again")
            if draining:
                self.changed(pod, "draining")
            elif pod.ready:
                self.changed(pod, "ready")


def _restarted(before: ProbeResult, now: ProbeResult) -> bool:
    """Whether a counter that only grows has shrunk."""
    return (
        before.load is not None
        and now.load is not None
        and (before.load.prompt_tokens or 0) > (now.load.prompt_tokens or 0)
    )
