"""Made-up sessions, and real ones where the shared data are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from gateway.traces.session import Chain, Session, Turn

SHARED = Path(__file__).parents[3] / "shared" / "data" / "weka-dev.jsonl.gz"
NEEDS_SHARED = pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
MILLISECONDS = st.integers(0, 10**7).map(lambda ms: ms / 1000)
TURN: dict[str, Any] = {"session": "s", "ctx": 640, "out": 1}


def jsonl(*records: Any) -> bytes:
    """The records as JSON Lines."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def few_real(folder: Path) -> Path:
    """A file of the first forty real sessions."""
    few = folder / "few.jsonl"
    with gzip.open(SHARED, "rt") as lines:
        few.write_text("".join(line for _, line in zip(range(40), lines, strict=False)))
    return few


@st.composite
def sessions(draw: st.DrawFn, shared: bool = False, **fixed: Any) -> list[Session]:
    """Some sessions whose prompts grow, shrink, and go back to older ones; with ``shared``, all
    with block ids of one scope."""
    found: list[Session] = []
    fresh = 0
    heads: list[list[int]] = []
    for number in range(draw(st.integers(1, 4))):
        session = Session(f"s{number}", block_tokens=64, scope="all" if shared else "", **fixed)
        chain = Chain()
        prompts = heads if shared else []
        at_s = 0.0
        for k in range(draw(st.integers(1, 6))):
            base = draw(st.sampled_from(prompts)) if prompts else []
            kept = base[: draw(st.integers(0, len(base)))]
            added = draw(st.integers(0 if kept else 1, 5))
            ids = kept + list(range(fresh, fresh + added))
            fresh += added
            gap_s = draw(MILLISECONDS) if k else 0.0
            at_s = round(at_s + gap_s, 3)
            session.turns.append(
                Turn(
                    at_s,
                    64 * len(ids) - draw(st.integers(0, 63)),
                    draw(st.integers(1, 9999)),
                    gap_s=gap_s,
                    idle_kind="tool",
                    stop="tool_use",
                    **chain.add(np.array(ids, np.int64)),
                )
            )
            prompts.append(ids)
        found.append(session)
    return found


def chains(session: Session) -> list[list[int]]:
    return [chain.tolist() for chain in session.chains()]


def pattern(all_sessions: list[Session]) -> list[list[int]]:
    """The chains of all sessions with ids renumbered in order of their first appearance."""
    seen: dict[tuple[str, int], int] = {}
    return [
        [seen.setdefault((session.scope or session.id, b), len(seen)) for b in chain]
        for session in all_sessions
        for chain in chains(session)
    ]
