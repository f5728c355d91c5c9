"""A gateway in a process of its own whose recording can be switched on and off."""

import gc
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway import cli
from gateway.config import load_settings
from gateway.logs import logging_to

FLUSH_S = 0.5
"""The recorder writes so often."""


class Served:
    """The gateway while the context lasts, and what it is asked for."""

    def __init__(self, engine_url: str, directory: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._asking, asked = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(asked, engine_url, directory), daemon=True
        )
        self.url = ""

    def __enter__(self) -> Self:
        self._process.start()
        self.url = f"http://127.0.0.1:{self._asking.recv()}"
        time.sleep(3)  # its first probes
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.join()

    def record(self, on: bool) -> None:
        self._asking.send(on)
        self._asking.recv()

    def cpu_s(self) -> float:
        """CPU time of the process so far, all threads."""
        self._asking.send("cpu")
        seconds: float = self._asking.recv()
        return seconds

    def counts(self) -> tuple[int, int]:
        """Turns lost and recorded."""
        self._asking.send("counts")
        lost, recorded = self._asking.recv()
        return int(lost), int(recorded)


def _serve(asked: Connection, engine_url: str, directory: Path) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    record = {"directory": str(directory)}
    flags = {"pods": [engine_url], "port": 0, "record": record, "forecast": {"state_file": "off"}}
    settings = load_settings(flags, None, {})
    listening = cli.listen(settings)
    with logging_to(settings.log):
        from gateway.app import create_app
        from gateway.recorder import recorder as module

        module.FLUSH_S = FLUSH_S  # type: ignore[misc]
        app = create_app(settings)
        gateway = app.gateway
        recorder = gateway.recorder
        metrics = gateway.metrics

        def answer() -> None:
            while True:
                question = asked.recv()
                if question == "cpu":
                    asked.send(time.process_time())
                elif question == "counts":
                    lost = sum(child._value.get() for child in metrics.recording_lost.values())
                    asked.send((lost, metrics.recorded_turns._value.get()))
                else:
                    gateway.recorder = recorder if question else None
                    asked.send(None)

        asked.send(listening.getsockname()[1])
        threading.Thread(target=answer, daemon=True).start()
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        cli.server(settings, app).run(sockets=[listening])
