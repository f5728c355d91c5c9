"""Codex, unmodified, through the gateway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.connect import CLIENTS
from tests.agents.clients import CODEX, Client
from tests.agents.conftest import Workplace
from tests.agents.script import call, prompt, turn
from tests.agents.serving import Serving

pytestmark = [pytest.mark.agents, pytest.mark.timeout(600)]

UNATTENDED = 'approval_policy = "never"\nsandbox_mode = "danger-full-access"\n'


def execute(command: str) -> dict[str, Any]:
    return call("exec_command", cmd=command)


TASK = prompt(
    "Look around.",
    turn(execute("sleep 0.3; echo one")),
    turn(execute("echo two"), execute("echo three"), text="Two at once."),
    turn(execute("echo four")),
    turn(text="All done."),
)


@pytest.mark.parametrize("provider", ["as documented", "built in"])
def test_a_run_is_one_session(
    gateway: Serving, install: Callable[[Client], Path], workplace: Workplace, provider: str
) -> None:
    """The built-in provider tries a WebSocket first and must take the 426 for an answer."""
    program = install(CODEX)
    config = f'model = "embedded"\nopenai_base_url = "{gateway.url}/v1"\n'
    if provider == "as documented":
        setup = next(client.setup for client in CLIENTS if client.name == "Codex")
        config = setup.format(url=gateway.url, model="embedded", key="any")
    folder = workplace.home / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(UNATTENDED + config)

    with gateway.watched() as found:
        out, err = workplace.run(
            program,
            *("exec", "--skip-git-repo-check", TASK),
            RUST_LOG="warn",
            CACHEWISE_KEY="any",
            CODEX_API_KEY="any",
        )
    assert out.strip() == "All done."
    refused = err.count("failed to connect to Responses WebSocket")
    assert refused == (1 if provider == "built in" else 0), "it does not try again"
    (session,) = found
    assert (session["client"], session["identified_by"]) == ("codex", "thread-id")
    assert (session["turns"], session["tool_calls"], session["prefix_breaks"]) == (4, 4, 0)
    assert [(gap["kind"], gap["tools"]) for gap in session["gaps"]] == [
        ("tool", ["exec_command"]),
        ("tool", ["exec_command", "exec_command"]),
        ("tool", ["exec_command"]),
    ]
    assert session["gaps"][0]["seconds"] > 0.3
    assert session["idle_kind"] == "human"
    turns = gateway.turns(session)
    assert len({turn["pod"] for turn in turns}) == 1
    for now in turns[1:]:
        assert now["cached_tokens"] > 0.9 * now["prompt_tokens"]
