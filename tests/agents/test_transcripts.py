"""The transcripts that real clients leave, read by `gateway.traces`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.connect import CLIENTS
from gateway.traces.load import load
from gateway.traces.session import Call, Session
from tests.agents.clients import CODEX, Client
from tests.agents.conftest import Workplace
from tests.agents.script import bash, call, prompt, turn
from tests.agents.serving import Serving

pytestmark = [pytest.mark.agents, pytest.mark.timeout(600)]


def calls(session: Session) -> list[list[tuple[str, str]]]:
    return [[(call.kind, call.program) for call in turn.calls] for turn in session.turns]


def duration_s(call: Call) -> float:
    assert call.duration_s is not None
    return call.duration_s


def agrees(session: Session, served: dict[str, Any], turns: list[dict[str, Any]]) -> None:
    """A transcript's session is the one that the gateway served."""
    assert len(session.turns) == served["turns"]
    assert [t.prompt_tokens for t in session.turns] == [t["prompt_tokens"] for t in turns]
    assert [t.cached_tokens for t in session.turns] == [t["cached_tokens"] for t in turns]
    assert [t.output_tokens for t in session.turns] == [t["output_tokens"] for t in turns]
    kinds = [gap["kind"] for gap in served["gaps"]]
    assert [t.idle_kind for t in session.turns[:-1]] == kinds
    gaps_s = [gap["seconds"] for gap in served["gaps"]]
    assert [t.gap_s for t in session.turns[1:]] == pytest.approx(gaps_s, abs=1.0)


def test_claude_code(
    gateway: Serving, claude: Callable[..., dict[str, Any]], workplace: Workplace
) -> None:
    def run(task: str, *options: str) -> str:
        name: str = claude(task, *options)["session_id"]
        return name

    errand = prompt("Report.", turn(bash("sleep 0.4; echo below")), turn(text="Nothing."))
    agent = call("Agent", description="a probe", prompt=errand,
                 subagent_type="general-purpose", run_in_background=False)  # fmt: skip
    task = prompt(
        "Look around.",
        turn(bash("sleep 0.6; echo one")),
        turn(bash("echo two"), bash("sleep 0.3; echo three"), text="Two at once."),
        turn(agent),
        turn(text="All done."),
    )
    with gateway.watched() as served:
        name = run(task)
        run("Go on.", "--resume", name)
        run("/compact", "--resume", name)
        run("Go on again.", "--resume", name)
        other = run("Another way.", "--resume", name, "--fork-session")
        waiting = run(
            prompt(
                "Start it.",
                turn(bash("sleep 1; echo ready", run_in_background=True)),
                turn(text="It is started."),
                turn(text="It has ended."),
            )
        )
    trace = load([workplace.home / ".claude" / "projects"])
    assert trace.problems.count == 0
    assert set(trace.formats) == {"claude-code"}
    found = {session.id: session for session in trace.sessions}
    main = found.pop(name)
    (below,) = [session for session in found.values() if session.parent]
    assert calls(main) == [
        [("shell", "sleep")],
        [("shell", "echo"), ("shell", "sleep")],
        [("subagent", "general-purpose")],
        [], [], [],
    ]  # fmt: skip
    assert 0.6 < duration_s(main.turns[0].calls[0]) < 6.0
    assert duration_s(main.turns[1].calls[1]) > 0.3
    assert [t.idle_kind for t in main.turns] == ["tool"] * 3 + ["human"] * 3
    assert [t.compacted for t in main.turns] == [False] * 5 + [True]
    assert main.turns[5].shared < len(list(main.chains())[4])

    assert (below.parent, below.agent_type) == (name, "general-purpose")
    assert main.turns[2].calls[0].child == below.id
    assert calls(below) == [[("shell", "sleep")], []]
    assert below.turns[-1].idle_kind == "ended"
    assert duration_s(main.turns[2].calls[0]) > below.ends_s > 0.4
    agent_served = next(s for s in served if s["class"] == "subagent")
    agrees(below, agent_served, gateway.turns(agent_served))

    assert len(found[other].turns) == 1, "the history it was forked from is not its own"
    assert [t.idle_kind for t in found[waiting].turns] == ["tool", "background", "human"]
    background_served = next(
        s for s in served if s["gaps"] and s["gaps"][-1]["kind"] == "background"
    )
    agrees(found[waiting], background_served, gateway.turns(background_served))
    assert "echo three" not in repr(trace.sessions)


def test_codex(gateway: Serving, install: Callable[[Client], Path], workplace: Workplace) -> None:
    program = install(CODEX)

    def execute(command: str) -> dict[str, Any]:
        return call("exec_command", cmd=command)

    setup = next(client.setup for client in CLIENTS if client.name == "Codex")
    folder = workplace.home / ".codex"
    folder.mkdir()
    unattended = 'approval_policy = "never"\nsandbox_mode = "danger-full-access"\n'
    config = setup.format(url=gateway.url, model="embedded", key="any")
    (folder / "config.toml").write_text(unattended + config)

    def run(*words: str) -> None:
        command = ("exec", "--skip-git-repo-check", *words)
        workplace.run(program, *command, RUST_LOG="warn", CACHEWISE_KEY="any")

    errand = prompt("Report.", turn(execute("sleep 0.3; echo below")), turn(text="Nothing."))
    with gateway.watched() as served:
        run(
            prompt(
                "Look around.",
                turn(execute("sleep 0.6; echo one")),
                turn(execute("echo two"), execute("sleep 0.3; echo three"), text="Two at once."),
                turn(call("spawn_agent", message=errand)),
                turn(execute("sleep 2")),
                turn(text="All done."),
            )
        )
        run("resume", "--last", "Go on.")
    trace = load([folder / "sessions"])
    assert trace.problems.count == 0
    assert set(trace.formats) == {"codex"}
    main, below = sorted(trace.sessions, key=lambda session: session.parent or "")
    assert calls(main) == [
        [("shell", "sleep")],
        [("shell", "echo"), ("shell", "sleep")],
        [("subagent", "")],
        [("shell", "sleep")],
        [], [],
    ]  # fmt: skip
    assert 0.5 < duration_s(main.turns[0].calls[0]) < 6.0
    assert duration_s(main.turns[3].calls[0]) > 1.8
    assert [t.idle_kind for t in main.turns] == ["tool"] * 4 + ["human"] * 2
    assert (below.parent, main.turns[2].calls[0].child) == (main.id, below.id)
    assert calls(below) == [[("shell", "sleep")], []]
    assert below.turns[-1].idle_kind == "ended"
    main_served, below_served = served
    agrees(main, main_served, gateway.turns(main_served))
    agrees(below, below_served, gateway.turns(below_served))
