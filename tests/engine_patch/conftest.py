from __future__ import annotations

import contextlib
from collections.abc import Iterator

import httpx
import pytest

from engine_patch.command import launch_command

PATCH_FLAGS = ("--scheduler-cls", "--middleware")


def patch_flags() -> list[str]:
    """The two flags of the launch line, as the command prints them."""
    command = launch_command("model")
    return [part for flag in PATCH_FLAGS for part in command[command.index(flag) :][:2]]


@pytest.fixture(scope="session")
def stock_and_patched(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[httpx.Client, httpx.Client, httpx.Client]]:
    """Three real vLLM servers with 600 blocks of 32: stock, patched, and patched again."""
    from tests.engine import pods, tiny_model

    small = ["--num-gpu-blocks-override", "600", "--max-model-len", "16384"]
    with contextlib.ExitStack() as stack:
        clients = []
        for name, flags in (
            ("stock", small),
            ("patched", small + patch_flags()),
            ("hinted", small + patch_flags()),
        ):
            directory = tmp_path_factory.mktemp(name)
            model = tiny_model.write(directory / "tiny-qwen2")
            (pod,) = stack.enter_context(pods.running(model, 1, flags))
            client = httpx.Client(base_url=pod.url, timeout=60, trust_env=False)
            clients.append(stack.enter_context(client))
        yield clients[0], clients[1], clients[2]
