"""Start and stop real vLLM servers on the CPU."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.engine import tiny_model
from tests.ports import free_port

MODEL = "tiny"
BLOCK_SIZE_TOKENS = 32
NUM_BLOCKS = 2 * tiny_model.MAX_MODEL_LEN // BLOCK_SIZE_TOKENS
START_TIMEOUT_S = 300.0
GATEWAY_START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
CPU_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CACHE_ROOT": str(Path(__file__).parents[2] / ".cache" / "vllm"),
}
"""What vLLM needs to know where there is no GPU, no network and few cores. A server that finds what
another has learned of the model's class is up in three quarters of the time."""


@dataclass(frozen=True)
class VllmPod:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def log_tail(self) -> str:
        """Its last lines, and before them those that name an error, whose cause comes first."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines[:-20] if re.search(r"\bERROR\b|Error\b", line)]
        return "\n".join(errors[:20] + lines[-20:])


@contextlib.contextmanager
def running(model: Path, count: int) -> Iterator[list[VllmPod]]:
    """`count` ready vLLM servers of the model in `model`; none is left behind."""
    with running_each(model, [Launch()] * count) as pods:
        yield pods


@dataclass(frozen=True)
class Launch:
    """What one server has beside the flags of all."""

    flags: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def running_each(model: Path, launches: Sequence[Launch]) -> Iterator[list[VllmPod]]:
    """A ready vLLM server for each of `launches`; none is left behind."""
    with _ended_after() as pods:
        for number, launch in enumerate(launches):
            pods.append(_spawn(model, model.parent / f"pod-{number}.log", launch))
        _wait_until_ready(pods)
        yield pods


@contextlib.contextmanager
def running_line(
    command: Sequence[str], port: int, folder: Path, environment: Mapping[str, str]
) -> Iterator[VllmPod]:
    """A ready vLLM server started by a whole launch line, in `folder`; it listens at `port`."""
    with _ended_after() as pods:
        pods.append(_start(command, port, folder, folder / "pod.log", environment))
        _wait_until_ready(pods)
        yield pods[0]


@contextlib.contextmanager
def _ended_after() -> Iterator[list[VllmPod]]:
    """A list of servers, ended with the block."""
    pods: list[VllmPod] = []
    try:
        yield pods
    finally:
        for pod in pods:
            _signal(pod, signal.SIGTERM)
        for pod in pods:
            with contextlib.suppress(subprocess.TimeoutExpired):
                pod.process.wait(STOP_TIMEOUT_S)
            _signal(pod, signal.SIGKILL)
            pod.process.wait()


@contextlib.contextmanager
def gateway(
    pods: Sequence[VllmPod], log: Path, settings: Mapping[str, str] | None = None
) -> Iterator[str]:
    """`cachewise serve` in front of `pods`, with `settings` as variables; yields its URL."""
    flags = [flag for pod in pods for flag in ("--pod", pod.url)]
    command = [str(Path(sys.executable).with_name("cachewise")), "serve", "--port", "0", *flags]
    environment = os.environ | (settings or {})
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield _ready_gateway(process, log)
    finally:
        process.terminate()
        process.wait(30)


def _ready_gateway(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + GATEWAY_START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        found = re.search(r"on (http://127\.0\.0\.1:\d+)", log.read_text())
        with contextlib.suppress(httpx.TransportError):
            if found and httpx.get(f"{found[1]}/ready", trust_env=False).status_code == 200:
                return found[1]
        time.sleep(0.2)
    raise RuntimeError(f"the gateway did not become ready:\n{log.read_text()}")


def _spawn(model: Path, log: Path, launch: Launch) -> VllmPod:
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model.name, "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16"),
        *("--block-size", str(BLOCK_SIZE_TOKENS)),
        *("--num-gpu-blocks-override", str(NUM_BLOCKS)),
        *("--max-model-len", str(tiny_model.MAX_MODEL_LEN)),
        "--enable-prompt-tokens-details",
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        # A random model calls tools well only under a grammar that leaves it no blanks.
        *("--tool-strict-level", "parameter"),
        *(
            "--structured-outputs-config",
            '{"backend": "xgrammar", "disable_any_whitespace": true}',
        ),
        *launch.flags,
    ]
    environment = CPU_ENVIRONMENT | {
        "VLLM_CONFIG_ROOT": str(model.parent / "config"),
        **launch.environment,
    }
    return _start(command, port, model.parent, log, environment)


def _start(
    command: Sequence[str], port: int, folder: Path, log: Path, environment: Mapping[str, str]
) -> VllmPod:
    inherited = {key: value for key, value in os.environ.items() if "PROXY" not in key.upper()}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=inherited | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return VllmPod(f"http://127.0.0.1:{port}", process, log)


def _wait_until_ready(pods: Sequence[VllmPod]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    for pod in pods:
        while not _is_ready(pod):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"vLLM is not ready after {START_TIMEOUT_S:g} s:\n{pod.log_tail()}"
                )
            time.sleep(0.5)


def _is_ready(pod: VllmPod) -> bool:
    if pod.process.poll() is not None:
        raise RuntimeError(f"vLLM ended with {pod.process.returncode}:\n{pod.log_tail()}")
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{pod.url}/health", trust_env=False).is_success
    return False


def _signal(pod: VllmPod, number: signal.Signals) -> None:
    """To the whole group: the engine core is a process of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pod.process.pid, number)
