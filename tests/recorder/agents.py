"""Agents that talk to a gateway turn by turn, and what they know of what they sent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import zstandard

from gateway.embedded.fleet import EmbeddedFleet
from gateway.embedded.scheduler import EngineConfig
from tests.served import Running, gateway_over, until

TOOL_TEXT = "Runs a command in a shell. " * 100
SYSTEM = "You are a careful engineer. " * 150


@dataclass
class Sent:
    """A turn as its agent saw it."""

    gap_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass
class Agent:
    """One conversation, in the chat or the messages dialect."""

    gateway: Running
    name: str
    wire: str = "chat"
    task: str = "Fix the build."
    system: str = SYSTEM
    headers: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    _ended_at: float | None = None

    def __post_init__(self) -> None:
        self.messages.append({"role": "user", "content": self.task})

    async def turn(
        self, calls: Sequence[dict[str, Any]] = (), text: str = "Done.", **headers: str
    ) -> None:
        """A turn that the pod answers with these calls, ``{"name": …, "arguments": …}``."""
        script: dict[str, Any] = {"text": text, "tool_calls": list(calls)}
        named = {"x-cachewise-session-id": self.name} | self.headers | headers
        named["x-embedded-script"] = json.dumps({"turns": [script]})
        gap_s = 0.0 if self._ended_at is None else monotonic() - self._ended_at
        reply = await self.gateway.post(self.wire, self._body(), headers=named)
        self._ended_at = monotonic()
        assert reply.status == 200, reply.text
        if self.wire == "chat":
            message = reply.json["choices"][0]["message"]
            usage = reply.json["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            self.sent.append(
                Sent(gap_s, usage["prompt_tokens"], cached, usage["completion_tokens"])
            )
            self.messages.append({k: v for k, v in message.items() if v is not None})
            self._asked = [call["id"] for call in message.get("tool_calls") or []]
        else:
            usage = reply.json["usage"]
            cached = usage.get("cache_read_input_tokens") or 0
            prompt = usage["input_tokens"] + cached
            self.sent.append(Sent(gap_s, prompt, cached, usage["output_tokens"]))
            content = reply.json["content"]
            self.messages.append({"role": "assistant", "content": content})
            self._asked = [block["id"] for block in content if block["type"] == "tool_use"]

    def results(self, *texts: str) -> None:
        """The answers to the calls asked for."""
        told = list(zip(self._asked, texts, strict=True))
        if self.wire == "chat":
            self.messages += [
                {"role": "tool", "tool_call_id": call, "content": text} for call, text in told
            ]
        else:
            blocks = [{"type": "tool_result", "tool_use_id": c, "content": t} for c, t in told]
            self.messages.append({"role": "user", "content": blocks})

    def says(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def _body(self) -> dict[str, Any]:
        schema = {"type": "object", "properties": {"command": {"type": "string"}}}
        tool = {"name": "Bash", "description": TOOL_TEXT}
        if self.wire == "chat":
            function = {"type": "function", "function": tool | {"parameters": schema}}
            messages = [{"role": "system", "content": self.system}, *self.messages]
            return {"model": "embedded", "messages": messages, "tools": [function]}
        return {
            "model": "embedded",
            "max_tokens": 1000,
            "system": self.system,
            "messages": self.messages,
            "tools": [tool | {"input_schema": schema}],
        }


@asynccontextmanager
async def recording(
    directory: Path, *, max_bytes: int = 1 << 30, **settings: Any
) -> AsyncIterator[Running]:
    """A gateway that records, before one pod that forgets nothing."""
    record = {"directory": str(directory), "max_bytes": max_bytes}
    config = EngineConfig(kv_capacity_tokens=4_000_000)
    async with EmbeddedFleet(pods=1, speedup=1000, config=config) as fleet:
        async with gateway_over(*fleet.urls, record=record, **settings) as gateway:
            await until(lambda: all(pod.takes_turns for pod in gateway.gateway.fleet))
            yield gateway


def texts(directory: Path) -> bytes:
    """All that the recordings hold, unpacked as far as they go."""
    found = []
    for path in sorted(directory.glob("*.zst")):
        with path.open("rb") as file:
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            found.append(reader.read())
    return b"".join(found)


async def written(gateway: Running, turns: int) -> None:
    """Until so many turns are on the disk."""
    metric = gateway.gateway.metrics.recorded_turns
    await until(lambda: metric._value.get() >= turns)
