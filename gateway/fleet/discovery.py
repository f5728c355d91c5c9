"""Where pods come from: what a source says, and the sources there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Never, Protocol

if TYPE_CHECKING:
    from gateway.config import DiscoverySettings


@dataclass(frozen=True, slots=True)
class Found:
    """One address as a source sees it now."""

    name: str
    url: str
    start: str | None = None
    """Identity of the engine's start; another one under the same name is another engine, with an
    empty cache. None while the source cannot tell."""
    serving: bool = True
    """Whether the source deems it fit for new turns."""
    leaving: bool = False
    """It is being stopped: no new turns, running ones finish."""


class Discovery(Protocol):
    """A source of pods. Tells of *all* of them each time something changed, never of a part."""

    @property
    def failures(self) -> int:
        """Times the source could not be asked, since the start."""
        ...

    async def run(self, found: Callable[[Sequence[Found]], None]) -> Never:
        """Call `found` with every pod whenever that changes. Outlives faults of the source, and
        says nothing while it knows nothing."""
        ...


def discovery(settings: DiscoverySettings) -> Discovery | None:
    """The source that the settings name; None for the pods of the settings alone.

    Raises `ConfigError` if it cannot be used here."""
    if settings.kind == "dns":
        from gateway.fleet.dns import DnsDiscovery

        assert settings.dns_name is not None
        return DnsDiscovery(
            settings.dns_name,
            port=settings.port,
            scheme=settings.scheme,
            interval_s=settings.interval_s,
        )
    if settings.kind == "kubernetes":
        from gateway.fleet.kubernetes import KubernetesDiscovery

        return KubernetesDiscovery(
            service=settings.service,
            selector=settings.selector,
            namespace=settings.namespace,
            port=settings.port,
            scheme=settings.scheme,
        )
    return None
