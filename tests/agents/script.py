"""What an embedded pod is to answer, written into the first user message."""

from __future__ import annotations

import json
from typing import Any

MARKER = "[[embedded-script:"


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def bash(command: str, **more: Any) -> dict[str, Any]:
    """A call of Claude Code's shell."""
    return call("Bash", command=command, description="a probe", **more)


def turn(*calls: dict[str, Any], text: str | None = None) -> dict[str, Any]:
    """One answer; without calls it ends the run."""
    answer: dict[str, Any] = {"tool_calls": list(calls)}
    return answer if text is None else answer | {"text": text}


def prompt(words: str, *turns: dict[str, Any]) -> str:
    """A prompt that makes the pod give these answers, turn by turn. A sub-agent's prompt made by
    this function may stand in a call's arguments."""
    script = json.dumps({"turns": turns}).replace("[[", "[\\u005b")
    return f"{words} {MARKER} {script}]]"
