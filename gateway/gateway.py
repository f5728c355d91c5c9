"""The gateway's parts, held together: what a turn needs on its way."""

from __future__ import annotations

import time
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from gateway.access import Access, Tenant
from gateway.closed_loop import ClosedLoop
from gateway.config import Settings, TracingSettings
from gateway.errors import GatewayError, no_pod_ready
from gateway.fleet.discovery import discovery
from gateway.fleet.fleet import Fleet
from gateway.fleet.pod import Pod
from gateway.foresight import Foresight
from gateway.metrics import Metrics
from gateway.relay import Relay
from gateway.sessions import SessionStore
from gateway.turn_history import TurnHistory

if TYPE_CHECKING:
    from gateway.recorder.recorder import Recorder
    from gateway.sharing.sharing import Sharing
    from gateway.tracing import Tracer


class Gateway:
    """One gateway. Built from settings alone; `gateway.app` enters its relay and fleet."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.access = Access(settings.access)
        pod_key = settings.access.pod_api_key
        self.fleet = Fleet(
            settings.pods,
            settings.probe,
            pod_key.get_secret_value() if pod_key is not None else None,
            discovery(settings.discovery),
            settings.discovery.dp_ranks,
            (settings.discovery.kv_events_port, settings.discovery.kv_events_replay_port),
        )
        if (
            settings.discovery.kv_events_port
            or settings.embedded.kv_events
            or any(pod.kv_events for pod in settings.pods)
        ):
            import gateway.fleet.kv_events  # noqa: F401 (raises `ConfigError` where it cannot be)
        self.relay = Relay(settings.relay, forward_client_key=settings.access.forward_client_key)
        self.sessions = SessionStore(settings.sessions.max_sessions, settings.sessions.ttl_s)
        self.metrics = Metrics()
        self.tracer = _tracer(settings.tracing, self.metrics)
        self.foresight = Foresight(settings.forecast, self.metrics)
        self.loop = ClosedLoop(settings, self.fleet, self.sessions, self.metrics, self.foresight)
        self.sharing = self._sharing()
        self.trusted = frozenset(settings.hints.trusted_tenants)
        self.fleet.removed = self.pod_removed
        self.fleet.events_troubled = self.metrics.kv_events_troubled
        self.aliases = dict(settings.models.aliases)
        self.draining = False
        self.turns_asked = 0
        self.wall_minus_monotonic_s = time.time() - time.monotonic()
        self.history = TurnHistory(self.wall_minus_monotonic_s)
        self.recorder = self._recorder()

    def _recorder(self) -> Recorder | None:
        """Raises `ConfigError` if its directory cannot be used."""
        if self.settings.record.directory is None:
            return None
        from gateway.recorder.recorder import Recorder

        return Recorder(self.settings.record, self.metrics, self.wall_minus_monotonic_s)

    def _sharing(self) -> Sharing | None:
        """Raises `ConfigError` if the store's client is not installed."""
        if self.settings.sharing.redis_url is None:
            return None
        from gateway.sharing.sharing import Sharing

        return Sharing(self.settings.sharing, self.fleet, self.sessions, self.loop, self.metrics)

    def pod_removed(self, pod: Pod) -> None:
        """Nothing is kept of a pod that has left the fleet."""
        self.metrics.forget(pod.name)
        self.loop.hints.forget(pod)

    def shut_down(self) -> None:
        """From now on turns are refused, held ones too; those that run go on."""
        self.draining = True
        self.loop.shut_down()

    def served_model(self, model: str) -> str:
        """The model that pods know for the name a client used. Raises `GatewayError` 404."""
        if self.fleet.knows(model):
            return model
        served = self.aliases.get(model) or self.aliases.get("*")
        if served is not None and self.fleet.knows(served):
            return served
        known = sorted({name for pod in self.fleet for name in pod.models})
        if not known:
            raise no_pod_ready(model)
        names = ", ".join(known[:8])
        if served is not None:
            raise GatewayError(
                404,
                "model_not_found",
                f"The model {model[:128]!r} is an alias of {served!r}, which no pod serves;"
                f" served: {names}.",
            )
        raise GatewayError(
            404,
            "model_not_found",
            f"The model {model[:128]!r} does not exist here; served: {names}. The operator can map"
            f" it with --model-alias '{model[:128]}={known[0]}', or any name with"
            f" --model-alias '*={known[0]}'.",
        )


def _tracer(settings: TracingSettings, metrics: Metrics) -> Tracer | None:
    """What traces turns, if they are traced; else nothing of OpenTelemetry is imported."""
    if settings.endpoint is None:
        return None
    from gateway.tracing import Tracer

    return Tracer(settings, metrics.degraded.labels("trace").inc)


@lru_cache(maxsize=4096)
def scope_of(tenant: Tenant) -> int:
    """The number that keeps a tenant's sessions apart from all others'."""
    return int.from_bytes(blake2b(tenant.scope, digest_size=8).digest(), "big")
