"""Turns on their way into recordings: noted in the event loop, written by a thread.

A turn that has ended leaves a `Note`, without any text, in a bounded queue. Once a second the
thread makes records of the notes and adds them to the file. What cannot be written is lost and
counted; no turn ever waits.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.config import ConfigError, RecordSettings
from gateway.dialects.turn import ToolCall, TurnOutcome, TurnRequest
from gateway.metrics import Metrics
from gateway.predictor import Forecast
from gateway.predictor.features import CallWords, features_of
from gateway.prefix import HEAD_SEGMENTS
from gateway.recorder.files import Directory, File
from gateway.recorder.names import Salted, kept_tool, stop_of
from gateway.recorder.prompts import Prompts
from gateway.sessions import CALLS_KEPT
from gateway.traces.cachewise import (
    BLOCK_BYTES,
    SCHEMA,
    CallRecord,
    ForecastRecord,
    SessionRecord,
    TurnRecord,
    encode,
)
from gateway.turn_history import QUANTILES
from gateway.waits import Fixed

if TYPE_CHECKING:
    from gateway.turns import TurnFlow

logger = logging.getLogger("gateway.recorder")

FLUSH_S: Final = 1.0
"""A gateway that is killed loses the turns of so long."""
FLUSHED_RECORDS: Final = 256
"""So many are written at once."""
MAX_QUEUED: Final = 8_192
"""Turns that wait to be written; beyond it they are lost."""
MAX_QUEUED_SEGMENTS: Final = 2_000_000
"""Messages of all their prompts, of 12 bytes each."""
RETRY_S: Final = 10.0
"""A directory that could not be written is tried again after so long."""
STOP_S: Final = 5.0
"""At shutdown the last turns have this long to be written."""


class Note(msgspec.Struct, gc=False):
    """What the event loop keeps of a turn for the thread."""

    record: TurnRecord
    """Without session, time and blocks."""
    chain: array[int]
    end_bytes: array[int]
    """Of its prompt (`gateway.prefix.Prefix`)."""
    head_segments: int
    """Of these, tools and system prompt, as far as it was looked for."""
    at: float
    """Its arrival, of the monotonic clock."""
    forecast: Fixed | None
    sid: str
    session_at: float
    client: str
    scope: int
    parent: str | None
    forked_from: str | None
    request_class: str


class Recorder:
    """The recorder of one gateway. `ended` is for the event loop; `running` starts the thread."""

    def __init__(
        self, settings: RecordSettings, metrics: Metrics, wall_minus_monotonic_s: float
    ) -> None:
        """Raises `ConfigError` if the directory cannot be used; a full disk may become free."""
        assert settings.directory is not None
        self.directory = Directory(settings.directory, settings.max_bytes)
        self._metrics = metrics
        self._wall_s = wall_minus_monotonic_s
        self._lock = threading.Lock()
        self._queue: list[Note] = []
        self._queued_segments = 0
        self._stop = threading.Event()
        self._retry_at: float | None = None
        """When to try again; None while all is well."""
        self._prompts = Prompts()
        self._file: File | None = None
        self._salted: Salted | None = None
        try:
            self.directory.salt()
            self.directory.check()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise ConfigError(
                    f"record.directory: {str(settings.directory)!r} cannot be used"
                    f" ({error.strerror}); allowed: a directory that the gateway can write"
                ) from None

    # -- in the event loop -----------------------------------------------------------------------

    def ended(self, flow: TurnFlow, now: float, outcome: TurnOutcome | None) -> None:
        """A turn is over, in whatever way."""
        if flow.turn is None:
            return
        if self._retry_at is not None and now < self._retry_at:
            self._lost("disk", 1)
        else:
            self.keep(noted(flow, now, outcome))

    def keep(self, note: Note) -> None:
        """Let the thread write it, unless too many wait already."""
        with self._lock:
            room = len(self._queue) < MAX_QUEUED and self._queued_segments < MAX_QUEUED_SEGMENTS
            if room:
                self._queue.append(note)
                self._queued_segments += len(note.chain)
        if not room:
            self._lost("queue", 1)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write as long as the context lasts, then what is left."""
        thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        thread.start()
        self._metrics.recording.set(1)
        logger.info("turns are recorded in %s", self.directory.path)
        try:
            yield
        finally:
            self._stop.set()
            await asyncio.to_thread(thread.join, STOP_S)
            if thread.is_alive():
                logger.warning("the last turns could not be recorded in %.0f s", STOP_S)

    # -- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(FLUSH_S)
            with self._lock:
                notes, self._queue, self._queued_segments = self._queue, [], 0
            for first in range(0, len(notes), FLUSHED_RECORDS):
                self._write(notes[first : first + FLUSHED_RECORDS], time.monotonic())
                self._turn_over(time.monotonic(), last=False)
            self._turn_over(time.monotonic(), last=stopping)

    def _write(self, notes: list[Note], now: float) -> None:
        left = len(notes)
        try:
            if self._file is None:
                self._salted = Salted(self.directory.salt())
                self._prompts.clear()
                self._file = File(self.directory, now)
            assert self._salted is not None
            lines = self._all_lines(notes, self._salted)
            left = len(lines)
            written = self._file.flush(b"".join(lines))
        except OSError as error:
            self._file = None
            self._lost("disk", left)
            self._stopped(error, now)
            return
        except Exception:
            if self._file is not None:
                self._file.abandon()
                self._file = None
            self._lost("fault", left)
            logger.exception("turns could not be recorded")
            return
        self._metrics.recorded_turns.inc(len(lines))
        self._metrics.recorded_bytes.inc(written)
        if self._retry_at is not None:
            self._retry_at = None
            self._metrics.recording.set(1)
            logger.info("turns are recorded in %s again", self.directory.path)

    def _all_lines(self, notes: list[Note], salted: Salted) -> list[bytes]:
        """The turns' lines, without those of which none can be made."""
        lines: list[bytes] = []
        for note in notes:
            try:
                lines.append(self._lines(note, salted))
            except Exception:
                self._prompts.forget(note.sid)
                self._lost("fault", 1)
                logger.exception("a turn could not be recorded")
        return lines

    def _turn_over(self, now: float, last: bool) -> None:
        """Close the file if it is full or the last."""
        file = self._file
        if file is None or not (last or file.full(now)):
            return
        self._file = None
        try:
            self._metrics.recorded_bytes.inc(file.close())
        except OSError as error:
            self._stopped(error, now)

    def _stopped(self, error: OSError, now: float) -> None:
        if self._retry_at is None:
            self._metrics.recording.set(0)
            logger.error(
                "turns are not recorded any more: %s: %s; free space there or lower"
                " record.max_bytes, recording goes on by itself",
                self.directory.path,
                error.strerror,
            )
        self._retry_at = now + RETRY_S

    def _lost(self, lost_to: str, turns: int) -> None:
        self._metrics.recording_lost[lost_to,].inc(turns)

    def _lines(self, note: Note, salted: Salted) -> bytes:
        """A turn's line, behind its session's if the file does not have it."""
        head = b""
        told = self._prompts.of(note.sid)
        if told is None:
            told = self._prompts.begin(note.sid, salted.name("session", note.sid))
            head = encode(self._session(note, told.name, salted)) + b"\n"
        record = note.record
        record.session = told.name
        record.n = told.n
        record.at_s = round(note.at - note.session_at, 4)
        shared, fresh = self._prompts.share(note.sid, told, note.chain, note.end_bytes, salted)
        record.shared, record.fresh = shared, tuple(fresh)
        if note.forecast is not None:
            quantiles_s = note.forecast.quantiles(QUANTILES)
            record.forecast = ForecastRecord(tuple(quantiles_s), round(note.forecast.p_return, 3))
        return head + encode(record) + b"\n"

    def _session(self, note: Note, name: str, salted: Salted) -> SessionRecord:
        ends = note.end_bytes
        rate = note.record.prompt_tokens / max(1, ends[-1])
        tools, system = ends[0], ends[note.head_segments - 1]
        aside = note.request_class in ("auxiliary", "compaction")
        return SessionRecord(
            SCHEMA,
            name,
            started_at=round(note.session_at + self._wall_s, 3),
            client=note.client,
            tenant=salted.tenant(f"{note.scope:x}"),
            parent=_salted(salted, note.parent),
            forked_from=_salted(salted, note.forked_from),
            agent_type=note.request_class if aside else "",
            scope=salted.scope,
            block_bytes=BLOCK_BYTES,
            tool_tokens=round(tools * rate),
            system_tokens=round((system - tools) * rate),
        )


def _salted(salted: Salted, sid: str | None) -> str | None:
    return None if sid is None else salted.name("session", sid)


# -- what is kept of a turn ----------------------------------------------------------------------


def noted(flow: TurnFlow, now: float, outcome: TurnOutcome | None) -> Note:
    """Counts, times, and words that may be kept."""
    turn, request, decision = flow.turn, flow.request, flow.decision
    assert turn is not None
    assert request is not None
    session, gap = turn.session, turn.gap
    usage = outcome.usage if outcome is not None else None
    told = usage is not None and usage.prompt_tokens > 0
    at = turn.started_at
    record = TurnRecord(
        SCHEMA,
        "",
        0,
        0.0,
        usage.prompt_tokens if usage and told else turn.prompt_tokens,
        usage.output_tokens if usage else 0,
        usage.cached_tokens if usage and told else None,
        estimated=not told,
        number=turn.number,
        gap_s=0.0 if gap is None else round(gap.seconds, 4),
        gap_known=gap is not None or turn.number == 1,
        gap_kind=None if gap is None else gap.kind,
        call_durations_s=tuple(flow.call_durations_s or ()),
        idle_kind=session.idle_kind,
        held_s=round(flow.held_s, 4),
        first_token_s=None if flow.first_byte_at is None else round(flow.first_byte_at - at, 4),
        api_s=round(now - at, 4),
        model=request.model[:128],
        compacted=turn.change.cause == "compaction",
        broken_by=turn.change.cause,
        lost_tokens=dict(flow.losses.items()),
        pod="" if decision is None else decision.pod.name,
        wire=request.wire,
        request_class=turn.request_class,
        outcome=flow.outcome,
        status=flow.status,
    )
    if outcome is not None:
        record.stop = stop_of(outcome)
        if outcome.tool_calls:
            record.calls = _calls(outcome.tool_calls, session.forecast)
    return Note(
        record,
        turn.prefix.chain,
        turn.prefix.end_bytes,
        _head_segments(request) if turn.number == 1 else HEAD_SEGMENTS,
        at,
        flow.forecast if isinstance(flow.forecast, Fixed) else None,
        session.sid,
        session.created_at,
        session.client,
        session.scope,
        session.parent,
        session.forked_from,
        session.request_class,
    )


def _head_segments(request: TurnRequest) -> int:
    """Segments up to the first message that is not the system's."""
    head = HEAD_SEGMENTS
    while head + 1 < len(request.segments) and request.item(head).role == "system":
        head += 1
    return head


def _calls(calls: list[ToolCall], forecast: Forecast | None) -> tuple[CallRecord, ...]:
    """The calls' features: those that the forecast was made of, where there is one."""
    basis = forecast.basis if forecast is not None else None
    seen = [(call.words, call.numbers) for call in basis.calls] if basis is not None else []
    if len(seen) > len(calls):
        seen = []
    seen += map(features_of, calls[len(seen) : CALLS_KEPT])
    return tuple(_call(call.name, *found) for call, found in zip(calls, seen, strict=False))


def _call(asked: str, words: CallWords, numbers: list[float]) -> CallRecord:
    return CallRecord(
        words.kind,
        kept_tool(asked[:128], words.tool),
        words.program,
        words.sub,
        tuple([round(number, 2) for number in numbers[1:]]),
    )
