"""`cachewise serve` in a process of its own, one of several."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx

DEADLINE_S = 30.0


class Replica:
    """A gateway that runs from `start` to `stop` or `kill`."""

    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.jsonl"
        clean = {n: v for n, v in os.environ.items() if not n.startswith("CACHEWISE_")}
        with self.log.open("w") as err:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "gateway.cli", "serve"),
                    *("--port", "0", "--log-format", "json"),
                    *arguments,
                ],
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env=clean | {"XDG_STATE_HOME": str(folder)} | env,
            )
        self.url = ""

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready", trust_env=False).status_code == 200:
                    return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        """The sum over the samples of a metric (with labels: the one); 0 if there is none."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        labels = "" if "{" in name else r"(?:\{[^\n]*\})?"
        found = re.findall(rf"^{re.escape(name)}{labels} (\S+)$", text, re.MULTILINE)
        return sum(float(value) for value in found)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> int:
        """As an orchestrator does; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.kill()
