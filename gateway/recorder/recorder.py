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
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from gateway.config import ConfigError, RecordSettings
from gateway.dialects.turn import ToolCall, TurnOutcome, TurnRequest, Usage
from gateway.idle import IdleKind
from gateway.losses import LossCause
from gateway.metrics import Metrics
from gateway.predictor import Forecast
from gateway.predictor.features import CallWords, features_of
from gateway.predictor.shell import well_known
from gateway.prefix import HEAD_SEGMENTS
from gateway.recorder.files import Directory, File
from gateway.recorder.names import Salted, kept_tool, stop_of
from gateway.recorder.prompts import Prompts
from gateway.sessions import CALLS_KEPT, Turn
from gateway.traces.cachewise import (
    BLOCK_BYTES,
    SCHEMA,
    CallRecord,
    ForecastRecord,
    SessionRecord,
    TurnRecord,
    lines,
)
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
"""Messages of all their prompts, of 20 bytes each."""
RETRY_S: Final = 10.0
"""A directory that could not be written is tried again after so long."""
STOP_S: Final = 5.0
"""At shutdown the last turns have this long to be written."""


class Note(msgspec.Struct, gc=False):
    """What the event loop keeps of a turn, for the thread to make a record of: there the work costs
    a third, as it is done for many at once. No text, and nothing that changes once it is over."""

    turn: Turn
    ended_at: float
    """Of the monotonic clock, as are all times of a turn."""
    first_byte_at: float | None
    held_s: float
    usage: Usage | None
    stop_reason: str | None
    """The pod's word."""
    asked: list[str]
    """The names of the tools that it asks for."""
    calls: Sequence[Seen]
    """Their features."""
    call_durations_s: list[float | None] | None
    idle_kind: IdleKind | None
    forecast: Fixed | None
    losses: dict[LossCause, int]
    pod: str
    model: str
    wire: str
    outcome: str
    status: int
    head_segments: int
    """Tools and system prompt in its prompt, as far as it was looked for."""


class Seen(Protocol):
    """A call's features, be they of the forecast or made anew."""

    @property
    def words(self) -> CallWords: ...
    @property
    def numbers(self) -> list[float]: ...


class Looked(NamedTuple):
    """A call that no forecast has looked at."""

    words: CallWords
    numbers: list[float]


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
                self._queued_segments += len(note.turn.prefix)
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
            told = self._all_lines(notes, self._salted)
            left = len(told)
            written = self._file.flush(b"".join(told))
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
        self._metrics.recorded_turns.inc(left)
        self._metrics.recorded_bytes.inc(written)
        if self._retry_at is not None:
            self._retry_at = None
            self._metrics.recording.set(1)
            logger.info("turns are recorded in %s again", self.directory.path)

    def _all_lines(self, notes: list[Note], salted: Salted) -> list[bytes]:
        """The turns' lines, without those of which none can be made."""
        told: list[bytes] = []
        for note in notes:
            try:
                told.append(self._lines(note, salted))
            except Exception:
                self._prompts.forget(note.turn.session.sid)
                self._lost("fault", 1)
                logger.exception("a turn could not be recorded")
        return told

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
        prefix = note.turn.prefix
        sid = note.turn.session.sid
        head = None
        told = self._prompts.of(sid)
        if told is None:
            told = self._prompts.begin(sid, salted.session(sid))
            head = self._session(note, told.name, salted)
        n = told.n
        shared, fresh = self._prompts.share(sid, told, prefix.chain, prefix.end_bytes, salted)
        record = _record(note, told.name, n, shared, fresh)
        return lines((record,) if head is None else (head, record))

    def _session(self, note: Note, name: str, salted: Salted) -> SessionRecord:
        session, ends = note.turn.session, note.turn.prefix.end_bytes
        rate = _prompt_tokens(note) / max(1, ends[-1])
        tools, system = ends[0], ends[note.head_segments - 1]
        aside = session.request_class in ("auxiliary", "compaction")
        return SessionRecord(
            SCHEMA,
            name,
            started_at=round(session.created_at + self._wall_s, 3),
            client=session.client,
            tenant=salted.tenant(session.scope),
            parent=_salted(salted, session.parent),
            forked_from=_salted(salted, session.forked_from),
            agent_type=session.request_class if aside else "",
            scope=salted.scope,
            block_bytes=BLOCK_BYTES,
            tool_tokens=round(tools * rate),
            system_tokens=round((system - tools) * rate),
        )


def _salted(salted: Salted, sid: str | None) -> str | None:
    return None if sid is None else salted.session(sid)


# -- what is kept of a turn ----------------------------------------------------------------------


def noted(flow: TurnFlow, now: float, outcome: TurnOutcome | None) -> Note:
    """A turn that is over, as it is kept until it is written."""
    turn, request, decision, forecast = flow.turn, flow.request, flow.decision, flow.forecast
    assert turn is not None
    assert request is not None
    asked: list[str] = []
    calls: Sequence[Seen] = ()
    if outcome is not None and outcome.tool_calls:
        asked = [call.name for call in outcome.tool_calls[:CALLS_KEPT]]
        calls = _looked_at(outcome.tool_calls[:CALLS_KEPT], turn.session.forecast)
    return Note(
        turn,
        now,
        flow.first_byte_at,
        flow.held_s,
        outcome.usage if outcome is not None else None,
        outcome.stop_reason if outcome is not None else None,
        asked,
        calls,
        flow.call_durations_s,
        turn.session.idle_kind,
        forecast if isinstance(forecast, Fixed) else None,
        flow.losses,
        "" if decision is None else decision.pod.name,
        request.model,
        request.wire,
        flow.outcome,
        flow.status,
        _head_segments(request) if turn.number == 1 else HEAD_SEGMENTS,
    )


def _looked_at(calls: list[ToolCall], forecast: Forecast | None) -> Sequence[Seen]:
    """The calls' features: those that the forecast was made of, where there is one."""
    basis = forecast.basis if forecast is not None else None
    seen: list[Seen] = [*basis.calls] if basis is not None else []
    if len(seen) == len(calls):
        return seen
    if len(seen) > len(calls):
        seen = []
    return [*seen, *(Looked(*features_of(call)) for call in calls[len(seen) :])]


def _head_segments(request: TurnRequest) -> int:
    """Segments up to the first message that is not the system's."""
    head = HEAD_SEGMENTS
    while head + 1 < len(request.segments) and request.item(head).role == "system":
        head += 1
    return head


def _prompt_tokens(note: Note) -> int:
    return _told(note.usage) or note.turn.prompt_tokens


def _told(usage: Usage | None) -> int:
    return 0 if usage is None else usage.prompt_tokens


def _record(note: Note, name: str, n: int, shared: int, fresh: list[int]) -> TurnRecord:
    """The turn in the words and numbers that may be kept."""
    turn, usage, forecast = note.turn, note.usage, note.forecast
    gap, cause, at = turn.gap, turn.change.cause, turn.started_at
    told = _told(usage) > 0
    record = TurnRecord(
        SCHEMA,
        name,
        n,
        round(at - turn.session.created_at, 4),
        _prompt_tokens(note),
        0 if usage is None else usage.output_tokens,
        usage.cached_tokens if usage is not None and told else None,
        not told,
        shared,
        tuple(fresh),
        number=turn.number,
        idle_kind=note.idle_kind,
        stop=stop_of(note.stop_reason, bool(note.asked)),
        api_s=round(note.ended_at - at, 4),
        model=note.model[:128],
        pod=note.pod,
        wire=note.wire,
        request_class=turn.request_class,
        outcome=note.outcome,
        status=note.status,
    )
    if gap is not None:
        record.gap_s, record.gap_kind = round(gap.seconds, 4), gap.kind
    elif turn.number > 1:
        record.gap_known = False
    if note.held_s:
        record.held_s = round(note.held_s, 4)
    if note.first_byte_at is not None:
        record.first_token_s = round(note.first_byte_at - at, 4)
    if cause is not None:
        record.broken_by, record.compacted = cause, cause == "compaction"
    if note.losses:
        record.lost_tokens = dict(note.losses.items())
    if note.call_durations_s:
        record.call_durations_s = tuple(note.call_durations_s)
    if note.calls:
        record.calls = tuple(map(_call, note.asked, note.calls))
    if forecast is not None:
        quantiles_s = tuple(forecast.stated())
        record.forecast = ForecastRecord(quantiles_s, round(forecast.p_return, 3))
    return record


def _call(asked: str, seen: Seen) -> CallRecord:
    words = seen.words
    numbers = tuple([round(number, 2) for number in seen.numbers[1:]])
    tool = kept_tool(asked[:128], words.tool)
    return CallRecord(words.kind, tool, *well_known(words.program, words.sub), numbers)
