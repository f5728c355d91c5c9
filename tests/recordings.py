"""Recorded requests of real clients, replayed through the session store.

A recording holds a run's requests as the client sent them, long texts replaced by
``<text sha8 length marker>``. The responses were not recorded, but each stands in the request that
came after it; `Replay` reads it from there.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.dialects import DIALECTS, parse
from gateway.dialects.turn import ToolCall, TurnOutcome, TurnRequest
from gateway.idle import IdleKind
from gateway.sessions import Session, SessionStore, Turn

SCOPE = 7
BETWEEN_RUNS_S = 60.0

KNOWN_TEXTS = {
    # Claude Code: sub-agents and a command in the background, and the news that they are done
    "efe3016e": "Async agent launched successfully.",
    "1affee7e": "Async agent launched successfully.",
    "d842bd75": "Command running in background with ID: b1. Output is being written to a file.",
    "3e41524e": "<system-reminder>\n<task-notification>\n"
    "<tool-use-id>toolu_77bc745c16634eb584eae166</tool-use-id>\n<status>completed</status>\n"
    "</task-notification>\n</system-reminder>",
    "6c660e76": "<system-reminder>\n<task-notification>\n"
    "<tool-use-id>toolu_c653f6f98df246b4ac01d941</tool-use-id>\n<status>completed</status>\n"
    "</task-notification>\n</system-reminder>",
    "588fed63": "<system-reminder>\n<task-notification>\n"
    "<tool-use-id>toolu_210776d2aceb40a0911377b4</tool-use-id>\n<status>completed</status>\n"
    "</task-notification>\n</system-reminder>",
    # Qwen Code
    "40aeb05e": "Background agent launched.",
    "b1ec50c1": "<task-notification>\n"
    "<tool-use-id>call_297d1d73aa244ef1b9da</tool-use-id>\n<status>completed</status>\n"
    "</task-notification>",
    # Claude Code's and Codex's wish for a summary; what Codex puts before the summary it got
    "5fa3c91c": "CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.\n\n"
    "Your task is to create a detailed summary of the conversation so far",
    "4901b43c": "CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.\n\n"
    "Your task is to create a detailed summary of the conversation so far, once more",
    "7aa759e5": "You are performing a CONTEXT CHECKPOINT COMPACTION.",
    "a9459a86": "Another language model started to solve this problem and produced a summary",
    # opencode's system prompt for titles
    "84ca74bd": "You are a title generator. You output ONLY a thread title.",
}
"""How texts begin that the gateway must recognise, by their digest in the recordings."""

_HIDDEN = re.compile(r"<text ([0-9a-f]{8}) (\d+)( x-anthropic-billing-header| <[a-z-]+>)?>")


def _shown(hidden: re.Match[str]) -> str:
    digest, length, marker = hidden[1], int(hidden[2]), (hidden[3] or "").strip()
    known = KNOWN_TEXTS.get(digest)
    if known is not None:
        return json.dumps(known)[1:-1]
    if marker.startswith("<"):
        return f"{marker}{digest}</{marker[1:]}"
    text = f"{marker}: {digest} " if marker else f"{digest} "
    return text + "x" * (length - len(text))


@dataclass
class Recorded:
    """One request: when it came in its run, and what the gateway reads of it."""

    at_s: float
    headers: dict[bytes, bytes]
    request: TurnRequest
    body: dict[str, Any]

    @property
    def messages(self) -> list[bytes]:
        return [self.request.item(i).canonical for i in range(2, len(self.request.segments))]


def read(path: Path) -> list[Recorded]:
    """The turns of a recording; what is no turn (``HEAD /api/hello``) is left out."""
    dialects = {dialect.path: dialect for dialect in DIALECTS}
    recorded = []
    with gzip.open(path, "rt") as lines:
        for line in lines:
            row = json.loads(_HIDDEN.sub(_shown, line))
            if row["method"] != "POST":
                continue
            headers = {n.lower().encode(): v.encode("latin-1") for n, v in row["headers"]}
            body = row["body"]
            request = parse(dialects[row["path"]], json.dumps(body).encode())
            recorded.append(Recorded(row["t_rel"], headers, request, body))
    return recorded


def _calls_of(message: dict[str, Any]) -> list[ToolCall]:
    """The tool calls in an assistant's message of any dialect."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        calls.append(ToolCall.of(call["id"], function["name"], function["arguments"]))
    blocks = message["content"] if isinstance(message.get("content"), list) else []
    calls += [
        ToolCall.of(block["id"], block["name"], json.dumps(block["input"]))
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    if message.get("type") == "function_call":
        name = ".".join(filter(None, (message.get("namespace"), message["name"])))
        calls.append(ToolCall.of(message["call_id"], name, message["arguments"]))
    return calls


@dataclass
class Replayed:
    """A request, its answer, and what the store made of it: the turn it began, and what the
    session waited for after the answer."""

    recorded: Recorded
    answer: list[ToolCall] = field(default_factory=list)
    begins_at: float = 0.0
    ends_at: float = 0.0
    turn: Turn | None = None
    idle: IdleKind | None = None

    @property
    def session(self) -> Session:
        assert self.turn is not None
        return self.turn.session


class Replay:
    """Recordings, one run after the other; `play` sends them through one session store, in the
    order of time."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.store = SessionStore(max_sessions=1000, ttl_s=3600)
        self.turns: list[Replayed] = []
        start_s = 1000.0
        for path in paths:
            run = [Replayed(recorded) for recorded in read(path)]
            for turn in run:
                turn.begins_at = start_s + turn.recorded.at_s
            start_s = run[-1].begins_at + BETWEEN_RUNS_S
            self.turns += run
        self._find_answers()

    def _find_answers(self) -> None:
        """Each answer stands in the first later request that goes on from this one. Of two equal
        requests the first takes the first."""
        taken: set[int] = set()
        for number, turn in enumerate(self.turns):
            mine = turn.recorded.messages
            turn.ends_at = turn.begins_at + 0.005
            for later_number, later in enumerate(self.turns[number + 1 :], number + 1):
                theirs = later.recorded.messages
                item = later.recorded.request.item
                if (
                    later_number in taken
                    or len(theirs) <= len(mine)
                    or theirs[: len(mine)] != mine
                    or item(len(mine) + 2).role != "assistant"
                ):
                    continue
                taken.add(later_number)
                body = later.recorded.body
                for index, message in enumerate(body.get("messages") or body["input"]):
                    if index >= len(mine):
                        if item(index + 2).role != "assistant":
                            break
                        turn.answer += _calls_of(message)
                turn.ends_at = min(turn.ends_at, (turn.begins_at + later.begins_at) / 2)
                break

    def play(self) -> None:
        events = [(turn.begins_at, 1, turn) for turn in self.turns]
        events += [(turn.ends_at, 0, turn) for turn in self.turns]
        for now, begins, turn in sorted(events, key=lambda event: event[:2]):
            recorded = turn.recorded
            if begins:
                turn.turn = self.store.begin(
                    recorded.headers, recorded.request, "tenant", SCOPE, now
                )
            else:
                assert turn.turn is not None
                self.store.end(turn.turn, TurnOutcome(tool_calls=turn.answer), now)
                turn.idle = turn.session.idle_kind
