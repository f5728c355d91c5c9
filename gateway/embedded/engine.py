"""The engine as a task: steps the scheduler while there is work and sleeps between steps."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine_patch.hints import Envelope, Parsed
from gateway.embedded.prompt import TokenSequence
from gateway.embedded.scheduler import EngineConfig, Request, Scheduler

if TYPE_CHECKING:
    from gateway.embedded.kv_events import KvEvents

MIN_SLEEP_S = 0.002  # shorter steps are taken several at once: a wake-up costs more than they do


class EngineDeadError(Exception):
    """The engine was closed while a request ran."""


class Generation:
    """One request in the engine, as its caller sees it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._dead = False
        self._wake = asyncio.Event()

    @property
    def cached_tokens(self) -> int:
        return self.request.num_cached_tokens or 0

    def wake(self) -> None:
        self._wake.set()

    def fail(self) -> None:
        self._dead = True
        self._wake.set()

    async def progress(self) -> AsyncIterator[int]:
        """Yields the number of tokens generated so far each time it has grown, to the last.

        Raises EngineDeadError when the engine is closed first.
        """
        seen = 0
        while seen < self.request.output_tokens:
            await self._wake.wait()
            self._wake.clear()
            if self._dead:
                raise EngineDeadError
            seen = self.request.generated_tokens
            yield seen


class EmbeddedEngine:
    """A vLLM engine core with a modelled accelerator, `speedup` times faster than the model."""

    def __init__(self, config: EngineConfig | None = None, *, speedup: float = 20.0) -> None:
        self.config = config or EngineConfig()
        self.scheduler = Scheduler(self.config)
        self.speedup = speedup
        self._generations: dict[Request, Generation] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._events: KvEvents | None = None
        self._closed = False

    @property
    def num_requests(self) -> int:
        """Requests waiting or running."""
        return len(self._generations)

    @property
    def closed(self) -> bool:
        return self._closed

    def publish_to(self, events: KvEvents) -> None:
        """Publish what the cache holds from now on; `events` is closed with the engine."""
        self._events = events
        self.scheduler.tell(events)

    @contextmanager
    def generate(
        self,
        tokens: TokenSequence,
        *,
        finish_reason: str,
        session_id: str | None = None,
        kv_hints: tuple[Envelope, Parsed] | None = None,
    ) -> Iterator[Generation]:
        """Run one request for the length of the `with` block; leaving it early aborts it.

        `finish_reason` ("stop" or "length") is only counted. Raises EngineDeadError when closed.
        """
        if self._closed:
            raise EngineDeadError
        request = Request(
            request_id=uuid.uuid4().hex,
            prompt_tokens=tokens.prompt_tokens,
            output_tokens=tokens.output_tokens,
            block_hashes=tokens.block_hashes,
            arrival_s=asyncio.get_running_loop().time(),
            session_id=session_id,
            kv_hints=kv_hints,
        )
        self.scheduler.add(request)
        generation = self._generations[request] = Generation(request)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step_while_busy(), name="embedded-engine")
        try:
            yield generation
        finally:
            del self._generations[request]
            if request.finished:
                self.scheduler.counters.finished[finish_reason] += 1
            else:
                self.scheduler.abort(request)

    async def aclose(self) -> None:
        """Stop stepping; every request still in the engine fails."""
        self._closed = True
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.gather(self._stepping, return_exceptions=True)
        if self._events is not None:
            await self._events.aclose()

    async def _step_while_busy(self) -> None:
        try:
            await self._step_to_idle(asyncio.get_running_loop().time)
        finally:
            if self.scheduler.has_work:  # closed or broken: nobody will step again
                for generation in self._generations.values():
                    generation.fail()

    async def _step_to_idle(self, clock: Callable[[], float]) -> None:
        step_ends_s = clock()
        while self.scheduler.has_work:
            step = self.scheduler.schedule(horizon_s=MIN_SLEEP_S * self.speedup)
            assert step is not None, "a request that fits the cache can always be scheduled"
            # Steps follow each other without a gap, however late the loop wakes us.
            step_ends_s = max(step_ends_s, clock() - MIN_SLEEP_S) + step.duration_s / self.speedup
            await asyncio.sleep(max(0.0, step_ends_s - clock()))
            for request in self.scheduler.complete(step, clock()):
                self._generations[request].wake()
            if self._events is not None:
                self._events.publish()
