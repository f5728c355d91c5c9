"""Records of real tool calls, as the training data hold them, turned back into what a client sends.

A record's ``args`` is a rendered line (``[timeout=60000] go test ./...``, ``pattern=x path=y``); it
is made JSON arguments again, so that training and benchmarks go through the very code that serves.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson

from gateway.dialects.turn import ToolCall

_MARK: Final = re.compile(r"\[(timeout|yield|bg)(?:=(\d+))?\] ?")
_PAIR: Final = re.compile(r"(?:^| )([A-Za-z_-]+)=")
_SIZED: Final = re.compile(r"<str:(\d+)>")
_SHELL_KEY: Final = {"exec_command": "cmd"}


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a gzipped file of JSON lines."""
    with gzip.open(path, "rb") as lines:
        for line in lines:
            yield orjson.loads(line)


def call_of(record: dict[str, Any]) -> ToolCall:
    """The tool call that a record tells of."""
    tool = record["tool"]
    text = record["args"] or ""
    arguments: dict[str, Any] = {}
    while (mark := _MARK.match(text)) is not None:
        if mark[1] == "timeout":
            arguments["timeout"] = int(mark[2] or 0)
        elif mark[1] == "yield":
            arguments["yield_time_ms"] = int(mark[2] or 0)
        else:
            arguments["run_in_background"] = True
        text = text[mark.end() :]
    if tool in ("Bash", "bash", "exec_command", "PowerShell"):
        arguments[_SHELL_KEY.get(tool, "command")] = _unsized(text)
    elif tool == "apply_patch":
        size = re.match(r"len=(\d+)", text)
        return _call(tool, "*" * int(size[1]) if size else text)
    elif tool == "exec":
        return _call(tool, _unsized(text.removeprefix("input=")))
    else:
        if text.endswith(" [bg]"):
            text = text[:-5]
            arguments["run_in_background"] = True
        pairs = list(_PAIR.finditer(text))
        if not pairs or pairs[0].start() > 0:
            first = text[: pairs[0].start()] if pairs else text
            if first:
                arguments["file_path"] = first
        for pair, after in zip(pairs, [*pairs[1:], None], strict=False):
            value = text[pair.end() : after.start() if after else None]
            arguments.update(_argument(tool, pair[1], value))
    return _call(tool, orjson.dumps(arguments).decode())


def _argument(tool: str, key: str, value: str) -> dict[str, Any]:
    if key in ("old", "new", "len", "prompt", "plan", "query") and value.isdigit():
        name = {"old": "old_string", "new": "new_string", "len": "content"}.get(key, key)
        return {name: "*" * int(value)}
    if key == "n" and value.isdigit():
        return {"items": [{"*": "*" * 80}] * min(int(value), 64)}
    if key == "type" and tool in ("Task", "Agent"):
        return {"subagent_type": value}
    if value in ("True", "False"):
        return {key: value == "True"}
    if value.isdigit() and len(value) < 10:
        return {key: int(value)}
    return {key: _unsized(value)}


def _unsized(text: str) -> str:
    return _SIZED.sub(lambda size: "*" * min(int(size[1]), 65_536), text)


def _call(name: str, arguments: str) -> ToolCall:
    return ToolCall.of("", name, arguments)
