"""The process under load: embedded pods, each on a port of its own, and a gateway in front of them.

It says where the gateway listens, then takes commands, one a line: ``add`` lets discovery find one
pod more, ``kill NAME`` lets a pod die (its port refuses, its connections are reset, its cache is
gone).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from typing import Never

import uvloop

from gateway import cli
from gateway.app import create_app
from gateway.config import ForecastSettings, PodSettings, Settings
from gateway.embedded.fleet import EmbeddedFleet
from gateway.fleet.discovery import Found


class Announced:
    """A source of pods that finds what it is told."""

    failures = 0

    def __init__(self) -> None:
        self.pods: list[Found] = []
        self.changed = asyncio.Event()

    def announce(self, pod: Found) -> None:
        self.pods.append(pod)
        self.changed.set()

    async def run(self, found: Callable[[Sequence[Found]], None]) -> Never:
        while True:
            found(self.pods)
            self.changed.clear()
            await self.changed.wait()


async def serve(pods: int, speedup: float) -> None:
    """``pods`` of them are there from the start, one more is to be added."""
    async with EmbeddedFleet(pods=pods + 1, speedup=speedup) as fleet:
        names = [f"pod-{n}" for n in range(pods + 1)]
        settings = Settings(
            port=0,
            pods=tuple(
                PodSettings(url=url, name=name)
                for url, name in zip(fleet.urls[:pods], names, strict=False)
            ),
            forecast=ForecastSettings(state_file=None),
            shutdown_grace_s=1.0,
        )
        app = create_app(settings)
        discovery = app.gateway.fleet.discovery = Announced()
        listening = cli.listen(settings)
        server = cli.server(settings, app)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.02)
        say({"url": f"http://127.0.0.1:{listening.getsockname()[1]}"})
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command, _, name = line.strip().partition(" ")
            if command == "add":
                discovery.announce(Found(names[pods], fleet.urls[pods]))
            elif command == "kill":
                await fleet.kill(names.index(name))
            say({"done": line.strip()})
        server.should_exit = True
        await serving


def say(what: dict[str, str]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), float(sys.argv[2])))
