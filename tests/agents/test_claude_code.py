"""Claude Code, unmodified, through the gateway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.agents.script import bash, call, prompt, turn
from tests.agents.serving import Serving

pytestmark = [pytest.mark.agents, pytest.mark.timeout(600)]


def test_a_run_with_a_sub_agent_is_two_sessions_of_one_group(
    gateway: Serving, claude: Callable[..., dict[str, Any]]
) -> None:
    errand = prompt("Report.", turn(bash("echo from below")), turn(text="Nothing to report."))
    agent = call(
        "Agent",
        description="a probe",
        prompt=errand,
        subagent_type="general-purpose",
        run_in_background=False,
    )
    task = prompt(
        "Look around.",
        turn(bash("sleep 0.3; echo one")),
        turn(bash("echo two"), bash("echo three"), text="Two at once."),
        turn(agent),
        turn(text="All done."),
    )
    with gateway.watched() as found:
        result = claude(task)

    assert result["subtype"] == "success"
    assert result["result"] == "All done."
    assert result["permission_denials"] == []
    main, below = found
    assert [session["client"] for session in found] == ["claude-code"] * 2
    assert [session["identified_by"] for session in found] == ["x-claude-code-session-id"] * 2
    assert (main["class"], main["parent"], main["group"]) == ("main", None, main["id"])
    assert (below["class"], below["parent"], below["group"]) == ("subagent", main["id"], main["id"])

    assert (main["turns"], main["tool_calls"], main["prefix_breaks"]) == (4, 4, 0)
    assert [(gap["kind"], gap["tools"]) for gap in main["gaps"]] == [
        ("tool", ["Bash"]),
        ("tool", ["Bash", "Bash"]),
        ("tool", ["Agent"]),
    ]
    assert main["gaps"][0]["seconds"] > 0.3
    assert (main["state"], main["idle_kind"]) == ("idle", "human")

    assert (below["turns"], below["tool_calls"], below["prefix_breaks"]) == (2, 1, 0)
    assert [(gap["kind"], gap["tools"]) for gap in below["gaps"]] == [("tool", ["Bash"])]
    assert below["state"] == "ended"
    assert main["gaps"][2]["seconds"] > below["gaps"][0]["seconds"], "its parent waited for it all"

    for session in found:
        turns = gateway.turns(session)
        assert len({turn["pod"] for turn in turns}) == 1
        for now in turns[1:]:
            assert now["cached_tokens"] > 0.9 * now["prompt_tokens"]


def test_what_goes_on_in_the_background_is_not_a_wait_for_a_person(
    gateway: Serving, claude: Callable[..., dict[str, Any]]
) -> None:
    task = prompt(
        "Start it.",
        turn(bash("sleep 1; echo ready", run_in_background=True)),
        turn(text="It is started."),
        turn(text="It has ended."),
    )
    with gateway.watched() as found:
        result = claude(task)
    assert result["result"] == "It has ended."
    (session,) = found
    assert [gap["kind"] for gap in session["gaps"]] == ["tool", "background"]
    assert session["in_background"] == 0
    assert session["idle_kind"] == "human"


def test_a_continued_conversation_is_the_same_session_and_a_fork_knows_its_origin(
    gateway: Serving, claude: Callable[..., dict[str, Any]]
) -> None:
    with gateway.watched() as found:
        first = claude(prompt("Begin.", turn(bash("echo one")), turn(text="Begun.")))
        again = claude("Go on.", "--resume", first["session_id"])
        other = claude("Go another way.", "--resume", first["session_id"], "--fork-session")
    assert again["session_id"] == first["session_id"] != other["session_id"]
    session, fork = found
    assert (session["turns"], session["prefix_breaks"]) == (3, 0)
    assert [gap["kind"] for gap in session["gaps"]] == ["tool", "human"]
    assert fork["forked_from"] == session["id"]
    assert fork["pod"] == session["pod"], "where the history it shares is in the cache"
    assert fork["cached_tokens"] > 0.9 * fork["prompt_tokens"]


def test_a_compaction_goes_on_from_the_whole_prefix_and_breaks_it_afterwards(
    gateway: Serving, claude: Callable[..., dict[str, Any]]
) -> None:
    # The last answer serves the run and the compaction, which leaves it out and asks anew.
    steps = [turn(bash(f"seq {number}")) for number in range(4)]
    task = prompt("Begin.", *steps, turn(text="<summary>We have begun.</summary>"))
    with gateway.watched() as found:
        first = claude(task)
        claude("/compact", "--resume", first["session_id"])
        claude("Go on.", "--resume", first["session_id"])
    (session,) = found
    *_, last, compaction, after = gateway.turns(session)
    assert [t["class"] for t in (last, compaction, after)] == ["main", "compaction", "main"]
    # Of the last prompt not its end, where the answer begins, nor a block that is not full then.
    assert compaction["cached_tokens"] > last["prompt_tokens"] - 2 * 16
    assert "prefix_break" not in compaction
    assert after["prefix_break"] == "compaction"
    assert after["cached_tokens"] < last["prompt_tokens"]
    assert session["prefix_breaks"] == 1
