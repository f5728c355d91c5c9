"""mini-swe-agent, unmodified, through the gateway. It names no session: only the ids of the tool
calls it was given tell its runs apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.agents.clients import MINI_SWE_AGENT, Client
from tests.agents.conftest import Workplace, finish
from tests.agents.script import call, prompt, turn
from tests.agents.serving import Serving

pytestmark = [pytest.mark.agents, pytest.mark.timeout(600)]

DONE = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


def bash(command: str) -> dict[str, Any]:
    return call("bash", command=command)


TASK = prompt(
    "Look around.",
    turn(bash("sleep 0.5; echo one")),
    turn(bash("echo two"), bash("echo three"), text="Two at once."),
    turn(bash("sleep 0.2"), text="Wait."),
    turn(bash(DONE), text="That was all."),
)


def test_runs_alike_at_once_are_told_apart(
    gateway: Serving, install: Callable[[Client], Path], tmp_path: Path
) -> None:
    program = install(MINI_SWE_AGENT)
    before = gateway.recognised()
    with gateway.watched() as found:
        runs = [
            Workplace(tmp_path / name).start(
                program,
                *("-m", "openai/embedded", "-t", TASK, "-y", "--exit-immediately"),
                OPENAI_API_BASE=f"{gateway.url}/v1",
                OPENAI_API_KEY="any",
                MSWEA_CONFIGURED="true",
                MSWEA_COST_TRACKING="ignore_errors",
            )
            for name in ("one", "two")
        ]
        for run in runs:
            out, _ = finish(run)
            assert "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT" in out

    assert len(found) == 2
    for session in found:
        assert (session["turns"], session["tool_calls"]) == (4, 5)
        assert (session["parent"], session["forked_from"]) == (None, None)
        assert session["prefix_breaks"] == 0
        assert [(gap["kind"], gap["tools"]) for gap in session["gaps"]] == [
            ("tool", ["bash"]),
            ("tool", ["bash", "bash"]),
            ("tool", ["bash"]),
        ]
        assert session["gaps"][0]["seconds"] > 0.5
        assert session["gaps"][2]["seconds"] > 0.2
        assert session["state"] == "ended", "its last command says that it does not come back"
        turns = gateway.turns(session)
        assert len({turn["pod"] for turn in turns}) == 1
        cached_tokens = [turn["cached_tokens"] for turn in turns]
        assert cached_tokens == sorted(cached_tokens)
        assert turns[-1]["cached_tokens"] > 0.9 * turns[-1]["prompt_tokens"]
    after = gateway.recognised()
    assert {by: n - before.get(by, 0) for by, n in after.items() if n != before.get(by, 0)} == {
        "new": 2,
        "tool_call_id": 6,
    }
