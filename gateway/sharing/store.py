"""The Redis (or Valkey) that replicas share: reads with a deadline, writes in pipelines, a channel.

A few connections, whatever the load: reads that wait at the same moment go out as one MGET, so that
a turn's read costs it one round trip, or at most its deadline. While the store does not answer
nothing waits for it: reads fail at once, until it answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from math import inf
from typing import Any, Final, Never

from gateway.config import ConfigError

try:
    import redis.asyncio as redis
    from redis.asyncio.client import PubSub
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
except ImportError:
    raise ConfigError(
        "sharing.redis_url: the client of Redis is not installed; allowed: a URL after"
        " pip install 'cachewise-gateway[redis]', or none"
    ) from None

logger = logging.getLogger("gateway.sharing")

CONNECT_S: Final = 2.0
ANSWER_S: Final = 2.0
"""Longest wait for an answer off a turn's way; then the store counts as away."""
BACKOFF_S: Final = (0.1, 5.0)
CANCEL_AGAIN_S: Final = 0.2
SILENCE_S: Final = 5.0
"""The channel, on which this replica hears itself too, is dead if nothing comes for so long."""
LATE_IN_A_ROW: Final = 3
"""So many reads that missed their deadline in a row, and the store counts as away until it has
answered."""


class AwayError(Exception):
    """The store does not answer, or not in time."""


class LateError(AwayError):
    """The store has not answered by the deadline."""


class Store:
    """One Redis. All names in it begin with ``prefix``.

    ``heard`` is called with each message on the channel. `run` keeps the connections; before it
    is well, and whenever it is not, every operation raises `AwayError`.
    """

    def __init__(self, url: str, prefix: str, heard: Callable[[bytes], None]) -> None:
        self.prefix = prefix
        self.up = False
        self.up_since = inf
        """Since when the channel is listened to without a gap; monotonic seconds."""
        self.losses = 0
        """Times that the store was lost."""
        self._heard = heard
        self._late = 0
        self._asked: list[tuple[Sequence[str], asyncio.Future[list[bytes | None]]]] = []
        self._asking = asyncio.Event()
        self._client = redis.Redis.from_url(
            url,
            socket_timeout=ANSWER_S,
            socket_connect_timeout=CONNECT_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=8,
            client_name="cachewise",
        )

    @property
    def answers(self) -> bool:
        """Whether it is worth while to ask."""
        return self.up and self._late < LATE_IN_A_ROW

    # -- on a turn's way -------------------------------------------------------------------------

    async def get(self, keys: Sequence[str], deadline_s: float) -> list[bytes | None]:
        """The values of some keys. Raises `AwayError`, at the latest after ``deadline_s``."""
        if not self.answers:
            raise AwayError
        answer: asyncio.Future[list[bytes | None]] = asyncio.get_running_loop().create_future()
        self._asked.append((keys, answer))
        self._asking.set()
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError:
            self._late += 1
            if self._late == LATE_IN_A_ROW:
                logger.warning("the shared store is late: turns go on without it")
            raise LateError from None

    async def _answer(self) -> Never:
        """Answer all that was asked since the last answer by one MGET."""
        while True:
            await self._asking.wait()
            self._asking.clear()
            asked = [(keys, answer) for keys, answer in self._asked if not answer.done()]
            self._asked.clear()
            if not asked:
                continue
            try:
                flat = [self.prefix + key for keys, _ in asked for key in keys]
                values: Any = await self._client.mget(flat)
            except BaseException:
                for _, answer in asked:
                    if not answer.done():
                        answer.set_exception(AwayError())
                raise
            self._on_time()
            at = 0
            for keys, answer in asked:
                if not answer.done():
                    answer.set_result(values[at : at + len(keys)])
                at += len(keys)

    def _on_time(self) -> None:
        if self._late >= LATE_IN_A_ROW:
            logger.info("the shared store answers again")
        self._late = 0

    # -- beside it -------------------------------------------------------------------------------

    async def write(
        self,
        values: Mapping[str, tuple[bytes, int]],
        gone: Sequence[str] = (),
        message: bytes | None = None,
    ) -> None:
        """Set values, each for so many seconds, delete keys, then tell the channel: one round trip.
        Raises `AwayError`."""
        async with self._pipeline() as pipe:
            for key, (value, ttl_s) in values.items():
                pipe.set(self.prefix + key, value, ex=ttl_s)
            if gone:
                pipe.unlink(*(self.prefix + key for key in gone))
            if message is not None:
                pipe.publish(f"{self.prefix}news", message)

    async def append(self, stream: str, entry: bytes, keep: int, ttl_s: int) -> None:
        """Add to a stream of which about the last ``keep`` entries are kept. Raises
        `AwayError`."""
        async with self._pipeline() as pipe:
            pipe.xadd(f"{self.prefix}{stream}", {b"d": entry}, maxlen=keep)
            pipe.expire(f"{self.prefix}{stream}", ttl_s)

    async def last(self, stream: str) -> str:
        """The id of a stream's last entry. Raises `AwayError`."""
        with self._asking_beside():
            entries: Any = await self._client.xrevrange(f"{self.prefix}{stream}", count=1)
        return entries[0][0].decode() if entries else "0-0"

    async def follow(self, stream: str, after: str, count: int) -> list[tuple[str, bytes]]:
        """Entries of a stream after one of its ids, with theirs. Raises `AwayError`."""
        with self._asking_beside():
            entries: Any = await self._client.xrange(
                f"{self.prefix}{stream}", min=f"({after}", count=count
            )
        return [(i.decode(), fields.get(b"d", b"")) for i, fields in entries or ()]

    async def read(self, key: str, longest: int) -> bytes | None:
        """A value, if it is there and no longer than ``longest``. Raises `AwayError`."""
        with self._asking_beside():
            if await self._client.strlen(self.prefix + key) > longest:
                return None
            value: Any = await self._client.get(self.prefix + key)
        return value or None

    async def claim(self, key: str, who: str, ttl_s: int) -> bool:
        """Whether nobody has claimed it for as long. Raises `AwayError`."""
        with self._asking_beside():
            return bool(await self._client.set(self.prefix + key, who, nx=True, ex=ttl_s))

    @asynccontextmanager
    async def _pipeline(self) -> AsyncIterator[Any]:
        with self._asking_beside():
            async with self._client.pipeline(transaction=False) as pipe:
                yield pipe
                await pipe.execute()

    @contextmanager
    def _asking_beside(self) -> Iterator[None]:
        """Off a turn's way. Raises `AwayError` where the store is away, or turns out to be."""
        if not self.up:
            raise AwayError
        try:
            yield
        except (RedisError, OSError) as error:
            raise AwayError from error

    # -- the connections -------------------------------------------------------------------------

    async def run(self) -> Never:
        """Connect, listen and answer; when that fails, again, for ever."""
        low_s, high_s = BACKOFF_S
        backoff_s = low_s
        failed = False
        try:
            while True:
                try:
                    async with self._client.pubsub() as channel:
                        await self._client.ping()
                        await channel.subscribe(f"{self.prefix}news")
                        self.up, self.up_since, self._late = True, time.monotonic(), 0
                        if failed:
                            logger.info("the shared store is back")
                        failed, backoff_s = False, low_s
                        await together(self._listen(channel), self._answer())
                except (RedisError, OSError, TimeoutError) as error:
                    if not failed:
                        logger.warning(
                            "the shared store is away (%s): this replica goes on alone",
                            type(error).__name__,
                        )
                    failed = True
                    with contextlib.suppress(RedisError, OSError):
                        await self._client.connection_pool.disconnect()  # all of them are dead
                finally:
                    self._fall()
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1))
                backoff_s = min(2 * backoff_s, high_s)
        finally:
            with contextlib.suppress(RedisError, OSError):
                await self._client.aclose()

    def _fall(self) -> None:
        self.losses += self.up
        self.up, self.up_since = False, inf
        for _, answer in self._asked:
            if not answer.done():
                answer.set_exception(AwayError())
        self._asked.clear()

    async def _listen(self, channel: PubSub) -> Never:
        while True:
            async with asyncio.timeout(SILENCE_S):
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=None)
            if message is not None:
                self._heard(message["data"])


async def together(*works: Coroutine[Any, Any, Any]) -> None:
    """Run works that never end by themselves until one fails; raises its error, the others are
    cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await stop(*tasks)


async def stop(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and see them end. A cancellation that meets a connection being made is lost in
    the client of Redis, so it is repeated."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # seen
