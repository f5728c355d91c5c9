from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agents.clients import CLAUDE_CODE, Client, UnavailableError
from tests.agents.serving import Serving, serving

AGENT_TIMEOUT_S = 90


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`cachewise serve`, with nothing configured."""
    with serving(tmp_path_factory.mktemp("gateway")) as started:
        yield started


@pytest.fixture(scope="session")
def install() -> Callable[[Client], Path]:
    """Gives a client's program. Where it cannot be had the test is skipped; in CI it fails."""

    def get(client: Client) -> Path:
        try:
            return client.installed()
        except UnavailableError as error:
            if os.environ.get("CI"):
                pytest.fail(str(error))
            pytest.skip(str(error))

    return get


class Workplace:
    """An empty home and an empty working directory for one run of an agent."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.work = folder / "work"
        self.home.mkdir(parents=True)
        self.work.mkdir()

    def start(self, *command: str | Path, **env: str) -> subprocess.Popen[str]:
        """Start an agent with nothing of this environment but its `PATH`."""
        return subprocess.Popen(
            command,
            cwd=self.work,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home), "NO_COLOR": "1", **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str | Path, stdin: str = "", **env: str) -> tuple[str, str]:
        """Run an agent to its end; returns what it wrote to its output and its error output."""
        return finish(self.start(*command, **env), stdin)


def finish(process: subprocess.Popen[str], stdin: str = "") -> tuple[str, str]:
    try:
        out, err = process.communicate(stdin, timeout=AGENT_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, f"{out[-4000:]}\n{err[-4000:]}"
    return out, err


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def claude(
    gateway: Serving, install: Callable[[Client], Path], workplace: Workplace
) -> Callable[..., dict[str, Any]]:
    """Runs Claude Code with a prompt; gives the result it prints."""
    program = install(CLAUDE_CODE)

    def run(task: str, *options: str) -> dict[str, Any]:
        out, _ = workplace.run(
            program,
            *("-p", task, "--output-format", "json", "--model", "claude-sonnet-4-5"),
            *("--dangerously-skip-permissions", *options),
            ANTHROPIC_BASE_URL=gateway.url,
            ANTHROPIC_AUTH_TOKEN="any",
            IS_SANDBOX="1",
            DISABLE_AUTOUPDATER="1",
        )
        result: dict[str, Any] = json.loads(out)
        return result

    return run
