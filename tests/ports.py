"""Ports for servers that cannot choose one themselves."""

from __future__ import annotations

import random
import socket

LOW, HIGH = 20_000, 32_000
"""Below those that the kernel gives to outgoing connections: of these, a server that binds its port
half a minute after it was found free may find it taken."""


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    while True:
        port = random.SystemRandom().randrange(LOW, HIGH)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
