"""Structured logs, plain or JSON, written by a thread so that a slow terminal or disk never stops
the event loop. A record that finds the queue full is dropped and counted.

Call sites log chosen fields, never headers or bodies. Two texts that nobody here chooses are cut
because either may quote a request: an exception is logged as its type and place, and of a foreign
library's message the first line is kept, from level `warning` on.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

import orjson

from gateway.config import LogSettings

QUEUE_RECORDS: Final = 10_000
STOP_TIMEOUT_S: Final = 2.0
FLUSH_S: Final = 0.1

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
    handler = LogQueue()
    formatter = _Json() if settings.format == "json" else _Plain()
    writer = _Writer(handler, stream or sys.stderr, formatter)
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
    # No line says where it was logged or by which thread: finding out costs more than the rest.
    spared = ("_srcfile", "logThreads", "logProcesses", "logMultiprocessing")
    were = {name: getattr(logging, name) for name in spared}
    for name in spared:
        setattr(logging, name, None)
    writer.start()
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        for name, value in were.items():
            setattr(logging, name, value)
        for each, was, propagated, handlers in before:
            each.setLevel(was)
            each.propagate, each.handlers = propagated, handlers
        writer.stop()


class LogQueue(logging.Handler):
    """Keeps records for the writer, or counts them in `dropped_total`. Never waits."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque()
        self.dropped_total = 0

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.records) >= QUEUE_RECORDS:
            self.dropped_total += 1
            return
        ours = record.name.partition(".")[0] in _OURS
        if record.args or record.exc_info or not ours:
            record = copy.copy(record)
            message = record.getMessage()
            record.msg, record.args = (
                (message if ours else message.partition("\n")[0]).strip(),
                None,
            )
            if record.exc_info:
                error = record.exc_info[1]
                fields = getattr(record, "fields", {})
                record.__dict__["fields"] = fields | ({"error": _place(error)} if error else {})
            record.exc_info = record.exc_text = record.stack_info = None
        self.records.append(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self.dropped_total += 1


class _Writer:
    """The thread that writes what has gathered, `FLUSH_S` at a time: waking it for each record
    would cost a turn more than all its other logging."""

    def __init__(self, source: LogQueue, stream: TextIO, formatter: logging.Formatter) -> None:
        self._source = source
        self._stream = stream
        self._formatter = formatter
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
        self.start = self._thread.start

    def _run(self) -> None:
        while not self._stopping.wait(FLUSH_S):
            self._write()
        self._write()

    def _write(self) -> None:
        source = self._source
        lines: list[str] = []
        while source.records:
            record = source.records.popleft()
            try:
                lines.append(self._formatter.format(record) + "\n")
            except Exception:
                source.dropped_total += 1
        if not lines:
            return
        try:
            self._stream.write("".join(lines))
            self._stream.flush()
        except (OSError, ValueError):
            source.dropped_total += len(lines)

    def stop(self) -> None:
        """Write what is left, unless nobody reads the stream."""
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)


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
    if isinstance(value, str):
        return value if _PLAIN_WORD(value) else orjson.dumps(value).decode()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return str(value) if value is not True and value is not False else str(value).lower()
    return orjson.dumps(value, default=str).decode()


_PLAIN_WORD: Final = re.compile(r"[!#-<>-~]+").fullmatch


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
