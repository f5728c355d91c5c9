"""A pod's KV events over ZeroMQ, in the messages of vLLM 0.32 (`vllm.distributed.kv_events`).

Each message is ``topic, sequence number, payload``, the payload a MessagePack array of a time, the
events of one step and the rank; past ones are replayed to who asks for them. ``token_ids`` stay
empty: without a tokenizer there are none that mean anything to others.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import zmq
import zmq.asyncio

MAX_REPLAYED = 10_000
MAX_QUEUED = 100_000
_ANY_PORT = "tcp://127.0.0.1:*"
_END = (-1).to_bytes(8, "big", signed=True)


class BlockStored(msgspec.Struct, tag=True):
    """Blocks that were computed, one after another, after ``parent_block_hash``."""

    block_hashes: Sequence[int]
    parent_block_hash: int | None
    block_size: int
    session_id: str | None
    token_ids: tuple[int, ...] = ()
    lora_id: None = None
    medium: str = "GPU"
    lora_name: None = None
    group_idx: int = 0
    kv_cache_spec_kind: str = "full_attention"


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks that were evicted."""

    block_hashes: Sequence[int]
    medium: str = "GPU"
    group_idx: int = 0


_encode = msgspec.msgpack.Encoder().encode


class KvEvents:
    """One pod's, at two ports of the loopback. Made in a running event loop."""

    def __init__(self, block_size_tokens: int) -> None:
        self._block_size_tokens = block_size_tokens
        self._events: list[BlockStored | BlockRemoved] = []
        self._past: deque[tuple[bytes, bytes]] = deque(maxlen=MAX_REPLAYED)
        self.published = 0
        """Messages so far."""
        self.endpoint = _ANY_PORT
        self.open()
        self._router = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self.replay_endpoint = _bound(self._router, _ANY_PORT)
        self._replaying = asyncio.create_task(self._replay(), name="embedded-kv-replay")

    def open(self) -> None:
        """Take subscribers, after `close` at the same port as before."""
        self._publisher: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
        self._publisher.set_hwm(MAX_QUEUED)
        self.endpoint = _bound(self._publisher, self.endpoint)

    def close(self) -> None:
        """Drop the subscribers; what they miss can be replayed."""
        self._publisher.close(linger=0)

    async def aclose(self) -> None:
        """Close both ports for good."""
        self._replaying.cancel()
        await asyncio.gather(self._replaying, return_exceptions=True)
        self._router.close(linger=0)
        self.close()

    def stored(self, session_id: str | None, hashes: Sequence[int], first: int, end: int) -> None:
        """Blocks `[first, end)` of a sequence with these hashes are cached from now on."""
        parent = hashes[first - 1] if first else None
        self._events.append(
            BlockStored(hashes[first:end], parent, self._block_size_tokens, session_id)
        )

    def removed(self, block_hash: int) -> None:
        """A block is not cached any more."""
        self._events.append(BlockRemoved((block_hash,)))

    def publish(self) -> None:
        """Send what happened since the last time as one message. Never blocks."""
        if not self._events:
            return
        payload = _encode((time.time(), self._events, 0))
        self._events = []
        number = self.published.to_bytes(8, "big")
        self.published += 1
        self._past.append((number, payload))
        if not self._publisher.closed:
            self._publisher.send_multipart((b"", number, payload), zmq.NOBLOCK)

    async def _replay(self) -> None:
        while True:
            frames = await self._router.recv_multipart()
            if len(frames) != 3:
                continue
            client, _, start = frames
            for number, payload in list(self._past):
                if number >= start:
                    await self._router.send_multipart((client, b"", b"", number, payload))
            await self._router.send_multipart((client, b"", b"", _END, b""))


def _bound(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, endpoint: str) -> str:
    socket.bind(endpoint)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
