"""Made-up coding agents, for a fleet to have something to show.

Each runs the closed loop over HTTP: call, run the tools (sleep), call again with the whole history.
What the pod is to answer goes along as an embedded pod's script.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import cycle
from random import Random
from typing import Any, ClassVar, Final

import aiohttp
import orjson

MODEL: Final = "demo"
SCRIPT: Final = "x-embedded-script"
TURNS: Final = (6, 16)
"""Turns of a session, at least and at most."""
WORDS: Final = "the session reads a file runs the tests edits a line and looks at what changed "

Json = dict[str, Any]
Call = tuple[str, Json]
Gap = Callable[[Random], float]


def text(tokens: int, start: str) -> str:
    """So many tokens of an embedded pod: four bytes each."""
    return (start + ": " + WORDS * (4 * tokens // len(WORDS) + 1))[: 4 * tokens]


def about(median_s: float, spread: float = 2.0) -> Gap:
    return lambda random: median_s * spread ** random.gauss(0, 1)


TOOLS: Final[dict[str, tuple[Call, Gap, int]]] = {
    "ls": (("Bash", {"command": "ls src"}), about(0.2), 60),
    "test": (("Bash", {"command": "pytest -q tests"}), about(1.5), 300),
    "build": (("Bash", {"command": "make build"}), about(3), 150),
    "read": (("Read", {"file_path": "/src/app.py"}), about(0.1, 1.4), 400),
    "grep": (("Grep", {"pattern": "def main"}), about(0.2, 1.5), 150),
    "edit": (("Edit", {"file_path": "/src/app.py", "new": "x"}), about(0.15, 1.4), 40),
    "plan": (("TodoWrite", {"todos": ["look", "change", "test"]}), about(0.1, 1.2), 30),
    "web": (("WebFetch", {"url": "https://example.com"}), about(1.2), 450),
    "mcp": (("mcp__tracker__find", {"query": "bug"}), about(0.6), 100),
    "ask": (("AskUserQuestion", {"question": "Go on?"}), about(3), 20),
    "wait": (("BashOutput", {"bash_id": "1"}), about(0.5), 60),
}
"""What an agent asks for, how long it then runs, and how many tokens come back."""
USUAL: Final = ("ls", "test", "read", "read", "read", "grep", "grep", "edit", "edit", "build")
SELDOM: Final = ("plan", "web", "mcp", "ask", "wait")


def schema(name: str) -> Json:
    return {"name": name, "description": f"Runs {name}.", "parameters": {"type": "object"}}


class FailedTurnError(Exception):
    """The answer was an error, or broke off."""


class Conversation:
    """A history that is asked for its next turn; each dialect keeps it in its own form."""

    path: ClassVar[str]

    def __init__(
        self,
        clients: Iterator[aiohttp.ClientSession],
        headers: dict[str, str],
        system: str,
        names: Sequence[str],
    ) -> None:
        """Each turn is asked of the next of the clients. Tools by their names."""
        self.clients = clients
        self.headers = headers
        self.system = system
        self.names = list(names)
        self.history: list[Json] = []

    async def ask(self, script: str) -> list[str]:
        """One streamed turn; the ids of the tool calls that the answer asks for."""
        body = orjson.dumps({"model": MODEL, "stream": True, **self.request()})
        headers = {**self.headers, SCRIPT: script}
        async with next(self.clients).post(self.path, data=body, headers=headers) as response:
            lines = (await response.read()).splitlines()
        events = [orjson.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        if response.status != 200 or any("error" in event for event in events):
            raise FailedTurnError
        return self.take(events)

    def request(self) -> Json:
        """The dialect's own fields."""
        raise NotImplementedError

    def take(self, events: list[Json]) -> list[str]:
        """Put the answer into the history; the ids of its tool calls."""
        raise NotImplementedError

    def tell(self, results: list[tuple[str, str]]) -> None:
        """Tool results by call id."""
        raise NotImplementedError

    def say(self, said: str) -> None:
        self.history.append({"role": "user", "content": said})

    def compact(self, summary: str) -> None:
        self.history[:] = [{"role": "user", "content": summary}]

    def edit(self) -> None:
        """Change something that was sent before."""
        self.system += " It is noon."


class Chat(Conversation):
    path = "/v1/chat/completions"

    def request(self) -> Json:
        return {
            "messages": [{"role": "system", "content": self.system}, *self.history],
            "tools": [{"type": "function", "function": schema(name)} for name in self.names],
            "stream_options": {"include_usage": True},
        }

    def take(self, events: list[Json]) -> list[str]:
        said, calls = "", dict[int, Json]()
        for delta in (choice["delta"] for event in events for choice in event["choices"]):
            said += delta.get("content") or ""
            for part in delta.get("tool_calls") or ():
                function = part.get("function") or {}
                if part["index"] not in calls:
                    calls[part["index"]] = {"id": part["id"], "name": function["name"], "with": ""}
                calls[part["index"]]["with"] += function.get("arguments") or ""
        made = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["with"]},
            }
            for call in calls.values()
        ]
        answer = {"role": "assistant", "content": said}
        self.history.append(answer | {"tool_calls": made} if made else answer)
        return [call["id"] for call in calls.values()]

    def tell(self, results: list[tuple[str, str]]) -> None:
        self.history += [
            {"role": "tool", "tool_call_id": one, "content": said} for one, said in results
        ]


class Messages(Conversation):
    path = "/v1/messages"

    def request(self) -> Json:
        tools = [{"name": name, "input_schema": {"type": "object"}} for name in self.names]
        return {
            "system": self.system,
            "messages": self.history,
            "tools": tools,
            "max_tokens": 2000,
        }

    def take(self, events: list[Json]) -> list[str]:
        blocks: dict[int, Json] = {}
        for event in events:
            if event["type"] == "content_block_start":
                blocks[event["index"]] = event["content_block"] | {"input": ""}
            elif event["type"] == "content_block_delta":
                delta, block = event["delta"], blocks[event["index"]]
                block["input"] += delta.get("partial_json", "")
                block["text"] = block.get("text", "") + delta.get("text", "")
        content = [
            {"type": "text", "text": block["text"]}
            if block["type"] == "text"
            else {
                "type": "tool_use",
                "id": block["id"],
                "name": block["name"],
                "input": orjson.loads(block["input"] or "{}"),
            }
            for block in blocks.values()
        ]
        self.history.append({"role": "assistant", "content": content})
        return [block["id"] for block in content if block["type"] == "tool_use"]

    def tell(self, results: list[tuple[str, str]]) -> None:
        content = [
            {"type": "tool_result", "tool_use_id": one, "content": said} for one, said in results
        ]
        self.history.append({"role": "user", "content": content})


class Responses(Conversation):
    path = "/v1/responses"

    def request(self) -> Json:
        tools = [{"type": "function", **schema(name)} for name in self.names]
        return {"instructions": self.system, "input": self.history, "tools": tools, "store": False}

    def take(self, events: list[Json]) -> list[str]:
        output = events[-1]["response"]["output"]
        self.history += output
        return [item["call_id"] for item in output if item["type"] == "function_call"]

    def tell(self, results: list[tuple[str, str]]) -> None:
        self.history += [
            {"type": "function_call_output", "call_id": one, "output": said}
            for one, said in results
        ]

    def edit(self) -> None:
        self.names.append("view_image")


CLIENTS: Final[tuple[tuple[type[Conversation], str, str | None], ...]] = (
    (Messages, "claude-cli/2.0", "x-claude-code-session-id"),
    (Responses, "codex_cli_rs/0.50", "thread-id"),
    (Chat, "opencode/1.0", "x-session-id"),
    (Chat, "OpenAI/Python 1.90", None),  # mini-swe-agent: known by its tool-call ids
)


class Agent:
    """One agent after the other in the same place, until cancelled. Its turns go to the replicas of
    the gateway by turns, as behind a load balancer."""

    def __init__(self, clients: Sequence[aiohttp.ClientSession], number: int) -> None:
        self.clients = cycle(clients)
        self.number = number
        self.random = Random(number)
        self.kind, self.program, self.names_itself = CLIENTS[number % len(CLIENTS)]

    async def run(self) -> None:
        count = 0
        await asyncio.sleep(self.random.uniform(0, 2))
        while True:
            await self.session(f"{self.number}-{count}")
            count += 1

    async def session(self, name: str, parent: str | None = None) -> None:
        """A session; with a parent a sub-agent's, which ends with its answer."""
        random = self.random
        headers = {"User-Agent": self.program}
        if self.names_itself is not None:
            headers[self.names_itself] = parent or name
        if parent is not None:
            headers["x-claude-code-agent-id"] = name
        tools = sorted({call[0] for call, _, _ in TOOLS.values()} | {"Task"})
        talk = self.kind(self.clients, headers, text(1000, self.program), tools)
        talk.say(text(2500, f"task {name}"))
        for left in reversed(range(random.randint(*TURNS) if parent is None else 2)):
            if not await self.turn(talk, left == 0, name, parent):
                return

    async def turn(self, talk: Conversation, last: bool, name: str, parent: str | None) -> bool:
        """One turn and the wait after it; False if it failed."""
        random = self.random
        chosen = [] if last else [random.choice(USUAL) for _ in range(random.choice((1, 1, 1, 2)))]
        if chosen and random.random() < 0.2:
            chosen = [random.choice(SELDOM)]
        calls = [TOOLS[tool][0] for tool in chosen]
        delegates = parent is None and self.program.startswith("claude") and random.random() < 0.1
        if chosen and delegates:
            calls = [("Task", {"prompt": "look around"})]
        if random.random() < 0.04:
            talk.compact("This session is being continued from a previous conversation." + WORDS)
        elif random.random() < 0.03:
            talk.edit()
        answer = {
            "text": "I look." if calls else "Done.",
            "tool_calls": [{"name": called, "arguments": given} for called, given in calls],
            "output_tokens": random.randint(20, 120),
        }
        try:
            ids = await talk.ask(json.dumps({"turns": [answer]}))
        except (FailedTurnError, aiohttp.ClientError):
            await asyncio.sleep(1)
            return False
        if last:
            await asyncio.sleep(0 if parent else about(3)(random))
            if parent is None and random.random() < 0.5:
                talk.say("And now the next thing.")
            return True
        if calls[0][0] == "Task":
            await self.session(f"{name}-{random.randrange(1 << 30)}", parent=name)
        else:
            await asyncio.sleep(max(TOOLS[tool][1](random) for tool in chosen))
        sizes = [TOOLS[tool][2] for tool in chosen]
        talk.tell(
            [(one, text(size, f"result {one}")) for one, size in zip(ids, sizes, strict=False)]
        )
        return True


async def make_trouble(client: aiohttp.ClientSession, seed: int = 0) -> None:
    """What goes wrong in a fleet now and then, until cancelled."""
    random = Random(seed)
    said = [{"role": "user", "content": "hi"}]
    aside = json.dumps({"model": MODEL, "messages": said, "stream": True}).encode()

    def failing(status: object, after_chunks: int) -> str:
        fail = {"status": status, "after_chunks": after_chunks}
        return json.dumps({"output_tokens": 200, "fail": fail})

    async def post(script: str = "{}", body: bytes = aside) -> None:
        async with client.post(Chat.path, headers={SCRIPT: script}, data=body) as response:
            await response.read()

    async def leave() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.15):
                await post(json.dumps({"output_tokens": 4000}))

    troubles: tuple[Callable[[], Awaitable[None]], ...] = (
        lambda: post(body=b"{"),  # the client's fault
        lambda: post(failing("disconnect", 0)),  # sent again, in vain
        lambda: post(failing("disconnect", 2)),  # broken off
        lambda: post(failing(500, 0)),  # the pod's error
        leave,
        post,  # an aside
    )
    while True:
        for trouble in troubles:
            with contextlib.suppress(aiohttp.ClientError):
                await trouble()
            await asyncio.sleep(random.uniform(0.3, 0.9))
