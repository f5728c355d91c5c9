"""A real Redis on a port of its own, that can be killed, frozen and started again."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.ports import free_port


class RedisServer:
    """Keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        command = [*("redis-server", "--port", str(self.port), "--bind", "127.0.0.1")]
        command += [*("--save", "", "--appendonly", "no", "--dir", str(self.folder)), *options]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise TimeoutError("redis-server does not listen")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self, frozen: bool) -> None:
        """Let it hold its connections and answer nothing; or go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def cli(self, *arguments: str) -> str:
        done = subprocess.run(
            ["redis-cli", "-p", str(self.port), *arguments],
            capture_output=True,
            check=True,
            encoding="utf-8",
        )
        return done.stdout
