"""Turns as the event loop notes them, made up."""

from __future__ import annotations

from array import array

import xxhash

from gateway.recorder.recorder import Note
from gateway.traces.cachewise import SCHEMA, TurnRecord


def note_of(sid: str, number: int, segments: int = 10) -> Note:
    """The ``number``-th turn, from 0, of a session whose prompts grow by two messages of a
    kilobyte."""
    links = segments + 2 * number
    chain = array(
        "Q", (xxhash.xxh3_64_intdigest(b"%b %d" % (sid.encode(), i)) for i in range(links))
    )
    ends = array("I", (1000 * (i + 1) for i in range(links)))
    record = TurnRecord(SCHEMA, "", 0, 0.0, 250 * links, 100, number=number + 1, idle_kind="tool")
    return Note(
        record, chain, ends, 2, 10.0 * number, None, sid, 0.0, "codex", 1, None, None, "main"
    )
