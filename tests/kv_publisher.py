"""A publisher of KV events as vLLM 0.32 has it, that a test can make forgetful."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from tests.ports import HIGH, LOW

END = (-1).to_bytes(8, "big", signed=True)
BLOCK_TOKENS = 16


def stored(
    sid: str | None, parent: int | bytes | None, *blocks: int | bytes, **more: Any
) -> dict[str, Any]:
    """An event with every field that vLLM sends."""
    return {
        "type": "BlockStored",
        "block_hashes": list(blocks),
        "parent_block_hash": parent,
        "token_ids": list(range(BLOCK_TOKENS * len(blocks))),
        "block_size": BLOCK_TOKENS,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(blocks),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
        "session_id": sid,
    } | more


def removed(*blocks: int | bytes, **more: Any) -> dict[str, Any]:
    return {
        "type": "BlockRemoved",
        "block_hashes": list(blocks),
        "medium": "GPU",
        "group_idx": 0,
    } | more


CLEARED = {"type": "AllBlocksCleared"}
_HOST = "127.0.0.1"


def _bound(socket: zmq.asyncio.Socket, port: int | None) -> int:
    """Bind to this port, or to one that is free; which it is."""
    if port is None:
        return int(socket.bind_to_random_port(f"tcp://{_HOST}", LOW, HIGH))
    socket.bind(f"tcp://{_HOST}:{port}")
    return port


class Publisher:
    """One engine's. ``replays`` says whether it has a replay endpoint."""

    def __init__(
        self,
        port: int | None = None,
        replay_port: int | None = None,
        *,
        replays: bool = True,
        buffer_steps: int = 10_000,
    ) -> None:
        self._port = port
        self._replay_port = replay_port
        self._replays = replays
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self.next = 0
        self.asked: list[int] = []
        """From where replays were asked for."""

    @property
    def port(self) -> int:
        """The messages'. Like `replay_port`, known once the publisher has been entered, and the
        same ever after."""
        assert self._port is not None
        return self._port

    @property
    def replay_port(self) -> int | None:
        return self._replay_port

    @property
    def endpoint(self) -> str:
        return f"tcp://{_HOST}:{self.port}"

    @property
    def replay_endpoint(self) -> str | None:
        return f"tcp://{_HOST}:{self._replay_port}" if self._replay_port else None

    async def __aenter__(self) -> Publisher:
        self._context = zmq.asyncio.Context()
        self._replaying: asyncio.Task[None] | None = None
        try:
            self.bind()
            if self._replays:
                self._router = self._context.socket(zmq.ROUTER)
                self._replay_port = _bound(self._router, self._replay_port)
                self._replaying = asyncio.create_task(self._replay())
        except BaseException:
            self._context.destroy(linger=0)
            raise
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._replaying is not None:
            self._replaying.cancel()
            await asyncio.gather(self._replaying, return_exceptions=True)
            self._router.close(linger=0)
        self._pub.close(linger=0)
        self._context.term()

    def bind(self) -> None:
        """Open the socket of the messages: an XPUB, a PUB that also tells who subscribes."""
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.set_hwm(100_000)
        self._port = _bound(self._pub, self._port)

    def unbind(self) -> None:
        """Break the connections off."""
        self._pub.close(linger=0)

    async def subscribed(self) -> None:
        """Wait for the subscription: what is sent before it comes reaches nobody, although the
        subscriber's handshake is over."""
        async with asyncio.timeout(10):
            await self._pub.recv()

    async def send(self, *events: dict[str, Any], lost: bool = False) -> None:
        """Publish one batch; with ``lost`` it reaches nobody, and only a replay has it."""
        await self.send_payload(msgspec.msgpack.encode([1.0, events, 0]), lost=lost)

    async def send_payload(self, payload: bytes, lost: bool = False) -> None:
        number = self.next
        self.next += 1
        self.buffer.append((number, payload))
        if not lost:
            await self._pub.send_multipart((b"", number.to_bytes(8, "big"), payload))

    async def send_frames(self, *frames: bytes) -> None:
        await self._pub.send_multipart(frames)

    async def _replay(self) -> None:
        while True:
            client, _, start = await self._router.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            for number, payload in list(self.buffer):
                if number >= self.asked[-1]:
                    frames = (client, b"", b"", number.to_bytes(8, "big"), payload)
                    await self._router.send_multipart(frames)
            await self._router.send_multipart((client, b"", b"", END, b""))
