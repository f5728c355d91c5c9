"""What real clients sent resolves to the right session, class and wait."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from gateway.dialects import DIALECTS, parse
from gateway.dialects.turn import TurnOutcome
from gateway.sessions import Session
from tests.recordings import SCOPE, Replay, Replayed

SAMPLE = Path(__file__).parent / "data" / "recordings"
WHOLE = Path(__file__).parents[2] / "shared" / "recordings"

EXPECTED = {
    # Runs on one line follow each other. A row is a request: its chain (`main/a` was started by
    # `main`), class, how it was recognised, what the session waits for after the answer, what the
    # wait before it was for, and why its prefix broke.
    ("mini-x2",): """
        one         main        new             tool        -
        two         main        new             tool        -
        one         main        tool_call_id    tool        tool
        two         main        tool_call_id    tool        tool
        one         main        tool_call_id    human       tool
        two         main        tool_call_id    human       tool
    """,
    ("claude-nested",): """
        main        main        x-claude-code-session-id    tool        -
        main/a      subagent    x-claude-code-session-id    tool        -
        main/a/b    subagent    x-claude-code-session-id    tool        -
        main/a/b    subagent    x-claude-code-session-id    ended       tool
        main/a      subagent    x-claude-code-session-id    ended       tool
        main        main        x-claude-code-session-id    tool        tool
        main        main        x-claude-code-session-id    human       tool
    """,
    ("codex-sub",): """
        main        main        thread-id       tool        -
        main/a      subagent    thread-id       tool        -
        main        main        thread-id       tool        tool
        main        main        thread-id       human       tool
        main/b      subagent    thread-id       ended       -
        main/a      subagent    thread-id       ended       tool
    """,
    # Resuming the newest thread resumes a sub-agent's, with what it had done until it was stopped.
    ("codex-sub", "codex-resume"): """
        main        main        thread-id       tool        -
        main/a      subagent    thread-id       tool        -
        main        main        thread-id       tool        tool
        main        main        thread-id       human       tool
        main/b      subagent    thread-id       tool        -
        main/a      subagent    thread-id       ended       tool
        main/b      subagent    thread-id       ended       human
    """,
    ("opencode-task",): """
        main/title  auxiliary   x-session-id    ended       -
        main        main        x-session-id    tool        -
        main/a      subagent    x-session-id    tool        -
        main/b      subagent    x-session-id    tool        -
        main/a      subagent    x-session-id    ended       tool
        main/b      subagent    x-session-id    ended       tool
        main        main        x-session-id    tool        tool
        main        main        x-session-id    human       tool
    """,
    ("aider-multi",): """
        main        main        new             human       -
        main        main        prefix          human       human   edit
        main        main        prefix          human       human   edit
    """,
    # A fork has a new id and the old one's history. A compaction goes on from the whole prefix; its
    # second try rewrites its own last message.
    ("claude-s1", "claude-s2-continue", "claude-s3-fork", "claude-s4-compact"): """
        main        main        x-claude-code-session-id    tool        -
        main        main        x-claude-code-session-id    human       tool
        main        main        x-claude-code-session-id    tool        human
        main        main        x-claude-code-session-id    human       tool
        fork<main   main        x-claude-code-session-id    tool        -
        fork<main   main        x-claude-code-session-id    human       tool
        main        compaction  x-claude-code-session-id    background  human
        main        compaction  x-claude-code-session-id    background  background  edit
    """,
    ("claude-2.1.197",): """
        main/title  auxiliary   x-claude-code-session-id    ended       -
        main        main        x-claude-code-session-id    tool        -
        main        main        x-claude-code-session-id    tool        tool
        main/a      subagent    x-claude-code-session-id    tool        -
        main/a      subagent    x-claude-code-session-id    ended       tool
        main        main        x-claude-code-session-id    human       tool
    """,
    # Two sub-agents and a command go on in the background after the model ended its turn.
    ("claude-hints",): """
        main        main        x-claude-code-session-id    tool        -
        main        main        x-claude-code-session-id    tool        tool
        main        main        x-claude-code-session-id    tool        tool
        main        main        x-claude-code-session-id    tool        tool
        main        main        x-claude-code-session-id    tool        tool
        main        main        x-claude-code-session-id    background  tool
        main/a      subagent    x-claude-code-session-id    tool        -
        main/b      subagent    x-claude-code-session-id    tool        -
        main/a      subagent    x-claude-code-session-id    ended       tool
        main/b      subagent    x-claude-code-session-id    ended       tool
        main        main        x-claude-code-session-id    background  background
        main        main        x-claude-code-session-id    human       background
    """,
    # A permission prompt looks like a running tool; a question is for a person.
    ("claude-tui",): """
        main/title  auxiliary   x-claude-code-session-id    ended       -
        main        main        x-claude-code-session-id    tool        -
        main        main        x-claude-code-session-id    human       tool
        main        main        x-claude-code-session-id    human       human
        main        main        x-claude-code-session-id    human       human
    """,
    # A person stopped the second command.
    ("claude-tui-esc",): """
        main/title  auxiliary   x-claude-code-session-id    ended       -
        main        main        x-claude-code-session-id    tool        -
        main        main        x-claude-code-session-id    tool        tool
        main        main        x-claude-code-session-id    tool        human
        main        main        x-claude-code-session-id    human       tool
    """,
    ("rsn-claude",): """
        main        main        x-claude-code-session-id    tool        -
        main        main        x-claude-code-session-id    human       tool
    """,
    ("cline-basic",): """
        main        main        new             tool        -
        main        main        tool_call_id    tool        tool
        main        main        tool_call_id    human       tool
    """,
    ("continue-basic",): """
        main        main        new             tool        -
        main        main        tool_call_id    tool        tool
        main        main        tool_call_id    human       tool
    """,
    ("mini-basic",): """
        main        main        new             tool        -
        main        main        tool_call_id    tool        tool
        main        main        tool_call_id    human       tool
    """,
    ("codex-basic",): """
        main        main        thread-id       tool        -
        main        main        thread-id       tool        tool
        main        main        thread-id       human       tool
    """,
    # The compaction request offers no tools, so it shares no prefix with the thread it is for. The
    # next window begins with all of the first request's messages.
    ("codex-compact2",): """
        main            main        thread-id   tool        -
        main/compaction compaction  thread-id   ended       -
        main            main        thread-id   human       background
    """,
    ("opencode-basic",): """
        main/title  auxiliary   x-session-id    ended       -
        main        main        x-session-id    tool        -
        main        main        x-session-id    tool        tool
        main        main        x-session-id    human       tool
    """,
    ("opencode-anthropic",): """
        main/title  auxiliary   x-session-id    ended       -
        main        main        x-session-id    tool        -
        main        main        x-session-id    tool        tool
        main        main        x-session-id    human       tool
    """,
    ("opencode-openai",): """
        main/title  auxiliary   x-session-id    ended       -
        main        main        x-session-id    tool        -
        main        main        x-session-id    tool        tool
        main        main        x-session-id    human       tool
    """,
    ("openhands-sdk",): """
        main        main        x-litellm-session-id    tool        -
        main        main        x-litellm-session-id    tool        tool
        main        main        x-litellm-session-id    tool        tool
        main        main        x-litellm-session-id    human       tool
        main        main        x-litellm-session-id    human       human
    """,
    # Nothing in a sub-agent's requests names its parent.
    ("qwen-basic",): """
        main        main        new             tool        -
        main        main        tool_call_id    tool        tool
        main        main        tool_call_id    tool        tool
        main        main        tool_call_id    background  tool
        agent       main        new             tool        -
        agent       main        tool_call_id    human       tool
        main        main        prefix          human       background
    """,
}

CLIENTS = {
    "aider": "openai-sdk",
    "claude": "claude-code",
    "cline": "other",
    "codex": "codex",
    "continue": "openai-sdk",
    "mini": "openai-sdk",
    "opencode": "opencode",
    "openhands": "openai-sdk",
    "qwen": "qwen-code",
    "rsn": "claude-code",
}


class Row(NamedTuple):
    chain: str
    request_class: str
    recognised_by: str
    idle: str
    gap: str
    cause: str = "-"


def rows(table: str) -> list[Row]:
    return [Row(*line.split()) for line in table.strip().splitlines()]


def load(runs: tuple[str, ...]) -> Replay:
    for folder in (SAMPLE, WHOLE):
        paths = [folder / f"{run}.jsonl.gz" for run in runs]
        if all(path.exists() for path in paths):
            return Replay(paths)
    pytest.skip(f"no recordings of {', '.join(runs)}: only a sample is in the repository")


def replay(*runs: str) -> Replay:
    played = load(runs)
    played.play()
    return played


def seen(turn: Replayed, chain: str) -> Row:
    begun = turn.turn
    assert begun is not None
    gap = begun.gap.kind if begun.gap is not None else "-"
    cause = begun.change.cause or "-"
    return Row(chain, begun.request_class, begun.identified_by, turn.idle or "-", gap, cause)


@pytest.mark.parametrize("runs", EXPECTED, ids="+".join)
def test_every_request_is_recognised_and_its_wait_understood(runs: tuple[str, ...]) -> None:
    expected = rows(EXPECTED[runs])
    played = replay(*runs)
    assert [seen(turn, row.chain) for turn, row in zip(played.turns, expected, strict=True)] == [
        *expected
    ]

    sessions: dict[str, Session] = {}
    before: dict[str, Replayed] = {}
    for turn, row in zip(played.turns, expected, strict=True):
        assert sessions.setdefault(row.chain, turn.session) is turn.session
        assert turn.session.client == CLIENTS[runs[0].partition("-")[0]]
        assert turn.turn is not None
        gap = turn.turn.gap
        if (last := before.get(row.chain)) is not None:
            assert gap is not None
            assert gap.seconds == pytest.approx(turn.begins_at - last.ends_at)
            assert gap.tools == tuple(call.name for call in last.answer)
        before[row.chain] = turn
    assert len(played.store) == len(sessions), "each chain is one session, and there is no other"
    for chain, session in sessions.items():
        root, _, rest = chain.partition("/")
        parent = chain.rpartition("/")[0] if rest else None
        origin = chain.partition("<")[2] or None
        assert session.parent == (sessions[parent].sid if parent else None)
        assert session.group == sessions[root].sid
        assert session.forked_from == (sessions[origin].sid if origin else None)


def test_a_fork_knows_how_much_of_its_origin_it_shares() -> None:
    played = replay("claude-s1", "claude-s2-continue", "claude-s3-fork")
    origin, fork = played.turns[3], played.turns[4]
    assert fork.turn is not None
    assert origin.turn is not None
    sid, shared_tokens = fork.turn.forked_from or ("", 0)
    assert sid == origin.session.sid
    assert shared_tokens == origin.turn.prompt_tokens, "all of the origin's latest prompt"


def test_two_runs_alike_are_told_apart_by_the_ids_of_their_calls_alone() -> None:
    """Had each got the other's answers, each would be taken for the other."""
    played = load(("mini-x2",))
    first, second = played.turns[:2]
    first.answer, second.answer = second.answer, first.answer
    played.play()
    owners = [turn.session for turn in played.turns]
    assert owners[0] is not owners[1]
    assert owners[2:] == [owners[1], owners[0], owners[1], owners[0]]


def next_request(played: Replay, change: str) -> tuple[str | None, int]:
    """Send the recording's last request once more, changed; what broke and how much was lost."""
    last = played.turns[-1]
    body = copy.deepcopy(last.recorded.body)
    if change == "ToolSearch":
        body["tools"].append({"name": "found", "description": "", "input_schema": {}})
    if change == "date":
        body["system"][-1]["text"] += "Today is another day."
    if change == "summary":
        text = "This session is being continued from a previous conversation that ran out of room."
        body["messages"] = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    if change == "model":
        body["model"] = "another"
    dialect = next(d for d in DIALECTS if d.wire == last.recorded.request.wire)
    request = parse(dialect, json.dumps(body).encode())
    turn = played.store.begin(last.recorded.headers, request, "tenant", SCOPE, last.ends_at + 1)
    played.store.end(turn, TurnOutcome(), last.ends_at + 2)
    assert turn.session is last.session
    return turn.change.cause, turn.change.lost_bytes


@pytest.mark.parametrize(
    ("change", "cause", "kept"),
    [
        ("nothing", None, "all"),
        ("ToolSearch", "tools", "nothing"),
        ("date", "system", "tools"),
        ("summary", "compaction", "system"),
        ("model", "model", "nothing"),
    ],
)
def test_a_broken_prefix_is_told_by_its_cause(change: str, cause: str | None, kept: str) -> None:
    played = replay("claude-nested")
    prefix = played.turns[-1].session.prefix
    assert prefix is not None
    total_bytes = prefix.total_bytes
    kept_bytes = {
        "all": total_bytes,
        "nothing": 0,
        "tools": prefix.end_bytes[0],
        "system": prefix.end_bytes[1],
    }[kept]
    assert next_request(played, change) == (cause, total_bytes - kept_bytes)
