"""Agents in a closed loop over real HTTP: sessions one after another, turn after turn, and what
became of each turn."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import aiohttp

WORDS = 6_000
"""Of a first prompt: 6,000 tokens and more."""
TURNS = 1, 11
"""Least and most turns of a session: at any time some begin."""
OUTPUT_TOKENS = 200
GAP_S = 0.8
"""Median of the time a tool takes."""
AGAIN_S = 0.2
"""An agent sends a turn that failed again after this long."""
TOOL: dict[str, Any] = {"name": "bash", "parameters": {"type": "object", "properties": {}}}
SCRIPT = json.dumps(
    {
        "turns": [{"tool_calls": [{"name": "bash", "arguments": {"command": "make test"}}]}],
        "output_tokens": OUTPUT_TOKENS,
    }
)


@dataclass(slots=True)
class Turn:
    """Times in seconds since the load began."""

    session: str
    number: int
    began_s: float
    first_byte_s: float | None = None
    ended_s: float = 0.0
    pod: str = ""
    """Where it ran; empty if nobody said."""
    failed: str = ""


class Agents:
    """The sessions and the turns they took."""

    def __init__(self, url: str, client: aiohttp.ClientSession, seed: int) -> None:
        self.url = url
        self.client = client
        self.turns: list[Turn] = []
        self.running: dict[int, Turn] = {}
        self.stopping = False
        self.began_at = asyncio.get_running_loop().time()
        self.rng = random.Random(seed)
        self._sessions = 0

    @property
    def now_s(self) -> float:
        return asyncio.get_running_loop().time() - self.began_at

    async def run(self, sessions: int) -> None:
        """So many sessions at once, until told to stop."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(sessions):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        await asyncio.sleep(self.rng.uniform(0, 3))
        while not self.stopping:
            self._sessions += 1
            await self._session(f"session-{self._sessions}")

    async def _session(self, name: str) -> None:
        words = " ".join(self.rng.choices(("look", "read", "mend", "test", "again"), k=WORDS))
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "You are an agent. " * 100},
            {"role": "user", "content": f"{name}: {words}"},
        ]
        for number in range(self.rng.randint(*TURNS)):
            while True:
                if self.stopping:
                    return
                turn = await self._turn(name, number, messages)
                if not turn.failed:
                    break
                await asyncio.sleep(AGAIN_S)
            call = {"name": "bash", "arguments": '{"command":"make test"}'}
            calls = [{"id": f"call-{name}-{number}", "type": "function", "function": call}]
            messages += [
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": calls[0]["id"], "content": "it fails " * 200},
            ]
            await asyncio.sleep(self.rng.lognormvariate(0, 0.7) * GAP_S)

    async def _turn(self, name: str, number: int, messages: list[dict[str, Any]]) -> Turn:
        body = {
            "model": "embedded",
            "stream": True,
            "messages": messages,
            "tools": [{"type": "function", "function": TOOL}],
        }
        headers = {
            "x-session-id": name,
            "x-embedded-script": SCRIPT,
            "x-cachewise-route": "1",
        }
        turn = Turn(name, number, self.now_s)
        self.turns.append(turn)
        self.running[id(turn)] = turn
        try:
            async with self.client.post(
                f"{self.url}/v1/chat/completions", json=body, headers=headers
            ) as response:
                if route := response.headers.get("x-cachewise-route"):
                    turn.pod = json.loads(route)["pod"]
                data = b""
                async for chunk in response.content.iter_any():
                    if turn.first_byte_s is None:
                        turn.first_byte_s = self.now_s
                    data += chunk
                turn.failed = _fault(response.status, data)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            turn.failed = type(error).__name__
        finally:
            turn.ended_s = self.now_s
            del self.running[id(turn)]
        return turn


def _fault(status: int, data: bytes) -> str:
    """Why an answer is none; empty if it is whole."""
    if status != 200:
        return f"status {status}"
    *events, last = data.rstrip().split(b"\n\n")
    if last != b"data: [DONE]":
        return "cut short"
    return "broken off" if events and b'"error"' in events[-1] else ""
