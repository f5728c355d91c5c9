"""What of a tool call its duration can be told from: a few canonical words and numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from math import log10
from typing import Any, Final, NamedTuple

import orjson

from gateway.dialects.turn import ToolCall
from gateway.predictor.kinds import KINDS, kind_of
from gateway.predictor.shell import UNKNOWN, parse_shell, safe_word

PARSED_CHARS: Final = 16_384
"""Longer arguments are looked into by pattern, not parsed."""
SALVAGED_CHARS: Final = 3_000
DIGEST_CHARS: Final = 2_000
MAX_DECLARED_S: Final = 86_400.0

KIND_INDEX: Final = {kind: float(i) for i, kind in enumerate(KINDS)}


class CallWords(NamedTuple):
    """What names a tool call's nodes. The words are safe to keep
    (`gateway.predictor.shell.safe_word`); ``digest`` tells equal calls within this process and is
    never kept beyond it."""

    kind: str
    tool: str
    program: str
    sub: str
    digest: int


NUMBERS: Final = (
    "kind",
    "argument_chars_log",
    "timeout_log_s",
    "yield_log_s",
    "sleep_log_s",
    "background",
    "commands",
    "pipes",
    "shape",
    "text_size",
)
"""Names of a call's numbers, in order."""

WRAPPER: Final = "tool_call"
"""Qwen Code wraps MCP tools in this one."""
_SHELL_KEYS: Final = ("command", "cmd", "commands", "script", "code", "input")
_TIMEOUT_KEYS: Final = {
    "timeout": 0.0,  # milliseconds or seconds: told by size
    "timeout_ms": 1e-3,
    "timeout_s": 1.0,
    "timeout_seconds": 1.0,
    "timeoutMs": 1e-3,
    "block_until_ms": 1e-3,
}
_YIELD_KEYS: Final = {
    "yield_time_ms": 1e-3,
    "delay_ms": 1e-3,
    "delaySeconds": 1.0,
    "wait_ms": 1e-3,
    "wait_s": 1.0,
}
_BACKGROUND_KEYS: Final = frozenset(("run_in_background", "is_background", "background", "detach"))
_SALVAGED: Final = re.compile(
    r'"(command|cmd|script|code|input|subagent_type|agent_type|skill)"\s*:\s*"((?:[^"\\]|\\.){0,1000})'
)
_SALVAGED_NUMBER: Final = re.compile(
    r'"(timeout|timeout_ms|yield_time_ms|delay_ms|delaySeconds|run_in_background|is_background)"'
    r"\s*:\s*(true|\d{1,9})"
)
_ESCAPES: Final = {"\\n": "\n", "\\t": "\t", '\\"': '"', "\\\\": "\\", "\\/": "/"}
_ESCAPE: Final = re.compile(r"\\.", re.DOTALL)

_LOOKED_INTO: Final = frozenset(("shell", "poll", "subagent", "plan", "background", "other"))


@lru_cache(maxsize=1024)
def _named(name: str) -> tuple[str, str]:
    """A tool's kind, and its name as it is kept: letters and a few marks, an MCP tool by its server
    and tool."""
    words = [re.sub(r"[^A-Za-z_.:-]", "", word)[:24] for word in name.split("__")[:3]]
    return kind_of(name), "__".join(word for word in words if word)[:48] or UNKNOWN


def features_of(call: ToolCall) -> tuple[CallWords, list[float]]:
    """A call's words and its numbers (`NUMBERS`). Never raises; bounded in time whatever the
    arguments hold."""
    kind, tool = _named(call.name[:128])
    arguments = call.arguments
    digest = hash((tool, arguments[:DIGEST_CHARS], call.arguments_chars))
    size = log10(1 + call.arguments_chars)
    if kind not in _LOOKED_INTO:
        words = CallWords(kind, tool, "", "", digest)
        return words, [KIND_INDEX[kind], size, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    fields = _fields(arguments)
    if call.name == WRAPPER and isinstance(fields.get("name"), str):
        kind, tool = _named(fields["name"][:128])
    program = sub = ""
    timeout_s = yield_s = sleep_s = background = 0.0
    commands = pipes = 0
    shape = text_size = 0.0
    for key, value in fields.items():
        if key in _BACKGROUND_KEYS:
            background = float(value is True)
        elif key in _TIMEOUT_KEYS:
            timeout_s = max(timeout_s, _seconds(value, _TIMEOUT_KEYS[key]))
        elif key in _YIELD_KEYS:
            yield_s = max(yield_s, _seconds(value, _YIELD_KEYS[key]))
    if kind == "shell":
        text = _command_text(fields, arguments)
        run = parse_shell(text)
        program, sub = run.program, run.sub
        sleep_s = run.sleep_s
        timeout_s = timeout_s or run.timeout_s
        commands, pipes = run.commands, run.pipes
        shape = run.loops + 2.0 * run.here_doc + 4.0 * run.detached
        text_size = log10(1 + len(text))
    elif kind == "subagent":
        program = _word_in(fields, ("subagent_type", "agent_type", "agent_name", "agent"))
        text_size = float(len(str(fields.get("prompt", ""))) > 1000)
    elif kind == "plan":
        program = _word_in(fields, ("skill", "command"))
    elif kind == "poll":
        block = fields.get("block")
        shape = 0.0 if block is None else 1.0 + (block is True)
        text_size = float(bool(fields.get("chars")))
    return (
        CallWords(kind, tool, program, sub, digest),
        [
            KIND_INDEX[kind],
            size,
            log10(1 + timeout_s),
            log10(1 + yield_s),
            log10(1 + sleep_s),
            background,
            float(commands),
            float(pipes),
            shape,
            text_size,
        ],
    )


def _fields(arguments: str) -> dict[str, Any]:
    if arguments[:1] != "{" and not arguments[:64].lstrip().startswith("{"):
        return {}
    if len(arguments) <= PARSED_CHARS:
        try:
            value = orjson.loads(arguments)
        except ValueError:
            pass
        else:
            return value if isinstance(value, dict) else {}
    head = arguments[:SALVAGED_CHARS]
    fields: dict[str, Any] = {
        found[1]: _ESCAPE.sub(lambda e: _ESCAPES.get(e[0], " "), found[2])
        for found in _SALVAGED.finditer(head)
    }
    for found in _SALVAGED_NUMBER.finditer(head):
        fields[found[1]] = True if found[2] == "true" else int(found[2])
    return fields


def _command_text(fields: dict[str, Any], arguments: str) -> str:
    for key in _SHELL_KEYS:
        value = fields.get(key)
        if isinstance(value, str):
            return value[:4096]
        if isinstance(value, list):
            words = [each[:1024] for each in value[:16] if isinstance(each, str)]
            if key == "commands":
                return "\n".join(words)
            if len(words) > 2 and words[1][:1] == "-" and "c" in words[1]:
                return words[2]  # ["bash", "-lc", "…"]
            return " ".join(words)
    return "" if fields else arguments[:4096]


def _word_in(fields: dict[str, Any], keys: Sequence[str]) -> str:
    for key in keys:
        value = fields.get(key)
        if isinstance(value, str):
            return safe_word(value[:64])
    return ""


def _seconds(value: Any, unit: float) -> float:
    """A declared time. A bare ``timeout`` from 1,000 on is in milliseconds, as agents write it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return 0.0
    if not unit:
        unit = 1e-3 if value >= 1_000 else 1.0
    return min(float(value) * unit, MAX_DECLARED_S)
