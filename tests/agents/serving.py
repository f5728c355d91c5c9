"""The gateway as its users start it, and what it says of the sessions it served."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

DEADLINE_S = 20.0


class Serving:
    """A running `cachewise serve`, seen from outside."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}/v1/cachewise/{path}").raise_for_status().json()

    def pod_url(self) -> str:
        url: str = self.get("pods")["data"][0]["url"]
        return url

    def session(self, sid: str) -> dict[str, Any]:
        detail: dict[str, Any] = self.get(f"sessions/{sid}")
        return detail

    def sessions(self) -> list[dict[str, Any]]:
        """All sessions in detail, oldest first, once none has a turn in flight."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            listed = self.get("sessions?limit=1000")["data"]
            if not any(session["in_flight"] for session in listed):
                break
            assert time.monotonic() < deadline, "turns are in flight after the client has left"
            time.sleep(0.02)
        listed.sort(key=lambda session: session["created_at"])
        return [self.session(session["id"]) for session in listed]

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[dict[str, Any]]]:
        """Collects the sessions that are new when the block ends."""
        before = {session["id"] for session in self.sessions()}
        found: list[dict[str, Any]] = []
        yield found
        found += [session for session in self.sessions() if session["id"] not in before]

    def turns(self, session: dict[str, Any]) -> list[dict[str, Any]]:
        """The log's lines of a session's turns: one a turn."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            lines = [json.loads(line) for line in self._log.read_text().splitlines()]
            turns = [line for line in lines if line.get("session") == session["id"]]
            if len(turns) >= session["turns"]:
                return turns
            assert time.monotonic() < deadline, "turns are missing in the log"
            time.sleep(0.02)

    def recognised(self) -> dict[str, float]:
        """How many turns were recognised by what."""
        text = httpx.get(f"{self.url}/metrics").raise_for_status().text
        found = re.findall(r'^cachewise_identified_turns_total\{by="([^"]+)"\} (\S+)', text, re.M)
        return {by: float(count) for by, count in found}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Serving]:
    """Start `cachewise serve` on a free port, in front of its two embedded pods; end it by
    SIGTERM."""
    program = Path(sys.executable).with_name("cachewise")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    with log.open("w") as err:
        process = subprocess.Popen(
            [program, "serve", "--port", "0", "--log-format", "json"],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            env={n: v for n, v in os.environ.items() if not n.startswith("CACHEWISE_")},
        )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().split()[-1]
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Serving(url, log)
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
