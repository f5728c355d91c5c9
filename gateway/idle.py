"""Why a session is idle: waiting for a tool, for a person, for something it left in the background.

The rules are those of `clients.md` §4. They look at the tool calls of the last response and, on
return, at what the client sent; nothing here keeps state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from gateway.dialects.turn import Item, ToolCall, ToolResult

IdleKind = Literal["tool", "human", "background", "ended"]

ASKS_HUMAN = frozenset(
    {
        "AskQuestion",
        "AskUserQuestion",
        "ExitPlanMode",
        "ask_followup_question",
        "ask_question",
        "ask_user",
        "ask_user_question",
        "attempt_completion",
        "exit_plan_mode",
        "finish",
        "plan_mode_respond",
        "question",
        "request_user_input",
    }
)
"""Tools that wait for a person, over all clients."""

STARTS_BACKGROUND = frozenset({"CronCreate", "Monitor", "ScheduleWakeup", "loop_wakeup", "monitor"})
"""Tools after which the client itself calls again, later, on its own."""

_ENDS_RUN = re.compile(r':\s*"echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT')
"""mini-swe-agent's last command: it does not come back."""

_BACKGROUND_FLAG = re.compile(r'"(?:run_in_background|is_background)"\s*:\s*true')
_BACKGROUND_RESULT = re.compile(
    r"Command running in background with ID|Async agent launched|Background agent launched"
)
_NOTIFICATION = "<task-notification>"
_CLIENT_SPEAKS = (
    _NOTIFICATION,
    "Another language model started to solve this problem",
    "This session is being continued from a previous conversation",
)
"""A user message that holds one of these was written by the client itself: news of a background
task, the summary that a compaction left."""
_AGENT_NEWS = "<subagent_notification>"
"""Codex adds such a message, of a sub-agent that has ended, behind whatever it sends next."""
_NOTIFIED_CALL = re.compile(r"<tool-use-id>\s*([^<\s]{1,256})\s*</tool-use-id>")


def starts_background(call: ToolCall) -> bool:
    """Whether the call leaves something running that will wake the client."""
    return call.name in STARTS_BACKGROUND or _BACKGROUND_FLAG.search(call.arguments) is not None


def went_to_background(result: ToolResult) -> bool:
    """Whether a tool's answer says that it goes on in the background."""
    return _BACKGROUND_RESULT.search(result.head[:400]) is not None


def notified_calls(item: Item) -> list[str] | None:
    """The background calls that a message reports as finished; None if it reports none."""
    if _NOTIFICATION not in item.text:
        return None
    return _NOTIFIED_CALL.findall(item.text)


def idle_after(calls: Iterable[ToolCall], in_background: bool) -> IdleKind:
    """What a session waits for after a response with these tool calls."""
    calls = list(calls)
    if any(_ENDS_RUN.search(call.arguments) for call in calls):
        return "ended"
    names = [call.name for call in calls]
    if any(name in ASKS_HUMAN for name in names):
        return "human"
    if names:
        return "tool"
    return "background" if in_background else "human"


def resumed_by(last: Item) -> IdleKind | None:
    """What ended the wait, told from the request's last message: only tool results → the tools;
    a person's text → a person; a message the client made by itself → the background. None if it
    does not tell (an assistant message last, say)."""
    if _AGENT_NEWS in last.text:
        return None
    if any(mark in last.text for mark in _CLIENT_SPEAKS):
        return "background"
    if last.role == "tool":
        return "tool"
    if last.role == "user":
        if last.text:
            return "human"
        return "tool" if last.results else "background"
    return None


def waited_for(expected: IdleKind, resumed: IdleKind | None) -> IdleKind:
    """What a wait that has ended was really for. A question to a person comes back as a tool
    result; a tool wait cut short by a person comes back as text."""
    if resumed is None:
        return expected
    if resumed == "tool" and expected == "human":
        return "human"
    return resumed
