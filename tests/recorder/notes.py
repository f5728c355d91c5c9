"""Turns as the event loop notes them, made up."""

from __future__ import annotations

from array import array

import xxhash

from gateway.prefix import Prefix, PrefixChange
from gateway.recorder.recorder import Note
from gateway.sessions import Session, Turn


def note_of(sid: str, number: int, segments: int = 10, pod: str = "pod-0") -> Note:
    """The ``number``-th turn, from 0, of a session whose prompts grow by two messages of a
    kilobyte."""
    session = Session(sid, sid, "default", 1, "new", sid, None, "codex", "m", 0.0, 0.0, "main", sid)
    links = segments + 2 * number
    prefix = Prefix(0)
    prefix.chain = array(
        "Q", (xxhash.xxh3_64_intdigest(b"%b %d" % (sid.encode(), i)) for i in range(links))
    )
    prefix.end_bytes = array("I", (1000 * (i + 1) for i in range(links)))
    change = PrefixChange(0, 0, 1000 * links)
    at = 10.0 * number
    turn = Turn(
        session, number + 1, "main", "new", prefix, change, 250 * links, 0, 0, None, None, at
    )
    return Note(
        turn, at + 1, None, 0.0, None, "stop", [], (), None, "human", None, {}, pod, "m", "chat",
        "ok", 200, 2,
    )  # fmt: skip
