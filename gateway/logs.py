"""Structured logs, plain or JSON, written by a thread so that a slow terminal or disk never stops
the event loop. A record that finds the queue full is dropped and counted.

Call sites log chosen fields, never headers or bodies. Two texts that nobody here chooses are cut
because either may quote a request: an exception is logged as its type and place, and of a foreign
library's message the first line is kept, from level `warning` on.
"""

from __future__ import annotations

import copy
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from queue import Full, Queue
from typing import Any, Final, TextIO

import orjson

from gateway.config import LogSettings

QUEUE_RECORDS: Final = 10_000
STOP_TIMEOUT_S: Final = 2.0

_OURS: Final = ("gateway", "uvicorn")


def turn_logged(logger: logging.Logger, **fields: Any) -> None:
    """Writes the one line of a turn. The fields go out as they are: no header, body or key."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("turn", extra={"fields": fields})


def dropped_total() -> int:
    """Records lost since the logs were opened, to a full queue or a failed write."""
    handlers = logging.getLogger().handlers
    return sum(handler.dropped_total for handler in handlers if isinstance(handler, LogQueue))


@contextmanager
def logging_to(settings: LogSettings, stream: TextIO | None = None) -> Iterator[LogQueue]:
    """Sends the gateway's and uvicorn's logs to `stream` (standard error) in the chosen form.

    Undone on exit, when what is queued is written, for at most `STOP_TIMEOUT_S`.
    """
    records: Queue[logging.LogRecord | None] = Queue(QUEUE_RECORDS)
    handler = LogQueue(records)
    writer = _Writer(stream or sys.stderr, handler)
    writer.setFormatter(_Json() if settings.format == "json" else _Plain())
    listener = QueueListener(records, writer)
    level = logging.getLevelName(settings.level.upper())
    levels: dict[str | None, int] = {None: logging.WARNING, "gateway": level, "uvicorn": level}
    levels |= {"uvicorn.error": logging.NOTSET, "uvicorn.access": logging.CRITICAL + 1}
    loggers = {logging.getLogger(name): wanted for name, wanted in levels.items()}
    before = [(each, each.level, each.propagate, each.handlers) for each in loggers]
    for each, wanted in loggers.items():
        each.setLevel(wanted)
        if each.parent is not None:  # uvicorn's own handlers would write exceptions in full
            each.propagate, each.handlers = True, []
    root = logging.getLogger()
    root.addHandler(handler)
    listener.start()
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        for each, was, propagated, handlers in before:
            each.setLevel(was)
            each.propagate, each.handlers = propagated, handlers
        _stop(listener, records)


class LogQueue(QueueHandler):
    """Puts records on a bounded queue, or counts them in `dropped_total`."""

    def __init__(self, records: Queue[logging.LogRecord | None]) -> None:
        super().__init__(records)
        self.dropped_total = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record = copy.copy(record)
        message = record.getMessage()
        if record.name.partition(".")[0] not in _OURS:
            message = message.partition("\n")[0]
        record.msg, record.args = message.strip(), None
        if record.exc_info:
            error = record.exc_info[1]
            fields = getattr(record, "fields", {})
            record.__dict__["fields"] = fields | ({"error": _place(error)} if error else {})
        record.exc_info = record.exc_text = record.stack_info = None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except Full:
            self.dropped_total += 1

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self.dropped_total += 1


class _Writer(logging.StreamHandler[TextIO]):
    def __init__(self, stream: TextIO, source: LogQueue) -> None:
        super().__init__(stream)
        self._source = source

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self._source.dropped_total += 1


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        base = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line = base | getattr(record, "fields", {}) | base
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        fields: dict[str, Any] = getattr(record, "fields", {})
        words = [f"{key}={_word(value)}" for key, value in fields.items()]
        return " ".join([_time(record), f"{record.levelname:7}", record.name, message, *words])


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    plain = text.isprintable() and text and not any(c in text for c in ' "=')
    return text if plain or not isinstance(value, str) else orjson.dumps(text).decode()


def _place(error: BaseException) -> str:
    """Type and place of an exception and of what caused it, without their texts."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    trail = " > ".join(
        f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
        for frame in frames
    )
    text = f"{type(error).__name__} at {trail}" if trail else type(error).__name__
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return " <- ".join([text, *map(_place, inner[:3]), *([_place(cause)] if cause else [])])


def _stop(listener: QueueListener, records: Queue[logging.LogRecord | None]) -> None:
    """`QueueListener.stop` that gives up on a stream nobody reads."""
    thread = listener._thread
    try:
        records.put(None, timeout=STOP_TIMEOUT_S)
    except Full:
        return
    if thread is not None:
        thread.join(STOP_TIMEOUT_S)
