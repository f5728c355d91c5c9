"""Pods too small for two sessions at once, and turns of agents to fill them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from gateway.embedded.scheduler import EngineConfig
from tests.served import Answer, Exchange, Pod, Running, body_of, until, well

CAPACITY_TOKENS = 20_000
SESSION_TOKENS = 8_000
"""Two do not fit three quarters of the capacity."""
ENGINE = EngineConfig(kv_capacity_tokens=CAPACITY_TOKENS, max_model_len=CAPACITY_TOKENS)

_BASH = {"name": "bash", "parameters": {"type": "object", "properties": {}}}
TOOLS: dict[str, list[dict[str, Any]]] = {
    "chat": [{"type": "function", "function": _BASH}],
    "responses": [{"type": "function", **_BASH}],
    "messages": [{"name": "bash", "input_schema": {"type": "object", "properties": {}}}],
}
AGENT_WIRES = tuple(TOOLS)


class SmallPod(Pod):
    """A pod on a raw socket that says how large its cache is."""

    def __init__(self, answer: Answer = well, capacity_tokens: int = CAPACITY_TOKENS) -> None:
        super().__init__(answer)
        self.capacity_tokens = capacity_tokens

    async def _dispatch(self, exchange: Exchange) -> None:
        if exchange.path == "/metrics":
            blocks = self.capacity_tokens // 16
            labels = f'block_size="16",num_gpu_blocks="{blocks}"'
            exchange.whole(f"vllm:cache_config_info{{{labels}}} 1\n".encode())
        else:
            await super()._dispatch(exchange)


@dataclass
class Gate:
    """A pod's answer that the test lets out: those of the sessions it is opened for."""

    opened: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[str] = field(default_factory=list)

    def open(self, *names: str) -> None:
        self.opened.update(names)
        self.changed.set()

    async def __call__(self, exchange: Exchange) -> None:
        name = exchange.header(b"x-name")[0].decode()
        self.seen.append(name)
        while name not in self.opened and not exchange.gone.is_set():
            self.changed.clear()
            waiting = [
                asyncio.ensure_future(self.changed.wait()),
                asyncio.ensure_future(exchange.gone.wait()),
            ]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        usage = {"prompt_tokens": SESSION_TOKENS, "completion_tokens": 4}
        exchange.whole(json.dumps({"id": name, "usage": usage}).encode())


def agent_body(
    wire: str, name: str, model: str = "m", tokens: int = SESSION_TOKENS, **more: Any
) -> dict[str, Any]:
    """A turn of an agent with a prompt of about so many tokens."""
    body = body_of(wire, model, tools=TOOLS[wire], **more)
    said = f"{name}: " + "x" * (4 * tokens)
    if wire == "responses":
        body["input"] = said
    else:
        body["messages"] = [{"role": "user", "content": said}]
    return body


def of(name: str, *, final: bool = False, **headers: str) -> dict[str, str]:
    """Headers of a session's turn; a final one frees its place at its end."""
    named = {"x-cachewise-session-id": name, "x-name": name}
    return named | ({"x-cachewise-session-final": "true"} if final else {}) | headers


def place_of(gateway: Running, name: str) -> Any:
    """The session's place, if it has one."""
    session = next(s for s in gateway.gateway.sessions if s.key.endswith(f":{name}"))
    return gateway.gateway.loop.admission.place_of(session.sid)


@asynccontextmanager
async def occupied(gateway: Running, name: str = "first") -> AsyncIterator[asyncio.Task[Any]]:
    """A final turn of an agent that has its place and runs."""
    turn = asyncio.create_task(
        gateway.post("chat", agent_body("chat", name), headers=of(name, final=True))
    )
    await until(lambda: any(p.in_flight for p in gateway.gateway.fleet))
    try:
        yield turn
    finally:
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)


def held(gateway: Running) -> int:
    return gateway.gateway.loop.admission.held_count


def nothing_left(gateway: Running) -> bool:
    """Whether no turn has left anything behind but places of sessions that may come back."""
    admission = gateway.gateway.loop.admission
    return (
        gateway.settled()
        and not admission.held_count
        and all(
            not place.running for book in admission.books.values() for place in book.places.values()
        )
        and all(book.claim is None and not book.aside_tokens for book in admission.books.values())
    )
