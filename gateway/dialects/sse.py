"""Server-sent events, read incrementally from bytes cut anywhere."""

from __future__ import annotations

from typing import Any

import orjson

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""An event longer than this is given up (the observer then knows less; the client gets it all)."""


class SseObserver:
    """Base of the stream observers: cuts a stream into events and hands over those that matter.

    Most events of a stream carry a few characters of text and nothing to learn. `skippable` tells
    them by substring, without parsing, for a chunk that holds exactly one event; that is what makes
    watching a stream cost about a microsecond a chunk.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._overlong = False

    def skippable(self, event: bytes) -> bool:
        """True if the event (one or more lines) certainly teaches nothing."""
        raise NotImplementedError

    def event(self, data: dict[str, Any]) -> None:
        """Take in one event's JSON object."""
        raise NotImplementedError

    def feed(self, chunk: bytes) -> None:
        if not self._tail and chunk.endswith(b"\n\n") and b"\r" not in chunk:
            if chunk.find(b"\n\n") == len(chunk) - 2:
                if not self.skippable(chunk):
                    self._parse(chunk)
                return
            events = chunk.split(b"\n\n")
        else:
            buffer = self._tail + chunk
            if b"\r" in buffer:
                # A lone "\r" at the end may be half of "\r\n": it waits for the next chunk.
                held = buffer.endswith(b"\r")
                buffer = buffer[: len(buffer) - held].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                if held:
                    buffer += b"\r"
            events = buffer.split(b"\n\n")
            self._tail = events.pop()
            if len(self._tail) > MAX_EVENT_BYTES:
                self._tail, self._overlong = b"", True
            if self._overlong and events:
                events.pop(0)
                self._overlong = False
        for event in events:
            if event and not self.skippable(event):
                self._parse(event)

    def finish(self) -> None:
        """A stream may end without the last blank line."""
        tail, self._tail = self._tail, b""
        if tail and not self._overlong and not self.skippable(tail):
            self._parse(tail)

    def _parse(self, event: bytes) -> None:
        lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
        if not lines:
            return
        data = lines[0] if len(lines) == 1 else b"\n".join(lines)
        if data.strip() == b"[DONE]":
            return
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            return
        if isinstance(value, dict):
            self.event(value)


class JsonObserver:
    """Base of the observers of a whole JSON answer: keeps a copy up to a bound, reads it at the
    end."""

    max_bytes = 16 * 1024 * 1024

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def body(self, data: dict[str, Any]) -> None:
        """Take in the answer's JSON object."""
        raise NotImplementedError

    def feed(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size <= self.max_bytes:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()

    def finish(self) -> None:
        if not self._chunks:
            return
        data, self._chunks = b"".join(self._chunks), []
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            return
        if isinstance(value, dict):
            self.body(value)
