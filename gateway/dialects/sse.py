"""Server-sent events, read incrementally from bytes cut anywhere."""

from __future__ import annotations

from typing import Any

import orjson

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""An event longer than this is given up (the observer then knows less; the client gets it all)."""


class SseObserver:
    """Base of the stream observers: cuts a stream into events and hands over those that matter.

    Most events of a stream carry a few characters of text and nothing to learn. `skippable` tells
    them by substring, without parsing; and a chunk that holds exactly one event, as most do, is not
    even cut. That is what makes watching a stream cost about a microsecond a chunk.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        """The event that is still coming, cut as it came."""
        self._size = 0
        self._overlong = False

    def skippable(self, event: bytes) -> bool:
        """True if the event (one or more lines) certainly teaches nothing."""
        raise NotImplementedError

    def event(self, data: dict[str, Any]) -> None:
        """Take in one event's JSON object."""
        raise NotImplementedError

    def feed(self, chunk: bytes) -> None:
        if not self._parts and chunk.endswith(b"\n\n") and b"\r" not in chunk:
            if chunk.find(b"\n\n") == len(chunk) - 2:
                if not self.skippable(chunk):
                    self._take(chunk)
            else:
                for event in chunk.split(b"\n\n"):
                    self._take(event)
            return
        self._parts.append(chunk)
        self._size += len(chunk)
        if b"\n" in chunk or b"\r" in chunk:
            self._cut()
        if self._size > MAX_EVENT_BYTES + 2:
            # Its last two bytes may be the beginning of its end.
            end = b"".join(self._parts)[-2:]
            self._parts, self._size, self._overlong = [end], 2, True

    def finish(self) -> None:
        """A stream may end without the last blank line."""
        self.feed(b"\n\n")

    def _cut(self) -> None:
        """Take the whole events out of the parts; what is left waits for more."""
        buffer = b"".join(self._parts)
        if b"\r" in buffer:
            # A "\r" at the end may be half of "\r\n": it waits too.
            held = buffer.endswith(b"\r")
            lines = buffer[: len(buffer) - held].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            buffer = lines + b"\r" if held else lines
        *events, rest = buffer.split(b"\n\n")
        if events and self._overlong:
            del events[0]
            self._overlong = False
        for event in events:
            self._take(event)
        self._parts = [rest] if rest else []
        self._size = len(rest)

    def _take(self, event: bytes) -> None:
        if event and len(event) <= MAX_EVENT_BYTES and not self.skippable(event):
            self._parse(event)

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
            try:
                self.event(value)
            except (AttributeError, TypeError, ValueError):
                return  # an event of another shape teaches nothing


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
            try:
                self.body(value)
            except (AttributeError, TypeError, ValueError):
                return  # an answer of another shape teaches nothing more
