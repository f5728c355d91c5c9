"""A directory of recordings: zstd files that grow, follow one another, and stay within a bound.

Any number of gateways may write into one directory. Each has a file of its own, locked while it is
written, so that no other takes it for an old one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_bytes, token_hex
from typing import Final

import zstandard

SUFFIX: Final = ".jsonl.zst"
PATTERN: Final = f"turns-*{SUFFIX}"
SALT: Final = "salt"
SALT_BYTES: Final = 32
LEVEL: Final = 1
FRAME_BYTES: Final = 1 << 20
"""A frame holds so many bytes of records, about: what is damaged takes no other with it."""
FILE_BYTES: Final = 32 << 20
FILES_WITHIN: Final = 8
"""The bound holds at least so many files."""
ROOM_SHARE: Final = 64
"""So many parts of the bound are looked for at once."""
FILE_S: Final = 3600.0
"""A file is written for so long."""


class Directory:
    """Where recordings lie. All methods raise `OSError`."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.file_bytes = min(FILE_BYTES, max_bytes // FILES_WITHIN)

    def salt(self) -> bytes:
        """The secret of all hashes in the directory; both are made where they are missing."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = self.path / SALT
        if not place.exists():
            beside = self.path / f".{SALT}.{token_hex(8)}.part"
            try:
                _write_new(beside, token_bytes(SALT_BYTES))
                with contextlib.suppress(FileExistsError):  # another gateway was faster
                    os.link(beside, place)
            finally:
                beside.unlink(missing_ok=True)
        salt = place.read_bytes()
        if len(salt) != SALT_BYTES:
            raise OSError(errno.EINVAL, f"is not of {SALT_BYTES} bytes", str(place))
        return salt

    def check(self) -> None:
        """That files can be made there."""
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))

    def make_room(self, coming_bytes: int) -> None:
        """Remove the oldest files that nobody writes until so many bytes fit within the bound."""
        sizes: dict[Path, int] = {}
        for file in sorted(self.path.glob(PATTERN)):
            with contextlib.suppress(FileNotFoundError):
                sizes[file] = file.stat().st_size
        surplus = sum(sizes.values()) + coming_bytes - self.max_bytes
        for file, size in sizes.items():
            if surplus <= 0:
                return
            if _removed(file):
                surplus -= size
        if surplus > 0:
            raise OSError(errno.EDQUOT, "record.max_bytes is used up by files that are written")


class File:
    """A recording that is being written. `OSError` ends it: what was flushed before stays."""

    def __init__(self, directory: Directory, now: float) -> None:
        self._directory = directory
        self._until = now + FILE_S
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self.path = directory.path / f"turns-{stamp}-{token_hex(4)}{SUFFIX}"
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self.size = 0
        """Bytes on the disk."""
        self._packer = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
        self._frame = self._packer.compressobj()
        self._frame_bytes = 0
        self._room = 0
        """Bytes that may be written before the bound is looked at again."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.abandon()
            raise

    def full(self, now: float) -> bool:
        """Whether the next records belong into another file."""
        return self.size >= self._directory.file_bytes or now >= self._until

    def flush(self, records: bytes) -> int:
        """Add records, so that they are on the disk as far as this process is concerned. Returns
        the bytes they took."""
        packed = self._frame.compress(records)
        self._frame_bytes += len(records)
        if self._frame_bytes >= FRAME_BYTES:
            packed += self._frame.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH)
            self._frame = self._packer.compressobj()
            self._frame_bytes = 0
        else:
            packed += self._frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        return self._write(packed)

    def close(self) -> int:
        """End the file well. Returns the bytes that took."""
        written = 0
        if self._frame_bytes:
            written = self._write(self._frame.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
        return written

    def _write(self, data: bytes) -> int:
        try:
            if len(data) > self._room:
                self._room = max(len(data), self._directory.max_bytes // ROOM_SHARE)
                self._directory.make_room(self._room)
            self._room -= len(data)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            self.abandon()
            raise
        self.size += len(data)
        return len(data)

    def abandon(self) -> None:
        """Leave what was flushed; of the rest nothing."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self.size)
        os.close(self._fd)
        if not self.size:
            self.path.unlink(missing_ok=True)


def _write_new(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _removed(path: Path) -> bool:
    """Remove a file unless somebody writes it; whether it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
