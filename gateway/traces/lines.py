"""Lines of trace files: plain, gzip or zstd, and a count of those that could not be read."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import orjson
import zstandard

NAMED = 20
"""Problems that are kept with their place; the others are only counted."""
MAX_TOKENS = 10**8
"""Of one prompt; a record that tells of more is taken as broken."""
SAID = 5
"""Of these the ones that a command says."""
DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError)
"""What reading raises of a compressed file that is torn or damaged."""
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")


class TraceError(ValueError):
    """A trace that cannot be read at all; its text is one line."""


@dataclass
class Problems:
    """What was skipped while reading."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, path: Path, line: int, what: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(f"{printable(path)}:{line}: {what}")

    def merge(self, other: Problems) -> None:
        self.count += other.count
        self.named += other.named[: NAMED - len(self.named)]

    def tell(self) -> None:
        """Say on stderr how many there are, and which are the first."""
        if self.count:
            records = "1 record" if self.count == 1 else f"{self.count} records"
            print(f"{records} could not be read:", file=sys.stderr)
            for name in self.named[:SAID]:
                print(f"  {name}", file=sys.stderr)


def printable(path: Path) -> str:
    """A path as UTF-8 can hold it: bytes of a name that are none are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def number(value: Any) -> float:
    """A finite number that is not negative, or else `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError
    return value


def count(value: Any) -> int:
    """A number of tokens, of which there are not more than `MAX_TOKENS`, or else `ValueError`."""
    if number(value) > MAX_TOKENS:
        raise ValueError
    return int(value)


def tokens(value: Any) -> int:
    """The same; None is none."""
    return 0 if value is None else count(value)


def explain(error: Exception) -> str:
    """Why a record or a file could not be read, without its content."""
    if isinstance(error, EOFError):
        return "the file is torn"
    if isinstance(error, DAMAGED):
        return "the file is damaged"
    if isinstance(error, orjson.JSONDecodeError):
        return "no JSON"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return "a field of another type or value than expected"


@contextmanager
def opened(path: Path, read: Callable[[int], None] | None = None) -> Iterator[IO[bytes]]:
    """A file to read, decompressed; ``read`` is told of the bytes read from the disk."""
    with path.open("rb") as raw:
        counted = io.BufferedReader(_Counted(raw, read)) if read else raw
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=counted) as file:
                yield io.BufferedReader(file)
        elif path.suffix == ".zst":
            yield io.BufferedReader(_Zstd(counted))
        else:
            yield counted


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, compressed if it is named so."""
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                yield cast("IO[bytes]", file)
        elif path.suffix == ".zst":
            with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as file:
                yield file
        else:
            yield raw


def records(
    lines: Iterator[bytes] | IO[bytes], path: Path, problems: Problems
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines' JSON objects with their numbers; a line that holds none is a problem. A file ends
    where its compressed stream is torn or damaged, which is a problem as well."""
    number = 0
    while True:
        try:
            line = next(iter(lines), None)
        except DAMAGED as error:
            problems.add(path, number + 1, explain(error))
            return
        if line is None:
            return
        number += 1
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            problems.add(path, number, explain(error))
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            problems.add(path, number, "no JSON object")


class _Zstd(io.RawIOBase):
    """The content of zstd frames. Raises `EOFError` where the last one ends before its end, which
    zstandard's own reader keeps to itself."""

    READ_BYTES = 1 << 12
    """At once, as each may hold thirty thousand times as much."""

    def __init__(self, raw: IO[bytes] | io.BufferedReader) -> None:
        self._raw = raw
        self._frame: Any = None
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._raw.read(self.READ_BYTES)
            self._packed = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._plain = memoryview(self._frame.decompress(packed))
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        taken = self._plain[: len(buffer)]
        self._plain = self._plain[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


class _Counted(io.RawIOBase):
    def __init__(self, raw: IO[bytes], read: Callable[[int], None]) -> None:
        self._raw, self._read = raw, read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self._read(len(data))
        return len(data)
