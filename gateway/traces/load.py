"""Reads traces of any known format; which one is told by a file's content."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import orjson

from gateway.traces import (
    cachewise,
    claude_code,
    codex,
    kv_cache_tester,
    mooncake,
    tracelab,
    turn_records,
)
from gateway.traces.lines import (
    DAMAGED,
    SUFFIXES,
    Problems,
    TraceError,
    explain,
    opened,
    printable,
    records,
)
from gateway.traces.session import Session

LOOKED_AT: Final = 200
"""Records of a file that are looked at to tell its format."""
WHOLE_BYTES: Final = 1 << 28
"""A file that is one JSON text over several lines may be this long."""

Format: TypeAlias = Literal[
    "cachewise",
    "kv-cache-tester",
    "kv-cache-tester-compact",
    "mooncake",
    "turns",
    "claude-code",
    "codex",
    "tracelab",
]
_TOLD_BY: Final[tuple[tuple[Format, Callable[[dict[str, Any]], bool]], ...]] = (
    ("cachewise", cachewise.is_record),
    ("kv-cache-tester", kv_cache_tester.is_session),
    ("kv-cache-tester-compact", kv_cache_tester.is_compact),
    ("mooncake", mooncake.is_request),
    ("tracelab", tracelab.is_round),
    ("codex", codex.is_entry),
    ("claude-code", claude_code.is_entry),
    ("turns", turn_records.is_turn),
    ("turns", turn_records.is_call),
)
_BROKEN: Final = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    OverflowError,
    AssertionError,
)
"""What a record of another shape than expected raises."""
FORMATS: Final = tuple(dict.fromkeys(name for name, _ in _TOLD_BY))


@dataclass
class Trace:
    """Sessions that were read, and what was skipped."""

    sessions: list[Session] = field(default_factory=list)
    formats: dict[Format, int] = field(default_factory=dict)
    """Files of each format."""
    unknown: list[Path] = field(default_factory=list)
    """Files of no known format."""
    copies: int = 0
    """Files left out, as one of the same content was there."""
    repeated: int = 0
    """Sessions left out, as one of the same id was there."""
    problems: Problems = field(default_factory=Problems)


def files_of(paths: Iterable[Path]) -> list[Path]:
    """The files that paths name: a file itself, of a directory all that may hold a trace.

    Raises:
        TraceError: a path is not there.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            below = (p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            found.update(dict.fromkeys(sorted(below)))
        elif path.exists():
            found[path] = None
        else:
            raise TraceError(f"{path}: there is no such file or directory")
    return list(found)


def load(paths: Iterable[Path], read: Callable[[int], None] | None = None) -> Trace:
    """The sessions of traces. Records that cannot be read are counted in ``problems``, of a file of
    no known format only that it is torn or damaged; copies of files and sessions of an id seen
    before are left out. ``read`` is told of bytes as they are read.

    Raises:
        TraceError: a path is not there or cannot be read.
    """
    trace = Trace()
    everything = _Everything(trace)
    files = files_of(paths)
    try:
        originals = _originals(files)
    except OSError as error:
        raise TraceError(f"{error.filename}: {error.strerror}") from None
    trace.copies = len(files) - len(originals)
    for path in originals:
        try:
            everything.read(path, read)
        except OSError as error:
            raise TraceError(f"{path}: {error.strerror or error}") from None
    everything.finish()
    return trace


def _originals(files: list[Path]) -> list[Path]:
    """The files without those that are another one byte for byte."""
    sizes = {path: path.stat().st_size for path in files}
    times = Counter(sizes.values())
    found: list[Path] = []
    seen: set[str] = set()
    for path, size in sizes.items():
        if size and times[size] > 1:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "blake2b").hexdigest()
            if content in seen:
                continue
            seen.add(content)
        found.append(path)
    return found


class _Everything:
    """The readers of all formats, and the sessions they have made."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._seen: set[str] = set()
        self._turns = turn_records.Reader()
        self._tracelab = tracelab.Reader()
        self._claude_code = claude_code.Reader()
        self._recorded = cachewise.Reader()

    def read(self, path: Path, read: Callable[[int], None] | None) -> None:
        with opened(path, read) as lines:
            problems = Problems()
            coming = records(lines, path, problems)
            looked_at = list(itertools.islice(coming, LOOKED_AT))
            found = _format(record for _, record in looked_at)
            if found is None:
                whole = self._whole(path) if problems.count else None
                if whole is not None and (found := _format([whole])) is not None:
                    problems, looked_at, coming = Problems(), [(1, whole)], iter(())
            if found is None:
                self._trace.unknown.append(path)
                return
            self._trace.formats[found] = self._trace.formats.get(found, 0) + 1
            self._feed(found, path, itertools.chain(looked_at, coming), problems)
            self._trace.problems.merge(problems)

    def _whole(self, path: Path) -> dict[str, Any] | None:
        """A file that is one JSON object over several lines. That it is damaged is a problem."""
        with opened(path) as file:
            try:
                value = orjson.loads(file.read(WHOLE_BYTES))
            except orjson.JSONDecodeError:
                return None
            except DAMAGED as error:
                self._trace.problems.add(path, 1, explain(error))
                return None
        return value if isinstance(value, dict) else None

    def _feed(
        self,
        found: Format,
        path: Path,
        coming: Iterable[tuple[int, dict[str, Any]]],
        problems: Problems,
    ) -> None:
        made: list[Session] = []
        own: mooncake.Reader | codex.Reader | None = None
        take: Callable[[dict[str, Any]], None]
        if found == "kv-cache-tester":
            scope = printable(path.parent)
            take = lambda record: made.extend(kv_cache_tester.sessions(record, scope))  # noqa: E731
        elif found == "kv-cache-tester-compact":
            take = lambda record: made.extend(kv_cache_tester.compact_sessions(record))  # noqa: E731
        elif found == "mooncake":
            own = mooncake.Reader(printable(path))
            take = own.feed
        elif found == "cachewise":
            self._recorded.begin()
            take = lambda record: self._recorded.feed(path, record)  # noqa: E731
        elif found == "codex":
            own = codex.Reader()
            take = own.feed
        elif found == "claude-code":
            agent = printable(Path(path.name)).partition(".")[0].removeprefix("agent-")
            take = lambda record: self._claude_code.feed(record, agent)  # noqa: E731
        elif found == "tracelab":
            take = self._tracelab.feed
        else:
            take = self._turns.feed
        for number, record in coming:
            try:
                take(record)
            except TraceError:
                raise
            except _BROKEN as error:
                problems.add(path, number, explain(error))
        if own is not None:
            try:
                made = own.sessions()
            except _BROKEN as error:
                problems.add(path, 1, explain(error))
        self._add(made)

    def finish(self) -> None:
        self._add(self._turns.sessions())
        self._add(self._tracelab.sessions())
        self._add(self._claude_code.sessions())
        self._add(self._recorded.sessions())
        starts = {session.id: session.started_at for session in self._trace.sessions}
        for session in self._trace.sessions:
            began = starts.get(session.parent) if session.parent else None
            if began is not None and session.started_at is not None:
                session.start_s = round(session.started_at - began, 3)

    def _add(self, sessions: Iterable[Session]) -> None:
        for session in sessions:
            if session.id in self._seen:
                self._trace.repeated += 1
            else:
                self._seen.add(session.id)
                self._trace.sessions.append(session)


def _format(looked_at: Iterable[dict[str, Any]]) -> Format | None:
    for record in looked_at:
        for name, tells in _TOLD_BY:
            if tells(record):
                return name
    return None
