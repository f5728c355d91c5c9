from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from engine_patch.command import launch_command
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.engine.pods import Launch

SMALL = ("--num-gpu-blocks-override", "600", "--max-model-len", "16384")
API_KEY, HINTS_TOKEN = "the-api-key", "the-hints-token"


def patch_flags(*flags: str) -> list[str]:
    """The patch's flags of the launch line, as the command prints them."""
    command = launch_command("model")
    chosen = flags or ("--scheduler-cls", "--middleware")
    return [part for flag in chosen for part in command[command.index(flag) :][:2]]


@dataclass(frozen=True)
class Pod:
    """A real vLLM server with 600 blocks of 32."""

    client: httpx.Client
    log: Path
    kv_events: tuple[str, str] | None = None
    """Where it publishes and replays its KV events."""

    def logged(self, text: str) -> int:
        """How often the server has logged it."""
        return self.log.read_text(errors="replace").count(text)


@contextlib.contextmanager
def small_pods(directory: Path, launches: Sequence[Launch]) -> Iterator[list[Pod]]:
    """One server for each of `launches` (see `tests.engine.pods.Launch`)."""
    from tests.engine import pods, tiny_model

    model = tiny_model.write(directory / "tiny-qwen2")
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(pods.running_each(model, launches))
        clients = [httpx.Client(base_url=s.url, timeout=60, trust_env=False) for s in servers]
        yield [
            Pod(stack.enter_context(client), server.log, _events_of(launch))
            for client, server, launch in zip(clients, servers, launches, strict=True)
        ]


def publishing() -> list[str]:
    """Flags of a pod that publishes KV events at ports of its own."""
    config = {"enable_kv_cache_events": True, "publisher": "zmq"}
    for name in ("endpoint", "replay_endpoint"):
        config[name] = f"tcp://*:{free_port()}"
    return ["--kv-events-config", json.dumps(config)]


def _events_of(launch: Launch) -> tuple[str, str] | None:
    flags = list(launch.flags)
    if "--kv-events-config" not in flags:
        return None
    config = json.loads(flags[flags.index("--kv-events-config") + 1])
    endpoint, replay = (config[n] for n in ("endpoint", "replay_endpoint"))
    return endpoint.replace("*", "127.0.0.1"), replay.replace("*", "127.0.0.1")


@dataclass(frozen=True)
class Pods:
    """Started together, for all tests of the folder."""

    stock: Pod
    """vLLM's own scheduler behind the middleware."""
    patched: Pod
    guarded: Pod
    """Patched, with an API key and a hints token."""


@pytest.fixture(scope="package")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    from tests.engine.pods import Launch

    launches = [
        Launch(
            [*SMALL, *patch_flags("--middleware"), *publishing()], {"VLLM_SERVER_DEV_MODE": "1"}
        ),
        Launch([*SMALL, *patch_flags(), *publishing()], {"VLLM_SERVER_DEV_MODE": "1"}),
        Launch(
            [*SMALL, *patch_flags(), "--api-key", API_KEY], {"CACHEWISE_HINTS_TOKEN": HINTS_TOKEN}
        ),
    ]
    with small_pods(tmp_path_factory.mktemp("pods"), launches) as started:
        yield Pods(*started)


@pytest.fixture(scope="module")
def switched_off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """The patch's launch line with `CACHEWISE_PATCH=off`."""
    from tests.engine.pods import Launch

    launch = Launch([*SMALL, *patch_flags()], {"CACHEWISE_PATCH": "off"})
    with small_pods(tmp_path_factory.mktemp("off"), [launch]) as (pod,):
        yield pod
