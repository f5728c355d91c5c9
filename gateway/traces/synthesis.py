"""Sessions like those of a trace, as many as wanted.

A bootstrap over turns. A turn of the trace together with what leads from it to the next prompt (its
output, tool calls, what the session then waits for and how long, what the next prompt keeps and
adds) is one step. A made-up session takes its length, first prompt and head from one session of the
trace, its mother, and its steps in short runs from sessions that are most like the mother: a run
goes on with the step that followed in the trace, and the next run begins at a step that was reached
in the same way (by a tool's result, a person) with about as long a prompt, about as far into its
session. So what a step's values have to do with each other, with the steps around it and with the
session stays, and no session is copied.

Numbers are smoothed in rank space: a value becomes one within `SMOOTHING` of all values of its kind
on either side, so that every distribution keeps its shape, its atoms and its tail, whatever it is.

Of the prompts of a scope that several sessions share, the beginnings that two sessions have in
common stay common; everything else is each session's own.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left, bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final, get_args

import numpy as np
import numpy.typing as npt

from gateway.idle import IdleKind
from gateway.traces.families import SEATS, tree
from gateway.traces.session import Blocks, Call, Runs, Session, Turn, common_prefix, runs_of

SMOOTHING: Final = 0.01
RUN_TURNS: Final = 12
"""Of a run, on average."""
MOST_RUN_TURNS: Final = 30
NEAREST: Final = 8
"""Steps of which the next run's first is drawn."""
LEAST_LIKE: Final = 4
"""Sessions that count as like one; a twentieth of all if that is more, at most `MOST_LIKE`."""
MOST_LIKE: Final = 16
LIKE_KEPT: Final = 4_096
PROGRESS_WEIGHT: Final = 0.3
"""Of the part of its session that a step has behind it, beside the logarithm of its prompt."""
SCOPE: Final = "synthetic"
START: Final = "start"

Family = list[Session]
"""A session and its sub-agents."""
_REACHED: Final = (START, *get_args(IdleKind))
Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]
Group = tuple[int, str, str, int]
"""Sessions that are made of one another's steps: depth below a root, client, kind of agent, tokens
a block."""


class _Spread:
    """All values of one kind. `near` gives one of about the same rank."""

    def __init__(self, values: Sequence[float]) -> None:
        self._sorted = sorted(values)
        self._width = max(1.0, SMOOTHING * len(self._sorted))

    def near(self, value: float, rng: random.Random) -> float:
        last = len(self._sorted) - 1
        if last < 1:
            return value
        low = bisect_left(self._sorted, value)
        high = max(low, bisect_right(self._sorted, value) - 1)
        rank = low + (high - low) * rng.random() + self._width * (2 * rng.random() - 1)
        rank = max(0.0, last - abs(last - abs(rank)))
        below = int(rank)
        a, b = self._sorted[below], self._sorted[min(below + 1, last)]
        return a + (b - a) * (rank - below)


@dataclass(slots=True)
class _Prompt:
    """A prompt in the making, as in `Turn`, and its blocks."""

    tokens: int
    blocks: int
    at_s: float = 0.0
    gap_s: float = 0.0
    gap_known: bool = True
    shared: int = 0
    fresh: Runs = ()
    back: int = 1
    model: str = ""
    compacted: bool = False


@dataclass(slots=True)
class _Source:
    """A session of the trace, and what is not in its turns."""

    number: int
    session: Session
    root: int
    depth: int
    lengths: list[int] = field(default_factory=list)
    """Of its prompts, in blocks."""
    rounds_down: bool = True
    """Blocks of a prompt are its whole ones."""
    head: Blocks = field(default_factory=lambda: np.empty(0, np.int64))
    """Of its first prompt, the blocks that other families have too, numbered anew."""
    family_head: int = 0
    """Blocks of its first prompt that others of its own family have too."""
    children: dict[int, list[int]] = field(default_factory=dict)
    """Sub-agents by the turn at which they began."""

    def __post_init__(self) -> None:
        for turn in self.session.turns:
            base = self.lengths[-turn.back] if turn.back <= len(self.lengths) else 0
            self.lengths.append(min(turn.shared, base) + turn.fresh_blocks)
        size = self.session.block_tokens
        self.rounds_down = all(
            length <= max(1, turn.prompt_tokens // size)
            for length, turn in zip(self.lengths, self.session.turns, strict=True)
        )

    @property
    def group(self) -> Group:
        session = self.session
        return self.depth, session.client, session.agent_type, session.block_tokens

    @property
    def head_blocks(self) -> int:
        return (self.session.tool_tokens + self.session.system_tokens) // self.session.block_tokens

    @property
    def ends_s(self) -> float:
        """On its parent's clock."""
        return self.session.start_s + self.session.ends_s

    def blocks(self, tokens: int) -> int:
        size = self.session.block_tokens
        return max(1, tokens // size if self.rounds_down else -(-tokens // size))

    def latency_s(self, j: int) -> float:
        """Of a turn whose response time is not told."""
        if j + 1 == len(self.session.turns):
            return 0.0
        turn, after = self.session.turns[j], self.session.turns[j + 1]
        return max(0.0, after.at_s - turn.at_s - after.gap_s)


class _Pool:
    """The steps of a group's sessions, numbered through."""

    def __init__(self, members: list[int], sources: list[_Source]) -> None:
        sessions = [sources[i].session for i in members]
        self.members, self.sources = members, sources
        self.place = {member: place for place, member in enumerate(members)}
        self.counts = [len(s.turns) for s in sessions]
        self.starts = np.cumsum([0, *self.counts]).tolist()
        self._owner = np.repeat(members, self.counts).tolist()
        turns = [turn for s in sessions for turn in s.turns]
        moves = [(a, b) for s in sessions for a, b in pairwise(s.turns)]
        self._prompt = np.log([max(1, turn.prompt_tokens) for turn in turns])
        self._progress = np.array([k / max(1, n - 1) for n in self.counts for k in range(n)])
        self._last = np.array([k == n - 1 for n in self.counts for k in range(n)])
        self._reached = np.array(
            [
                _REACHED.index(kind)
                for s in sessions
                for kind in (START, *(turn.idle_kind for turn in s.turns[:-1]))
            ]
        )
        self._all = np.arange(len(turns))
        self._traits = _traits(sessions)
        self._like: OrderedDict[int, Steps] = OrderedDict()
        self.most_tokens = max(turn.prompt_tokens for turn in turns)
        self.lengths = _Spread([math.log(n) for n in self.counts])
        self.first_tokens = _Spread([s.turns[0].prompt_tokens for s in sessions])
        self.output = _Spread([turn.output_tokens for turn in turns])
        self.growth = _Spread([_grown(s, k) for s in sessions for k in range(1, len(s.turns))])
        self.api = _Spread([turn.api_s for turn in turns if turn.api_s is not None])
        gaps: dict[str, list[float]] = defaultdict(list)
        for before, turn in moves:
            if turn.gap_known:
                gaps[before.idle_kind].append(turn.gap_s)
        self.gaps = {kind: _Spread(values) for kind, values in gaps.items()}

    def walk(
        self, mother: int, length: int, prompts: list[_Prompt], rng: random.Random
    ) -> Iterator[tuple[int, int]]:
        """A session's steps, each a session of the trace and a turn of it. ``prompts`` grow while
        it walks."""
        reached, step, left = START, -1, 0
        for k in range(length):
            last = k + 1 == length
            if left and not last and not self._last[step + 1]:
                step, left = step + 1, left - 1
            else:
                tokens, progress = prompts[-1].tokens, k / max(1, length - 1)
                step = self._draw(mother, reached, last, tokens, progress, step + 1, rng)
                most = min(MOST_RUN_TURNS, self.counts[self.place[self._owner[step]]] // 2)
                left = min(most, round(rng.expovariate(1 / RUN_TURNS)))
            owner = self._owner[step]
            j = step - self.starts[self.place[owner]]
            yield owner, j
            reached = self.sources[owner].session.turns[j].idle_kind

    def _draw(
        self, mother: int, reached: str, last: bool, tokens: int, progress: float, other: int,
        rng: random.Random,
    ) -> int:  # fmt: skip
        """The step to begin a run with, not ``other`` where there is a choice."""
        prompt = math.log(max(1, tokens))
        code = _REACHED.index(reached)
        fit = same = self._all[:0]
        for steps in (self._like_steps(mother), self._all):
            fit = steps[self._last[steps] == last]
            fit = fit[fit != other]
            same = fit[self._reached[fit] == code]
            if len(same) >= NEAREST:
                break
        for steps in (same, fit, np.flatnonzero(self._last == last)):
            if len(steps):
                away = np.abs(self._prompt[steps] - prompt)
                away += PROGRESS_WEIGHT * np.abs(self._progress[steps] - progress)
                n = min(NEAREST, len(steps))
                return int(steps[np.argpartition(away, n - 1)[rng.randrange(n)]])
        raise AssertionError

    def _like_steps(self, mother: int) -> Steps:
        """The steps of the sessions most like one."""
        found = self._like.get(mother)
        if found is None:
            away = ((self._traits - self._traits[self.place[mother]]) ** 2).sum(axis=1)
            n = min(MOST_LIKE, max(LEAST_LIKE, len(self.members) // 20))
            near = np.argsort(away, kind="stable")[:n].tolist()
            pieces = [np.arange(self.starts[i], self.starts[i + 1]) for i in near]
            found = self._like[mother] = np.concatenate(pieces)
            if len(self._like) > LIKE_KEPT:
                self._like.popitem(last=False)
        return found


def _grown(session: Session, k: int) -> int:
    """Tokens by which a prompt is longer than the one it goes on from."""
    turn = session.turns[k]
    return turn.prompt_tokens - session.turns[max(0, k - turn.back)].prompt_tokens


def _traits(sessions: list[Session]) -> Floats:
    """What makes sessions alike, each as ranks in 0..1: (sessions, traits)."""
    rows = []
    for session in sessions:
        turns = session.turns
        kinds = [t.idle_kind for t in turns]
        waits = [t.gap_s for before, t in pairwise(turns) if before.idle_kind == "tool"]
        growth = [max(0, _grown(session, k)) for k in range(1, len(turns))]
        rows.append(
            (
                len(turns),
                turns[0].prompt_tokens,
                turns[len(turns) // 2].prompt_tokens,
                turns[-1].prompt_tokens,
                kinds.count("tool") / len(kinds),
                float(np.mean(np.log1p(waits))) if waits else 0.0,
                float(np.mean(np.log1p(growth))) if growth else 0.0,
                float(np.mean([math.log1p(t.output_tokens) for t in turns])),
            )
        )
    values = np.array(rows, float)
    ranks = np.empty_like(values)
    for column in range(values.shape[1]):
        ordered = np.sort(values[:, column])
        low = np.searchsorted(ordered, values[:, column], side="left")
        high = np.searchsorted(ordered, values[:, column], side="right")
        ranks[:, column] = (low + high) / 2 / len(ordered)
    return ranks


@dataclass(slots=True)
class _Family:
    """A session in the making, and its sub-agents."""

    rng: random.Random
    id: str
    made: Family = field(default_factory=list)
    heads: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """By kind of agent, the blocks with which its prompts begin."""


class Synthesizer:
    """Fits a trace; `families` makes as many sessions as wanted, the same for the same seed.

    Not kept: which session goes on with another's conversation, and how starts of sessions depend
    on the time of the day.
    """

    def __init__(
        self, sessions: Sequence[Session], seed: int = 1, seats: int | None = None
    ) -> None:
        """``seats``: sessions at once; None: as in the trace, `SEATS` if it does not tell.

        Raises:
            ValueError: no session has a turn.
        """
        self._seed = seed
        self._sources = _sources([session for session in sessions if session.turns])
        if not self._sources:
            raise ValueError("no session has a turn")
        groups: dict[Group, list[int]] = defaultdict(list)
        for number, source in enumerate(self._sources):
            groups[source.group].append(number)
        pools = {group: _Pool(members, self._sources) for group, members in groups.items()}
        self._pools = [pools[source.group] for source in self._sources]
        self.roots = [n for n, source in enumerate(self._sources) if source.depth == 0]
        self._shared_blocks = _number_heads(self._sources)
        self._next_block = 0
        starts = [self._sources[number].session.started_at for number in self.roots]
        known = sorted(start for start in starts if start is not None)
        self._between_s = [b - a for a, b in pairwise(known)] if len(known) == len(starts) else []
        self._seats = seats or (None if self._between_s else SEATS)

    def families(self, count: int) -> Iterator[Family]:
        """Sessions, each with its sub-agents, in the order of their starts, which count from 0."""
        self._next_block = self._shared_blocks
        coming = self._starts()
        free = [0.05 * seat for seat in range(self._seats or 0)]
        mothers: list[int] = []
        for number in range(count):
            rng = random.Random(f"{self._seed}:{number}")
            if not mothers:
                mothers = list(self.roots)
                rng.shuffle(mothers)
            start_s = round(heapq.heappop(free) if free else next(coming), 3)
            family = _Family(rng, f"synthetic-{self._seed}-{number}")
            self._make(family, Session(family.id, started_at=start_s), mothers.pop())
            own_scope = family.id if len(family.made) > 1 else ""
            ends_s = start_s
            for session in family.made:
                session.scope = SCOPE if self._shared_blocks else own_scope
                assert session.started_at is not None
                ends_s = max(ends_s, session.started_at + session.ends_s)
            if self._seats:
                heapq.heappush(free, ends_s)
            yield family.made

    def _starts(self) -> Iterator[float]:
        """Times between starts, in runs as they follow one another in the trace."""
        rng = random.Random(f"{self._seed}:starts")
        spread = _Spread(self._between_s)
        now_s, at = 0.0, 0
        while True:
            yield now_s
            if at >= len(self._between_s) or rng.random() < 1 / RUN_TURNS:
                at = rng.randrange(len(self._between_s))
            now_s += max(0.0, spread.near(self._between_s[at], rng))
            at += 1

    def _make(self, family: _Family, session: Session, mother: int) -> None:
        """Give a session its turns, and add it and its sub-agents to the family."""
        source, pool, rng = self._sources[mother], self._pools[mother], family.rng
        like = source.session
        session.client, session.agent_type = like.client, like.agent_type
        session.block_tokens = like.block_tokens
        session.tool_tokens, session.system_tokens = like.tool_tokens, like.system_tokens
        family.made.append(session)
        length = max(1, round(math.exp(pool.lengths.near(math.log(len(like.turns)), rng))))
        tokens = pool.first_tokens.near(like.turns[0].prompt_tokens, rng)
        prompts = [self._first_prompt(family, source, max(1, round(tokens)))]
        for k, (donor, j) in enumerate(pool.walk(mother, length, prompts, rng)):
            self._step(family, session, prompts, self._sources[donor], j, k + 1 == length)

    def _first_prompt(self, family: _Family, source: _Source, tokens: int) -> _Prompt:
        blocks = source.blocks(tokens)
        head = source.head[:blocks]
        if source.family_head:
            shared = family.heads[source.session.agent_type]
            missing = max(0, source.family_head - len(shared))
            shared.extend(range(self._next_block, self._next_block + missing))
            self._next_block += missing
            head = np.array(shared[: min(source.family_head, blocks)], np.int64)
        own = np.arange(self._next_block, self._next_block + blocks - len(head))
        self._next_block += len(own)
        model = source.session.turns[0].model
        return _Prompt(tokens, blocks, fresh=runs_of(np.concatenate((head, own))), model=model)

    def _step(
        self, family: _Family, session: Session, prompts: list[_Prompt], donor: _Source, j: int,
        last: bool,
    ) -> None:  # fmt: skip
        """Answer the latest prompt as the donor's turn ``j`` was, and add the prompt after it."""
        rng, prompt, turn = family.rng, prompts[-1], donor.session.turns[j]
        pool = self._pools[donor.number]
        after = None if last else donor.session.turns[j + 1]
        api_s = None if turn.api_s is None else round(max(0.0, pool.api.near(turn.api_s, rng)), 3)
        answered_s = prompt.at_s + (donor.latency_s(j) if api_s is None else api_s)
        gap_s = 0.0
        if after is not None and after.gap_known:
            gap_s = round(max(0.0, pool.gaps[turn.idle_kind].near(after.gap_s, rng)), 3)
        stretch = gap_s / after.gap_s if after is not None and after.gap_s else 1.0
        named: dict[str, str] = {}
        for number in donor.children.get(j, ()):
            child, offset_s = self._child(family, session, donor, j, number, prompt.at_s)
            named[self._sources[number].session.id] = child.id
            waited_for = self._sources[number].ends_s
            if after is not None and waited_for <= after.at_s + 1.0:
                gap_s = max(gap_s, round(prompt.at_s + offset_s + child.ends_s - answered_s, 3))
        first_token_s = turn.first_token_s
        if first_token_s is not None and api_s is not None and turn.api_s:
            first_token_s = round(first_token_s * api_s / turn.api_s, 3)
        told = turn.cached_tokens
        session.turns.append(
            Turn(
                prompt.at_s,
                prompt.tokens,
                max(min(1, turn.output_tokens), round(pool.output.near(turn.output_tokens, rng))),
                shared=prompt.shared,
                fresh=prompt.fresh,
                back=prompt.back,
                gap_s=prompt.gap_s,
                gap_known=prompt.gap_known,
                api_s=api_s,
                first_token_s=first_token_s,
                idle_kind=turn.idle_kind,
                stop=turn.stop,
                cached_tokens=None if told is None else _part(prompt.tokens, told, turn),
                model=prompt.model,
                compacted=prompt.compacted,
                calls=tuple(_call(call, stretch, named) for call in turn.calls),
            )
        )
        if after is not None:
            coming = self._next_prompt(session, prompts, donor, j + 1, rng)
            coming.at_s, coming.gap_s = round(answered_s + gap_s, 3), gap_s
            coming.gap_known = after.gap_known
            prompts.append(coming)

    def _child(
        self, family: _Family, session: Session, donor: _Source, j: int, number: int, at_s: float
    ) -> tuple[Session, float]:
        """A sub-agent like one that began at the donor's turn ``j``, and when in the turn."""
        like = self._sources[number].session
        offset_s = max(0.0, like.start_s - donor.session.turns[j].at_s)
        child = Session(f"{family.id}/{len(family.made)}", parent=session.id)
        child.start_s = round(at_s + offset_s, 3)
        assert session.started_at is not None
        child.started_at = round(session.started_at + child.start_s, 3)
        self._make(family, child, number)
        return child, offset_s

    def _next_prompt(
        self, session: Session, prompts: list[_Prompt], donor: _Source, j: int, rng: random.Random
    ) -> _Prompt:
        """Made of the prompt before as the donor's ``j`` was made of its own."""
        turn, pool = donor.session.turns[j], self._pools[donor.number]
        base = prompts[-turn.back] if turn.back <= len(prompts) else prompts[-1]
        was = max(0, j - turn.back)
        was_tokens, was_blocks = donor.session.turns[was].prompt_tokens, donor.lengths[was]
        grown = turn.prompt_tokens - was_tokens
        if grown >= 0:
            tokens = base.tokens + round(pool.growth.near(grown, rng))
        else:
            tokens = round(base.tokens * turn.prompt_tokens / was_tokens)
        tokens = max(1, min(tokens, pool.most_tokens))
        blocks = donor.blocks(tokens)
        shared = min(turn.shared, was_blocks)
        if was_blocks - shared <= 1:
            kept = base.blocks - (was_blocks - shared)
        elif shared <= donor.head_blocks:
            kept = shared
        else:
            kept = round(base.blocks * shared / was_blocks)
        kept = max(0, min(kept, base.blocks, blocks))
        before = donor.session.turns[j - 1].model
        model = prompts[-1].model if turn.model == before else turn.model
        first, self._next_block = self._next_block, self._next_block + blocks - kept
        return _Prompt(
            tokens,
            blocks,
            shared=kept,
            fresh=(first, blocks - kept) if blocks > kept else (),
            back=turn.back if turn.back <= len(prompts) else 1,
            model=model,
            compacted=turn.compacted,
        )


def _part(tokens: int, told: int, turn: Turn) -> int:
    return min(tokens, round(tokens * told / max(1, turn.prompt_tokens)))


def _call(call: Call, stretch: float, named: dict[str, str]) -> Call:
    duration_s = None if call.duration_s is None else round(call.duration_s * stretch, 3)
    return replace(call, duration_s=duration_s, child=named.get(call.child or ""))


def _sources(sessions: list[Session]) -> list[_Source]:
    """The sessions with what follows from the whole trace."""
    below = tree(sessions)
    found = [_Source(n, session, root=n, depth=0) for n, session in enumerate(sessions)]
    reached = list(below[None])
    for n in reached:
        parent = found[n]
        times = [turn.at_s for turn in parent.session.turns]
        for child in below.get(n, ()):
            found[child].root, found[child].depth = parent.root, parent.depth + 1
            at = max(0, bisect_right(times, sessions[child].start_s) - 1)
            parent.children.setdefault(at, []).append(child)
            reached.append(child)
    return found


def _number_heads(sources: list[_Source]) -> int:
    """Tell each source the beginning of its first prompt that others have too, where block ids mean
    the same; the number of blocks in those that more than one family has."""
    scopes: dict[str, list[_Source]] = defaultdict(list)
    for source in sources:
        if source.session.scope:
            scopes[source.session.scope].append(source)
    numbers: dict[tuple[str, int], int] = {}
    for scope, members in scopes.items():
        chains = {source.number: next(source.session.chains()) for source in members}
        members.sort(key=lambda source: chains[source.number].astype(">i8").tobytes())
        common = [
            common_prefix(chains[a.number], chains[b.number]) for a, b in pairwise(members)
        ]  # in this order a neighbour has the most in common
        for source, before, after in zip(members, [0, *common], [*common, 0], strict=True):
            shared = chains[source.number][: max(before, after)]
            if len({member.root for member in members}) == 1:
                source.family_head = len(shared) if source.depth else 0
            else:
                ids = [numbers.setdefault((scope, b), len(numbers)) for b in shared.tolist()]
                source.head = np.array(ids, np.int64)
    return len(numbers)
