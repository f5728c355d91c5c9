"""OpenCode, unmodified, through the gateway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.connect import CLIENTS
from tests.agents.clients import OPENCODE, Client
from tests.agents.conftest import Workplace
from tests.agents.script import call, prompt, turn
from tests.agents.serving import Serving

pytestmark = [pytest.mark.agents, pytest.mark.timeout(600)]


def bash(command: str) -> dict[str, Any]:
    return call("bash", command=command, description="a probe")


def test_title_and_sub_agent_are_sessions_of_the_runs_group(
    gateway: Serving, install: Callable[[Client], Path], workplace: Workplace
) -> None:
    program = install(OPENCODE)
    setup = next(client.setup for client in CLIENTS if client.name == "OpenCode")
    (workplace.work / "opencode.json").write_text(
        setup.format(url=gateway.url, model="embedded", key="any")
    )
    errand = prompt("Report.", turn(bash("echo from below")), turn(text="Nothing to report."))
    task = call("task", description="a probe", prompt=errand, subagent_type="general")
    whole = prompt(
        "Look around.",
        turn(bash("sleep 0.3; echo one")),
        turn(bash("echo two"), bash("echo three"), text="Two at once."),
        turn(task),
        turn(text="All done."),
    )
    with gateway.watched() as found:
        out, _ = workplace.run(program, "run", stdin=whole)
    assert "All done." in out

    by_class = {session["class"]: session for session in found}
    assert len(found) == len(by_class) == 3
    main, title, below = by_class["main"], by_class["auxiliary"], by_class["subagent"]
    for session in found:
        assert (session["client"], session["identified_by"]) == ("opencode", "x-session-id")
        assert session["group"] == main["id"]
    assert (main["parent"], title["parent"], below["parent"]) == (None, main["id"], main["id"])
    assert (main["turns"], main["tool_calls"], main["prefix_breaks"]) == (4, 4, 0)
    assert [(gap["kind"], gap["tools"]) for gap in main["gaps"]] == [
        ("tool", ["bash"]),
        ("tool", ["bash", "bash"]),
        ("tool", ["task"]),
    ]
    assert main["gaps"][0]["seconds"] > 0.3
    assert (main["idle_kind"], title["state"], below["state"]) == ("human", "ended", "ended")
    assert (below["turns"], below["tool_calls"]) == (2, 1)
    turns = gateway.turns(main)
    assert len({turn["pod"] for turn in turns}) == 1
    for now in turns[1:]:
        assert now["cached_tokens"] > 0.9 * now["prompt_tokens"]
