"""Pods by DNS: the addresses of a name, asked for again and again.

A headless Service answers with one address for each pod (A, AAAA), or for its named port with one
target for each pod (SRV). DNS knows neither readiness nor restarts: the prober does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Final, Never

import dns.asyncresolver
import dns.exception
import dns.rdata
import dns.rdtypes.IN.A
import dns.rdtypes.IN.AAAA
import dns.rdtypes.IN.SRV
import dns.resolver
from dns.rdatatype import AAAA, SRV, A, RdataType

from gateway.fleet.discovery import Found

logger = logging.getLogger("gateway.fleet")

DEFAULT_PORT: Final = 8000
LIFETIME_S: Final = 4.0
"""Longest wait for the answer to one question, all servers and tries together."""
EMPTY_AFTER: Final = 3
"""So many times in a row a name without addresses is taken for a fault of DNS, not for a fleet
without pods."""


class DnsDiscovery:
    """The addresses of ``name``; of an SRV name (``_http._tcp.…``) its targets.

    A name with both A and AAAA records counts by its A records: in a dual-stack cluster these are
    the same pods.
    """

    def __init__(
        self,
        name: str,
        *,
        port: int | None,
        scheme: str,
        interval_s: float,
        resolver: dns.asyncresolver.Resolver | None = None,
    ) -> None:
        self.name = name
        self.port = port
        self.scheme = scheme
        self.interval_s = interval_s
        self.failures = 0
        self._resolver = resolver
        self._empty = 0
        self._failed = False

    async def run(self, found: Callable[[Sequence[Found]], None]) -> Never:
        """See `Discovery.run`."""
        last: list[Found] | None = None
        while True:
            now = await self._ask()
            if now is not None and now != last:
                found(now)
                last = now
            await asyncio.sleep(self.interval_s)

    async def _ask(self) -> list[Found] | None:
        """All pods, or None if the answer is not to be relied on."""
        try:
            now = await self.resolve()
        except (dns.exception.DNSException, OSError) as error:
            self.failures += 1
            if not self._failed:
                logger.warning("DNS: %s cannot be resolved: %s", self.name, error)
            self._failed = True
            return None
        if self._failed:
            logger.info("DNS: %s can be resolved again", self.name)
        self._failed = False
        self._empty = 0 if now else self._empty + 1
        return now if now or self._empty >= EMPTY_AFTER else None

    async def resolve(self) -> list[Found]:
        """All pods, in a stable order. Raises `DNSException` where DNS does not answer; a name that
        does not exist has no pods."""
        if self._resolver is None:
            self._resolver = dns.asyncresolver.Resolver()
        if not self.name.startswith("_"):
            port = self.port or DEFAULT_PORT
            hosts = [_host(address) for address in await self._addresses(self.name)]
            return [Found(f"{host}:{port}", f"{self.scheme}://{host}:{port}") for host in hosts]
        targets = sorted(
            {
                (record.target.to_text(), self.port or record.port)
                for record in await self._query(self.name, SRV)
                if isinstance(record, dns.rdtypes.IN.SRV.SRV)
            }
        )
        addresses = await asyncio.gather(*(self._addresses(target) for target, _ in targets))
        return [
            Found(
                f"{target.rstrip('.')}:{port}",
                f"{self.scheme}://{_host(known[0])}:{port}",
                start=known[0],
            )
            for (target, port), known in zip(targets, addresses, strict=True)
            if known
        ]

    async def _addresses(self, name: str) -> list[str]:
        four, six = await asyncio.gather(self._query(name, A), self._query(name, AAAA))
        found = {
            record.address
            for record in four or six
            if isinstance(record, dns.rdtypes.IN.A.A | dns.rdtypes.IN.AAAA.AAAA)
        }
        return sorted(found, key=lambda address: ip_address(address).packed)

    async def _query(self, name: str, kind: RdataType) -> list[dns.rdata.Rdata]:
        assert self._resolver is not None
        try:
            answer = await self._resolver.resolve(name, kind, lifetime=LIFETIME_S, search=True)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return []
        return list(answer)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
