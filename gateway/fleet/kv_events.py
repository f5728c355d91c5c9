"""A subscription to a pod's KV events (vLLM's ``--kv-events-config``, publisher ``zmq``).

Each message is ``topic, sequence number, payload``; the payload a MessagePack array of a time, the
events and the rank. Numbers rise by one. Where some are missing they are asked for at the replay
endpoint, if there is one: from the last one that was seen, so that it shows whether they are of the
same engine (the numbers of one that was started anew begin at 0 again). What cannot be had is lost:
then nothing is known of the cache until sessions come into it anew, and the gateway goes by belief.

Token ids, which the events hold too, are passed over unread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, Never

import msgspec
import xxhash

from gateway.config import ConfigError
from gateway.fleet.ledger import Ledger, Trouble

try:
    import zmq
    import zmq.asyncio
except ImportError:
    raise ConfigError(
        "kv_events (of pods, discovery or embedded): is set and the client of ZeroMQ is not"
        " installed; allowed: unset, or set after pip install 'cachewise-gateway[kv-events]'"
    ) from None

logger = logging.getLogger("gateway.fleet")

Replay = Literal["whole", "torn", "another"]
"""All that there was; not all of it has come; it is another engine's."""

MAX_QUEUED: Final = 1_000
"""Messages that wait here; more are dropped by the pod, and asked for again."""
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
REPLAY_S: Final = 5.0
"""Longest wait for the next message of a replay."""
RECONNECT_MS: Final = (100, 5_000)
HEARTBEAT_MS: Final = 5_000
_END: Final = (-1).to_bytes(8, "big", signed=True)
_GPU: Final = (None, "GPU")
_WHOLE: Final = (None, "full_attention", "mla_attention", "sink_full_attention")
"""Kinds of layers that keep all of a prefix."""


class Event(msgspec.Struct):
    """The fields that are read of a ``BlockStored``, ``BlockRemoved`` or ``AllBlocksCleared``."""

    type: str
    block_hashes: list[int | bytes] = []
    parent_block_hash: int | bytes | None = None
    block_size: int = 0
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    session_id: str | None = None


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


_decode = msgspec.msgpack.Decoder(Batch).decode


def _number(block: int | bytes) -> int:
    """A block's hash as a number; of a long one, as vLLM shortens it itself."""
    return block if isinstance(block, int) else int.from_bytes(block[-8:], "big")


class Subscription:
    """Keeps a ledger in step with one pod. ``troubled`` is called with each trouble."""

    def __init__(
        self,
        pod: str,
        endpoint: str,
        replay_endpoint: str | None,
        ledger: Ledger,
        troubled: Callable[[Trouble], None],
    ) -> None:
        self.pod = pod
        self.endpoint = endpoint
        self.replay_endpoint = replay_endpoint
        self.ledger = ledger
        self._troubled = troubled
        self._last = -1
        """The last message taken in, live or replayed."""
        self._live = -1
        """The last live one."""
        self._digest = 0
        """Of the last one's payload."""
        self._groups: dict[int | None, bool] = {}
        """Groups of layers that were seen, and whether they keep whole prefixes."""

    @property
    def heard(self) -> int:
        """Messages of the engine so far, up to the last one taken in."""
        return self._last + 1

    async def run(self) -> Never:
        """Follow the pod, for ever; a fault is counted, and the following starts anew."""
        while True:
            try:
                await self._follow()
            except Exception:
                self._troubled("lost")
                logger.exception("following the KV events of pod %s failed", self.pod)
            finally:
                self.ledger.live = False
            self._lose()
            await asyncio.sleep(1.0)

    async def _follow(self) -> None:
        """Take in messages as they come. Each connection is first brought up to date."""
        context = zmq.asyncio.Context.instance()
        with context.socket(zmq.SUB) as socket:
            _configure(socket)
            monitor = socket.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
            )
            socket.subscribe(b"")
            socket.connect(self.endpoint)
            try:
                poller = zmq.asyncio.Poller()
                poller.register(socket, zmq.POLLIN)
                poller.register(monitor, zmq.POLLIN)
                while True:
                    ready = dict(await poller.poll())
                    if monitor in ready:
                        await self._connection_changed(await monitor.recv_multipart())
                    elif socket in ready:
                        await self._take(await socket.recv_multipart())
            finally:
                socket.disable_monitor()
                monitor.close(linger=0)

    async def _connection_changed(self, frames: list[bytes]) -> None:
        event = int.from_bytes(frames[0][:2], "little")
        if event == zmq.EVENT_DISCONNECTED:
            if self.ledger.live:
                logger.warning("the KV events of pod %s are interrupted", self.pod)
            self.ledger.live = False
            return
        await self._catch_up()
        self.ledger.live = True
        logger.info("pod %s tells what its KV cache holds", self.pod)

    async def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8:
            self._malformed()
            return
        number, payload = int.from_bytes(frames[1], "big"), frames[2]
        if self._live < number <= self._last:
            self._live = number  # the replay has brought it before
            return
        if number <= self._last:
            self._restarted()
        if number > self._last + 1:
            await self._catch_up()
        if number > self._last:
            if number > self._last + 1:
                self._lose()
            self._apply(number, payload)
        self._live = number

    def _apply(self, number: int, payload: bytes) -> None:
        self._last = number
        self._digest = xxhash.xxh3_64_intdigest(payload)
        try:
            batch = _decode(payload)
        except (msgspec.DecodeError, ValueError, RecursionError):
            self._malformed()
            return
        for event in batch.events:
            if event.type == "BlockStored":
                self._stored(event)
            elif event.type == "BlockRemoved":
                if event.medium in _GPU and self._groups.get(event.group_idx, True):
                    self.ledger.remove([_number(block) for block in event.block_hashes])
            elif event.type == "AllBlocksCleared":
                self.ledger.emptied()

    def _stored(self, event: Event) -> None:
        if event.medium not in _GPU:
            return
        whole = event.kv_cache_spec_kind in _WHOLE
        if len(self._groups) < 64:
            self._groups[event.group_idx] = whole
        if not whole or event.block_size <= 0:
            return
        parent = event.parent_block_hash
        if not self.ledger.store(
            event.session_id,
            None if parent is None else _number(parent),
            [_number(block) for block in event.block_hashes],
            event.block_size,
        ):
            self._troubled("overflow")

    # -- what was missed -------------------------------------------------------------------------

    async def _catch_up(self) -> None:
        """Take in what is missing up to now, as far as the pod still has it. A long replay may lose
        messages on its way: it is asked for again, from where it broke off."""
        if self.replay_endpoint is None:
            if self._last >= 0:
                self._lose()
            return
        while True:
            before = self._last
            found: Replay
            try:
                found = await self._replay_from(max(0, self._last))
            except (TimeoutError, zmq.ZMQError):
                found = "torn"
            if found == "another":
                self._restarted()
            elif found == "whole":
                return
            elif self._last == before:
                logger.warning("pod %s does not replay its KV events", self.pod)
                self._lose()
                return

    async def _replay_from(self, start: int) -> Replay:
        """Ask for all messages from this one on, and take in those that are new."""
        known = self._last >= 0
        first = True
        async with self._asked(start) as answers:
            async for number, payload in answers:
                if first and known:
                    first = False
                    if number == start:
                        if xxhash.xxh3_64_intdigest(payload) != self._digest:
                            return "another"
                        continue
                    self._lose()  # what came between is forgotten there too
                if number != self._last + 1:
                    if self._last >= 0:
                        return "torn"
                    self._lose()  # the beginning is forgotten there
                self._apply(number, payload)
                self._troubled("replayed")
        return "another" if first and known else "whole"

    @asynccontextmanager
    async def _asked(self, start: int) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
        with zmq.asyncio.Context.instance().socket(zmq.DEALER) as socket:
            _configure(socket)
            assert self.replay_endpoint is not None
            socket.connect(self.replay_endpoint)
            await socket.send_multipart([b"", start.to_bytes(8, "big")])

            async def answers() -> AsyncIterator[tuple[int, bytes]]:
                while True:
                    async with asyncio.timeout(REPLAY_S):
                        frames = await socket.recv_multipart()
                    if len(frames) < 3 or frames[-2] == _END:
                        return
                    yield int.from_bytes(frames[-2], "big"), frames[-1]

            yield answers()

    def _restarted(self) -> None:
        """Another engine speaks: its cache was empty when it began."""
        self._troubled("restarted")
        self.ledger.emptied()
        self._last = self._live = -1

    def _lose(self) -> None:
        """Nothing is known any more of what the cache holds."""
        if self.ledger.knows_any:
            self._troubled("lost")
        self.ledger.clear()
        self._last = self._live = -1

    def _malformed(self) -> None:
        self._troubled("malformed")
        self.ledger.clear()


def _configure(socket: Any) -> None:
    socket.linger = 0
    socket.rcvhwm = MAX_QUEUED
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
    socket.setsockopt(zmq.IPV6, 1)
