"""Scripted agents that work in real time through a gateway over embedded pods: tools, sub-agents,
people who are asked, compactions.

The embedded pods answer as each request's script says, so an agent plays both parts: it asks for
the tool that its model "calls", waits as long as the tool would run, and sends the history on.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from uuid import UUID

import aiohttp

Wire = Literal["chat", "messages"]
WORDS: Final = "the gateway keeps what a session is about to need and lets the rest go "
BYTES_PER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of agent: its program, its wire, how it names itself, which tools it has."""

    client: str
    wire: Wire
    agent: str
    tools: tuple[tuple[str, float, float], ...]
    """Name, median seconds, how often, as a weight."""
    asks: str | None = None
    """Its tool that waits for a person."""
    delegates: str | None = None
    """Its tool that starts a sub-agent."""
    compacts: bool = True
    """Whether it replaces a long history by a summary."""


KINDS: Final = (
    Kind(
        "claude-code",
        "messages",
        "claude-cli/2.1.4 (external, cli)",
        (
            ("Read", 0.15, 5),
            ("Bash", 3.0, 6),
            ("Edit", 0.2, 4),
            ("Grep", 0.3, 3),
            ("WebFetch", 4, 1),
        ),
        "AskUserQuestion",
        "Task",
    ),
    Kind(
        "opencode",
        "chat",
        "opencode/1.3.2",
        (("bash", 4.0, 5), ("read", 0.1, 4), ("edit", 0.2, 3), ("webfetch", 3.0, 1)),
        "question",
        "task",
    ),
    Kind("mini-swe-agent", "chat", "litellm/1.80", (("bash", 5.0, 1),), compacts=False),
    Kind("codex", "chat", "codex_cli_rs/0.98", (("shell", 6.0, 5), ("apply_patch", 0.3, 3))),
    Kind("openai-sdk", "chat", "OpenAI/Python 2.3", (("run_tests", 20.0, 1), ("search", 1.0, 3))),
)
COMMANDS: Final = (
    "pytest -q",
    "make build",
    "git diff",
    "npm test",
    "ls -la",
    "cargo check",
    "rg TODO",
)


def filler(rng: random.Random, tokens: int) -> str:
    """Text of about so many tokens that no other has."""
    text = f"{rng.getrandbits(64):x} "
    return text + (WORDS * (tokens * BYTES_PER_TOKEN // len(WORDS) + 1))[: tokens * BYTES_PER_TOKEN]


@dataclass(slots=True)
class World:
    """What the agents share: the gateway, the clock's end, how they are made."""

    url: str
    client: aiohttp.ClientSession
    ends_at: float
    """Of the event loop's clock; then no agent starts another turn."""
    first_tokens: tuple[int, int] = (4_000, 20_000)
    result_tokens: tuple[int, int] = (200, 3_000)
    failures: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return asyncio.get_running_loop().time() >= self.ends_at


class Agent:
    """One session of one kind, from its first turn until the world ends."""

    def __init__(self, world: World, kind: Kind, seed: int, parent: Agent | None = None) -> None:
        self.world = world
        self.kind = kind
        self.rng = random.Random(seed)
        self.name = str(UUID(int=self.rng.getrandbits(128), version=4))
        self.parent = parent
        self.system = f"You are {kind.client}. " + WORDS * 120
        low, high = world.first_tokens
        tokens = self.rng.randint(low, high) // (3 if parent is not None else 1)
        self.history: list[dict[str, Any]] = [{"role": "user", "content": filler(self.rng, tokens)}]
        self.turns = 0

    async def run(self, delay_s: float = 0.0, turns: int = 1_000) -> None:
        """Work until the world ends, or for so many turns."""
        await asyncio.sleep(delay_s)
        while not self.world.over and self.turns < turns:
            last = self.parent is not None and self.turns == turns - 1
            call = None if last else self._choose()
            asked = await self._turn(call)
            if asked is None and call is not None:
                return
            self.turns += 1
            if call is None:
                if self.parent is not None:
                    return
                await self._person()
            else:
                await self._tool(call, asked or "")
            if self.turns % 12 == 11 and self.kind.compacts and self.parent is None:
                self._compact()

    def _choose(self) -> str | None:
        """The tool that the model calls next; None for a final answer."""
        draw = self.rng.random()
        if draw < 0.10:
            return None
        if draw < 0.15 and self.kind.asks is not None and self.parent is None:
            return self.kind.asks
        if draw < 0.22 and self.kind.delegates is not None and self.parent is None:
            return self.kind.delegates
        names = [name for name, _, _ in self.kind.tools]
        return self.rng.choices(names, [weight for _, _, weight in self.kind.tools])[0]

    async def _person(self) -> None:
        await asyncio.sleep(min(self.rng.lognormvariate(2.6, 0.8), 90.0))
        self.history.append({"role": "user", "content": filler(self.rng, 150)})

    async def _tool(self, name: str, call_id: str) -> None:
        if name == self.kind.delegates:
            children = [
                Agent(self.world, self.kind, self.rng.getrandbits(32), self)
                for _ in range(self.rng.choice((1, 1, 2)))
            ]
            await asyncio.gather(*(child.run(turns=self.rng.randint(3, 6)) for child in children))
        elif name == self.kind.asks:
            await asyncio.sleep(self.rng.uniform(6.0, 40.0))
        else:
            median = next(median for tool, median, _ in self.kind.tools if tool == name)
            await asyncio.sleep(min(median * self.rng.lognormvariate(0.0, 0.9), 60.0))
        text = filler(self.rng, self.rng.randint(*self.world.result_tokens))
        if self.kind.wire == "messages":
            result = {"type": "tool_result", "tool_use_id": call_id, "content": text}
            self.history.append({"role": "user", "content": [result]})
        else:
            self.history.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _compact(self) -> None:
        """Replace the history by a summary, as agents do when it has grown too long."""
        summary = "This session is being continued from a previous conversation. "
        self.history = [{"role": "user", "content": summary + filler(self.rng, 2_000)}]

    def _headers(self) -> dict[str, str]:
        headers = {"user-agent": self.kind.agent, "authorization": "Bearer any"}
        parent = self.parent
        if self.kind.client == "claude-code":
            headers["x-claude-code-session-id"] = parent.name if parent is not None else self.name
            if parent is not None:
                headers["x-claude-code-agent-id"] = self.name
        elif self.kind.client == "codex":
            headers |= {"thread-id": self.name, "session-id": self.name}
        elif self.kind.client != "mini-swe-agent":
            headers["x-session-id"] = self.name
            if parent is not None:
                headers["x-parent-session-id"] = parent.name
        return headers

    async def _turn(self, call: str | None) -> str | None:
        """Ask the model; the id of the call that it makes, if any."""
        turn: dict[str, Any] = {"output_tokens": self.rng.randint(40, 700)}
        if call is not None:
            arguments = {"command": self.rng.choice(COMMANDS)}
            turn["tool_calls"] = [{"name": call, "arguments": arguments}]
        script = json.dumps({"turns": [turn]})
        names = [name for name, _, _ in self.kind.tools]
        body: dict[str, Any] = {"model": "embedded", "stream": True, "max_tokens": 4_096}
        if self.kind.wire == "messages":
            body["tools"] = [{"name": n, "input_schema": {"type": "object"}} for n in names]
            body |= {"system": self.system, "messages": self.history}
            path, read = "/v1/messages", _read_messages
        else:
            body["tools"] = [{"type": "function", "function": {"name": n}} for n in names]
            body["messages"] = [{"role": "system", "content": self.system}, *self.history]
            body["stream_options"] = {"include_usage": True}
            path, read = "/v1/chat/completions", _read_chat
        headers = self._headers() | {"x-embedded-script": script}
        try:
            async with self.world.client.post(
                self.world.url + path, json=body, headers=headers
            ) as answer:
                if answer.status != 200:
                    self.world.failures.append(f"{answer.status} {(await answer.text())[:200]}")
                    return None
                message, call_id = await read(answer, call)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.world.failures.append(repr(error))
            return None
        self.history.append(message)
        return call_id


async def _events(answer: aiohttp.ClientResponse, each: Callable[[dict[str, Any]], None]) -> None:
    async for line in answer.content:
        if line.startswith(b"data: {"):
            each(json.loads(line[6:]))


async def _read_chat(
    answer: aiohttp.ClientResponse, call: str | None
) -> tuple[dict[str, Any], str | None]:
    text: list[str] = []
    calls: list[dict[str, Any]] = []

    def each(event: dict[str, Any]) -> None:
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            text.append(delta.get("content") or "")
            for part in delta.get("tool_calls") or ():
                if part.get("id"):
                    calls.append(
                        {
                            "id": part["id"],
                            "type": "function",
                            "function": {"name": call, "arguments": ""},
                        }
                    )
                calls[-1]["function"]["arguments"] += part["function"].get("arguments") or ""

    await _events(answer, each)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(text)}
    if calls:
        message["tool_calls"] = calls
    return message, calls[0]["id"] if calls else None


async def _read_messages(
    answer: aiohttp.ClientResponse, call: str | None
) -> tuple[dict[str, Any], str | None]:
    text: list[str] = []
    uses: list[dict[str, Any]] = []
    arguments: list[str] = []

    def each(event: dict[str, Any]) -> None:
        block, delta = event.get("content_block", {}), event.get("delta", {})
        if block.get("type") == "tool_use":
            uses.append({"type": "tool_use", "id": block["id"], "name": call, "input": {}})
        text.append(delta.get("text") or "")
        arguments.append(delta.get("partial_json") or "")

    await _events(answer, each)
    content: list[dict[str, Any]] = [{"type": "text", "text": "".join(text) or "-"}]
    if uses:
        uses[0]["input"] = json.loads("".join(arguments) or "{}")
        content.append(uses[0])
    return {"role": "assistant", "content": content}, uses[0]["id"] if uses else None


async def crowd(world: World, sessions: int, seed: int = 1, spread_s: float = 30.0) -> None:
    """So many agents of all kinds, started within ``spread_s``, until the world ends."""
    rng = random.Random(seed)
    weights = (5, 3, 2, 2, 1)
    kinds = rng.choices(KINDS, weights, k=sessions)
    agents = [Agent(world, kind, seed * 1_000_003 + n) for n, kind in enumerate(kinds)]
    await asyncio.gather(*(agent.run(spread_s * rng.random()) for agent in agents))
