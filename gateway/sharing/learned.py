"""What replicas have learned of gaps: told to each other as sums, kept as a whole for new ones.

A replica tells what it has learned every `TELL_S` on a stream, of which the last entries are kept,
and takes from there what others tell. One of them writes the whole every `WHOLE_S`, with the place
in the stream up to which it holds, so that a replica that starts knows what the fleet knows.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Never

import msgspec

from gateway.foresight import Foresight
from gateway.metrics import Metrics
from gateway.predictor.delta import MAX_BYTES, Delta
from gateway.predictor.store import Snapshot, StateError, parse
from gateway.sharing.store import AwayError, Store

logger = logging.getLogger("gateway.sharing")

TELL_S: Final = 10.0
KEEP: Final = 1_000
"""Entries: a quarter of an hour of eleven replicas."""
KEEP_S: Final = 3_600
WHOLE_S: Final = 300
WHOLE_TTL_S: Final = 86_400
MAX_WHOLE_BYTES: Final = 32 * 1024 * 1024
MAX_ENTRIES: Final = 100
"""Taken at once."""


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    replica: str
    delta: bytes


class _Whole(msgspec.Struct, array_like=True, frozen=True):
    place: str
    state: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode_entry = msgspec.msgpack.Decoder(_Entry).decode
_decode_whole = msgspec.msgpack.Decoder(_Whole).decode


class Learned:
    """The forecasts' part of what is shared by one replica."""

    def __init__(self, store: Store, replica: str, foresight: Foresight, metrics: Metrics) -> None:
        self.store = store
        self.replica = replica
        self.foresight = foresight
        self.metrics = metrics
        self.place = "0-0"
        """In the stream, up to where this replica knows what others have learned."""
        self._began = False
        foresight.predictor.delta = Delta()

    async def run(self) -> Never:
        """Tell and take while it lasts. A fault of the store is left for the next time."""
        while True:
            await asyncio.sleep(TELL_S if self._began else 0.1)
            try:
                if not self._began:
                    await self.begin()
                await self.tell()
                await self.take()
                await self.keep()
            except AwayError:
                pass
            except Exception:
                self.metrics.degraded.labels("sharing").inc()
                logger.exception("sharing what was learned failed; it goes on")

    async def begin(self) -> None:
        """Start from what the fleet knows, if that is more. Raises `AwayError`."""
        self.place = await self.store.last("learned")
        data = await self.store.read("forecast", MAX_WHOLE_BYTES)
        self._began = True
        if data is None:
            return
        mine = self.foresight.predictor
        try:
            whole = _decode_whole(data)
            found = await asyncio.to_thread(parse, whole.state, mine.table.max_nodes)
            _check_place(whole.place)
        except (msgspec.DecodeError, ValueError, StateError) as error:
            logger.warning("what the fleet has learned is not used: %s", error)
            return
        if found.observed_total <= mine.observed_total:
            return
        found.correction = mine.correction
        found.delta = mine.delta
        self.foresight.predictor = found
        self.place = whole.place
        logger.info("forecasts start from %d gaps that the fleet has seen", found.observed_total)

    async def tell(self) -> None:
        """Tell what was learned since the last time. Raises `AwayError`: it is told later."""
        predictor = self.foresight.predictor
        delta = predictor.delta
        if not delta:
            return
        predictor.delta = Delta()
        try:
            entry = _encode(_Entry(self.replica, delta.pack()))
            await self.store.append("learned", entry, KEEP, KEEP_S)
        except AwayError:
            delta.merge(self.foresight.predictor.delta or Delta())
            self.foresight.predictor.delta = delta
            raise
        self.metrics.shared_gaps["told",].inc(delta.gaps)

    async def take(self) -> None:
        """Learn what others have told since the last time. Raises `AwayError`."""
        while True:
            entries = await self.store.follow("learned", self.place, MAX_ENTRIES)
            for place, data in entries:
                self.place = place
                try:
                    entry = _decode_entry(data[: MAX_BYTES + 1024])
                    if entry.replica == self.replica:
                        continue
                    delta = Delta.unpack(entry.delta)
                except (msgspec.DecodeError, ValueError) as error:
                    logger.warning("what another replica has learned is not used: %s", error)
                    continue
                self.foresight.predictor.learn_from(delta)
                self.metrics.shared_gaps["taken",].inc(delta.gaps)
                await asyncio.sleep(0)
            if len(entries) < MAX_ENTRIES:
                return

    async def keep(self) -> None:
        """Write the whole, if it is this replica's turn. Raises `AwayError`."""
        if not await self.store.claim("forecast:turn", self.replica, WHOLE_S):
            return
        place = self.place
        snapshot = Snapshot(self.foresight.predictor)
        state = await asyncio.to_thread(snapshot.dump)
        if len(state) <= MAX_WHOLE_BYTES:
            whole = _encode(_Whole(place, state))
            await self.store.write({"forecast": (whole, WHOLE_TTL_S)})


def _check_place(place: str) -> None:
    """Raises `ValueError` if it is no id of a stream's entry."""
    milliseconds, _, number = place.partition("-")
    if not (milliseconds.isdecimal() and number.isdecimal() and len(place) < 48):
        raise ValueError("its place in the stream cannot be")
