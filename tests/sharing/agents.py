"""Agents that loop through tool calls against several replicas, and what they saw."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.served import events_of

BASH = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}
SCRIPT = json.dumps(
    {
        "turns": [{"tool_calls": [{"name": "bash", "arguments": {"command": "make test"}}]}],
        "output_tokens": 24,
    }
)


@dataclass
class Agent:
    """One session. Named, it sends a session id; else only the ids of its tool calls tell it."""

    name: str
    named: bool
    client: aiohttp.ClientSession
    words: int = 400
    key: str = "somebody"
    messages: list[dict[str, Any]] = field(default_factory=list)
    pods: list[str] = field(default_factory=list)
    """Where each turn ran."""
    cached: list[int] = field(default_factory=list)
    routes: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Which replica each turn that failed was sent to."""

    def __post_init__(self) -> None:
        self.messages = [
            {"role": "system", "content": "You are an agent. " * 40},
            {"role": "user", "content": f"Task {self.name}. " + "Look closely. " * self.words},
        ]

    async def turn(self, replica: str) -> bool:
        """One turn by that replica; whether it was answered."""
        headers = {"x-embedded-script": SCRIPT, "x-cachewise-route": "1"}
        headers["authorization"] = f"Bearer {self.key}"
        if self.named:
            headers["x-session-id"] = self.name
        body = {
            "model": "embedded",
            "messages": self.messages,
            "tools": [BASH],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self.client.post(
                f"{replica}/v1/chat/completions", json=body, headers=headers
            ) as response:
                data = await response.read()
                if response.status != 200:
                    self.failed.append(f"{replica} {response.status} {data[:200]!r}")
                    return False
                route = json.loads(response.headers["x-cachewise-route"])
        except (aiohttp.ClientError, OSError):
            self.failed.append(replica)
            return False
        self.routes.append(route)
        self.pods.append(route["pod"])
        self._answered([event for _, event in events_of(data)[:-1]])
        return True

    def _answered(self, events: list[Any]) -> None:
        """Take the answer into the history, with the result of its one tool call."""
        call: dict[str, Any] = {"id": "", "name": "", "arguments": ""}
        for event in events:
            if event.get("usage"):
                self.cached.append(event["usage"]["prompt_tokens_details"]["cached_tokens"])
            for choice in event["choices"]:
                for delta in choice["delta"].get("tool_calls") or ():
                    call["id"] = call["id"] or delta.get("id") or ""
                    call["name"] += delta["function"].get("name") or ""
                    call["arguments"] += delta["function"].get("arguments") or ""
        function = {"name": call["name"], "arguments": call["arguments"]}
        self.messages += [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": call["id"], "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": call["id"], "content": "fine " * 20},
        ]
