"""What a prefix cache of any size, evicting the least recently used block, would have kept.

One pass over the turns gives every block's stack distance (Mattson et al., 1970): the tokens that
were touched since it was touched last. A cache of C tokens holds exactly the blocks at distances up
to C, so all sizes are answered at once. A turn touches its whole prompt, the head last, as vLLM
frees a request's blocks tail first; blocks that one turn touched last stay together, so the stack
is kept by turn in a Fenwick tree, O(log turns) a turn beside the array work.

Block ids stand for prefixes. Not modelled: running requests' pinned blocks, and that an answer's
own blocks are there for the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gateway.analysis.timeline import Sent
from gateway.traces.session import Blocks, Session, expand

DENSE_IDS = 1 << 26


@dataclass
class Reuse:
    """What turns could have found in a cache.

    ``above`` and ``length`` describe runs of blocks that came back: tokens touched since the run's
    first block was touched last, and the run's own tokens.
    """

    prompt_tokens: int = 0
    from_others_tokens: int = 0
    """Found first in another session's prompts."""
    first_prompt_tokens: int = 0
    """Of sessions' first turns."""
    first_from_others_tokens: int = 0
    above: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    length: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @property
    def reusable_tokens(self) -> int:
        return int(self.length.sum())

    def lost_tokens(self, capacity_tokens: float) -> int:
        """Tokens that came back and that a cache of this size had thrown away."""
        beyond = np.clip(self.above + self.length - capacity_tokens, 0, self.length)
        return int(beyond.sum())


def reuse(
    sessions: Sequence[Session], sent: Sequence[Sent], step: Callable[[], None] | None = None
) -> Reuse:
    """Walks through the turns in order. ``step`` is called once a turn."""
    numbering = _Numbering(sessions)
    touched = np.zeros(numbering.size, np.int32)
    stack = _Fenwick(len(sent) + 1)
    owner = np.zeros(len(sent) + 1, np.int32)
    chains = [session.chains() for session in sessions]
    found = Reuse()
    above: list[int] = []
    length: list[int] = []
    for now, turn in enumerate(sent, 1):
        session = sessions[turn.session]
        size = session.block_tokens
        ids = numbering.dense(turn.session, next(chains[turn.session]))
        last = touched[ids]
        new = np.flatnonzero(last == 0)
        known = int(new[0]) if len(new) else len(ids)
        from_others = 0
        starts = np.flatnonzero(np.diff(last[:known], prepend=-1))
        lengths = np.diff(starts, append=known)
        runs = list(zip(last[starts].tolist(), lengths.tolist(), strict=True))
        above += [stack.after(entry) for entry, _ in runs]  # all hits are found before any is used
        for entry, count in runs:
            length.append(count * size)
            stack.add(entry, -count * size)
            if owner[entry] != turn.session:
                from_others += count * size
        rest = last[known:]
        for entry in rest[rest > 0].tolist():  # ids that do not stand for prefixes
            stack.add(entry, -size)
        stack.add(now, len(ids) * size)
        touched[ids] = now
        owner[now] = turn.session
        prompt = max(session.turns[turn.turn].prompt_tokens, known * size)
        found.prompt_tokens += prompt
        found.from_others_tokens += from_others
        if turn.turn == 0:
            found.first_prompt_tokens += prompt
            found.first_from_others_tokens += from_others
        if step is not None:
            step()
    found.above, found.length = np.array(above, float), np.array(length, float)
    return found


class _Numbering:
    """Block ids of all scopes as places in one array."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        scopes: dict[str, list[int]] = {}
        for number, session in enumerate(sessions):
            scopes.setdefault(session.scope or f"\0{number}", []).append(number)
        self.size = 0
        self._offsets: dict[int, int] = {}
        self._sorted: dict[int, Blocks] = {}
        for numbers in scopes.values():
            runs = [t.fresh for n in numbers for t in sessions[n].turns if t.fresh]
            least = min((min(r[::2]) for r in runs), default=0)
            most = max(
                (s + n for r in runs for s, n in zip(r[::2], r[1::2], strict=True)), default=0
            )
            if most - least <= DENSE_IDS:
                for number in numbers:
                    self._offsets[number] = self.size - least
                self.size += most - least
            else:
                ids = np.unique(np.concatenate([expand(r) for r in runs]))
                for number in numbers:
                    self._offsets[number], self._sorted[number] = self.size, ids
                self.size += len(ids)

    def dense(self, session: int, ids: Blocks) -> Blocks:
        known = self._sorted.get(session)
        if known is not None:
            ids = np.searchsorted(known, ids)
        return ids + self._offsets[session]


class _Fenwick:
    """Sums over entries 1..n that change, O(log n)."""

    def __init__(self, n: int) -> None:
        self._tree = [0] * (n + 1)
        self._total = 0

    def add(self, at: int, amount: int) -> None:
        self._total += amount
        while at < len(self._tree):
            self._tree[at] += amount
            at += at & -at

    def after(self, at: int) -> int:
        """The sum of the entries above `at`."""
        upto = 0
        while at > 0:
            upto += self._tree[at]
            at -= at & -at
        return self._total - upto
