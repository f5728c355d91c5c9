"""How each contender is installed and started."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.bodies import chat_body

ROOT = Path(__file__).resolve().parents[2]
PEER_BIN = ROOT / ".venv-bench" / "bin"
PEERS = ("sglang-router==0.3.2", "vllm-router==0.1.17")
REFERENCE = "sglang-router"
START_TIMEOUT_S = 20.0


class UnavailableError(Exception):
    """A contender cannot run here; the text says why, in a few words."""


@dataclass(frozen=True)
class Contender:
    """A command line in which `{port}`, `{engine}` and `{metrics}` (a free port) are filled in."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    peer: bool = False

    def check(self) -> None:
        """Raise UnavailableError where it cannot be started."""
        if self.peer and not Path(self.command[0]).exists():
            raise UnavailableError("not installed")
        if self.name == "cachewise" and importlib.util.find_spec("gateway.cli") is None:
            raise UnavailableError("not built: no gateway.cli")


def _peer(name: str, *command: str) -> Contender:
    flags = "--host 127.0.0.1 --port {port} --worker-urls {engine}"
    flags += " --prometheus-port {metrics} --worker-startup-check-interval 1"
    return Contender(name, (str(PEER_BIN / command[0]), *command[1:], *flags.split()), peer=True)


CONTENDERS = (
    Contender(
        "bare",
        (
            *(sys.executable, "-m", "uvicorn", "bench.overhead.bare_relay:app"),
            *["--port", "{port}", "--loop", "uvloop", "--http", "httptools"],
            *["--no-access-log", "--log-level", "warning"],
        ),
        {"BENCH_UPSTREAM": "{engine}"},
    ),
    _peer("sglang-router", "python", *["-m", "sglang_router.launch_router", "--log-level", "warn"]),
    _peer("vllm-router", "vllm-router", *["--log-level", "warning"]),
    Contender(
        "cachewise",
        (
            str(Path(sys.executable).with_name("cachewise")),
            *["serve", "--pod", "{engine}", "--port", "{port}"],
        ),
    ),
)


def install_peers() -> None:
    """Install the peers into a venv of the benchmark's own, unless they are there."""
    if all((PEER_BIN / name).exists() for name in ("sglang-router", "vllm-router")):
        return
    try:
        subprocess.run([sys.executable, "-m", "venv", str(PEER_BIN.parent)], check=True)
        pip = [str(PEER_BIN / "python"), "-m", "pip", "install", "--quiet", *PEERS]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=300)
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"pip: {(error.stderr or str(error)).strip()[-300:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(str(error)) from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(
    command: list[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a group of its own, ended with all it started."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | env,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if child.poll() is None:
                    os.killpg(child.pid, number)
                    try:
                        child.wait(5)
                    except subprocess.TimeoutExpired:
                        continue


def wait_ready(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    """Until a chat request is answered; else UnavailableError with the end of the log."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", chat_body(0), {"content-type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with opener.open(request, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    tail = log.read_text(errors="replace").strip()[-400:]
    raise UnavailableError(f"did not start: {tail or 'no output'}")


@contextmanager
def running(contender: Contender, engine_url: str, logs: Path) -> Iterator[tuple[str, int]]:
    """Start a contender in front of the engine; yields its URL and its process id."""
    contender.check()
    names = {"port": str(free_port()), "metrics": str(free_port()), "engine": engine_url}
    command = [part.format_map(names) for part in contender.command]
    env = {key: value.format_map(names) for key, value in contender.env.items()}
    log = logs / f"{contender.name}.log"
    url = f"http://127.0.0.1:{names['port']}"
    with process(command, log, env) as child:
        wait_ready(url, child, log)
        yield url, child.pid


@contextmanager
def engine(logs: Path) -> Iterator[str]:
    """The mock engine; yields its URL."""
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", logs / "engine.log"
    command = [sys.executable, "-m", "bench.overhead.mock_engine", str(port)]
    with process(command, log, {}) as child:
        wait_ready(url, child, log)
        yield url
