"""The predictor: what was learned of gaps, and how a forecast is made of it.

Nodes stand in a hierarchy from the general to the particular:

    tool kind → tool → program → subcommand → this tenant's → this session's (→ this very call)

Means of log time are shrunk level by level towards the level above,
``(n m + k m_above) / (n + k)``, and become the features of the trained correction, which gives a distribution. Histograms of the
same nodes are blended the same way on top of it. How much the blend counts against the correction
alone is learned for each tool from which of the two has forecast better: traffic unlike the
training data is soon forecast from itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gateway.dialects.turn import ToolCall
from gateway.idle import IdleKind
from gateway.predictor.correction import Correction
from gateway.predictor.features import CallFeatures, features_of
from gateway.predictor.forecast import Forecast
from gateway.predictor.grid import BINS, EDGES, bin_of, log_s
from gateway.predictor.table import (
    BEFORE,
    DEV,
    EMPTY_ROW,
    FAST,
    LAST,
    MEAN,
    TRUST,
    N,
    NodeTable,
)

MAX_CALLS: Final = 8
"""Parallel calls that a forecast looks at."""
MAX_NODES: Final = 100_000

SHARED_MEMORY: Final = 1_000.0
TENANT_MEMORY: Final = 300.0
SESSION_MEMORY: Final = 30.0
"""Gaps after which a node has forgotten half to two thirds of what it knew (its weight's limit)."""
_FAST_RATE: Final = 0.3

_SHRINK: Final = (0.0, 5.0, 5.0, 5.0, 5.0)
_SESSION_SHRINK: Final = (0.0, 3.0, 1.0, 1.0, 1.0)
_BLEND: Final = (40.0, 20.0, 8.0, 8.0, 6.0)
"""Pseudo-counts of what is above: kind, program, subcommand, tenant's, session's."""
_TRUST_AT_FIRST: Final = -1.7
_TRUST_LIMIT: Final = 30.0
_TRUST_MEMORY: Final = 0.98
_SIBLING: Final = 0.35
"""Parallel calls wait for much the same things: of all but the slowest, this power of the
distribution function counts."""
_SLOW: Final = 0.7, 0.5
"""A wait is slow that lasts 10^0.7 times what was expected, and over 10^0.5 s: a person was
asked."""

_CLIENTS: Final = {"claude-code": 1.0, "codex": 2.0}

_SPREAD: Final = np.diff(np.array(EDGES)).astype(np.float32) / np.float32(EDGES[-1] - EDGES[0])


@dataclass(slots=True, frozen=True)
class Context:
    """Whose gap it is. ``session`` is only hashed; ``tenant`` is kept, as its name in settings."""

    session: Hashable = None
    tenant: str = ""
    client: str = "other"
    prompt_tokens: int = 0


@dataclass(slots=True)
class CallBasis:
    """A call as forecast: what learning from its outcome needs."""

    features: CallFeatures
    shared: tuple[Hashable, ...]
    session: tuple[Hashable, ...]
    expected_log_s: float
    """Of the shared nodes, before this session's own history."""
    x: NDArray[np.float32]
    corrected: NDArray[np.float32]
    blended: NDArray[np.float32]
    masses: NDArray[np.float32]
    level: float
    """Mean of ``masses`` in log10 s."""


@dataclass(slots=True)
class Basis:
    """A forecast's origin."""

    idle_kind: IdleKind
    context: Context
    calls: list[CallBasis]
    wait: tuple[Hashable, ...]
    """Nodes of a wait that no tool call explains."""


@dataclass(slots=True)
class Returns:
    """Sessions that came back and that did not, with forgetting."""

    returned: float = 0.0
    gone: float = 0.0

    def add(self, returned: bool) -> None:
        keep = 1 - 1 / SHARED_MEMORY
        self.returned = self.returned * keep + returned
        self.gone = self.gone * keep + (not returned)

    @property
    def probability(self) -> float:
        """P(returns), by Jeffreys' rule; 0.9 where nothing is known."""
        seen = self.returned + self.gone
        return (self.returned + 0.9) / (seen + 1.0)


@dataclass(slots=True)
class Overhead:
    """A client's own time on top of its tools, from the durations that it reports."""

    log_s: float = 0.0
    seen: int = 0

    def add(self, seconds: float) -> None:
        self.seen = min(self.seen + 1, 100)
        self.log_s += (log_s(seconds) - self.log_s) / self.seen

    @property
    def seconds(self) -> float:
        return 10**self.log_s if self.seen >= 3 else 0.0


_CENTRES: Final = ((np.array(EDGES[:-1]) + np.array(EDGES[1:])) / 2).astype(np.float32)


@dataclass(slots=True)
class Predictor:
    """Forecasts gaps and learns from them. Not for use by two threads at once.

    ``learn_shared`` off keeps what a session teaches to that session (benchmarks).
    """

    table: NodeTable = field(default_factory=lambda: NodeTable(MAX_NODES))
    correction: Correction | None = None
    returns: dict[tuple[str, str], Returns] = field(default_factory=dict)
    overheads: dict[str, Overhead] = field(default_factory=dict)
    observed_total: int = 0
    learn_shared: bool = True

    # -- forecasting -----------------------------------------------------------------------------

    def forecast(
        self, calls: Sequence[ToolCall], idle_kind: IdleKind, context: Context
    ) -> Forecast:
        """The gap that begins now, after a response with these tool calls."""
        if not calls or idle_kind in ("ended", "background"):
            return self._wait(idle_kind, context)
        seen = [self._look(features_of(call), context) for call in calls[:MAX_CALLS]]
        bases = []
        expected = [look.expected for look in seen]
        for i, look in enumerate(seen):
            bases.append(self._call(look, i, expected, context))
        offset_s = self._offset_s(context.client)
        masses = bases[0].masses if len(bases) == 1 else _longest(bases)
        lead = max(bases, key=_level)
        return Forecast(
            masses,
            self._p_return(idle_kind, lead.features.kind),
            idle_kind,
            offset_s,
            Basis(idle_kind, context, bases, ()),
        )

    def _look(self, f: CallFeatures, context: Context) -> _Look:
        """Find a call's nodes and shrink the means of the shared ones."""
        kind, tool, program, sub = f.kind, f.tool, f.program, f.sub
        shared: tuple[Hashable, ...] = (
            ("kind", kind),
            ("tool", tool),
            ("program", kind, program),
            ("sub", tool, program, sub),
            ("tenant", context.tenant, tool, program, sub),
        )
        s = hash(context.session)
        session: tuple[Hashable, ...] = (
            hash((s, 0)),
            hash((s, 1, kind)),
            hash((s, 2, tool, program)),
            hash((s, 3, tool, program, sub)),
            hash((s, 4, f.digest)),
            hash((s, 5)),
            hash((s, 6, kind)),
            hash((s, 7)),
        )
        find = self.table.find
        rows = [find(key, EMPTY_ROW) for key in shared]
        rows += [find(key, EMPTY_ROW) for key in session]
        stats = self.table.stats.take(rows, axis=0).tolist()
        x: list[float] = []
        m = 0.0
        for (n, mean, _, _, dev, _, _), k in zip(stats[:4], _SHRINK, strict=False):
            if n:
                m = (n * mean + k * m) / (n + k)
            x += (m, math.log1p(n), dev)
        n = stats[4][N]
        if n:
            m = (n * stats[4][MEAN] + 5.0 * m) / (n + 5.0)
            x[9] = m
        return _Look(f, shared, session, rows, stats, x, m)

    def _call(self, look: _Look, place: int, expected: list[float], context: Context) -> CallBasis:
        stats = look.stats
        base = m = look.expected
        others_max = -4.0
        before_s = 0.0
        if len(expected) > 1:
            others_max = max(e for i, e in enumerate(expected) if i != place)
            before_s = sum(10**e for e in expected[:place])
        off, off_kind, slow = stats[10], stats[11], stats[12]
        x = [
            *look.features.numbers,
            math.log10(1 + context.prompt_tokens),
            _CLIENTS.get(context.client, 0.0),
            float(len(expected)),
            float(place),
            others_max,
            before_s,
            *look.x,
            off[FAST],
            off[MEAN],
            off_kind[FAST],
            off_kind[MEAN],
            slow[FAST],
            slow[MEAN],
            stats[5][BEFORE],
        ]
        first = True
        for (n, mean, fast, last, dev, _, _), k in zip(stats[5:10], _SESSION_SHRINK, strict=True):
            if not n:
                x += (0.0, m, m, m, 0.0)
                continue
            if first:  # the session's mean over all tools says nothing of this one
                x += (n, fast, m, last, dev)
            else:
                m = (n * mean + k * m) / (n + k)
                x += (n, fast, m, last, dev)
            first = False
        vector = np.array(x, np.float32)
        corrected = self.correction.masses(vector) if self.correction is not None else _SPREAD
        blended = self._blend(look, corrected)
        if self.correction is None:
            masses = blended
        else:
            trust = _TRUST_AT_FIRST + stats[3][TRUST] + 0.2 * stats[0][TRUST]
            weight = 1 / (1 + math.exp(-trust))
            masses = corrected + (blended - corrected) * np.float32(weight)
        return CallBasis(
            look.features,
            look.shared,
            look.session,
            base,
            vector,
            corrected,
            blended,
            masses,
            float(masses @ _CENTRES),
        )

    def _blend(self, look: _Look, base: NDArray[np.float32]) -> NDArray[np.float32]:
        """Histograms from the particular to the general, each for the share it has earned, and
        ``base`` for what is left."""
        stats = look.stats
        left = 1.0
        weights = [0.0] * 5
        for place, level in ((4, 8), (3, 4), (2, 3), (1, 2), (0, 0)):
            n = stats[level][N]
            if n:
                share = left / (n + _BLEND[place])
                weights[place] = share
                left -= share * n
        rows = look.rows
        counts = self.table.counts.take([rows[0], rows[2], rows[3], rows[4], rows[8]], axis=0)
        return np.array(weights, np.float32) @ counts + base * np.float32(left)

    def _wait(self, idle_kind: IdleKind, context: Context) -> Forecast:
        keys: tuple[Hashable, ...] = (
            ("wait", idle_kind),
            ("tenant", context.tenant, "wait", idle_kind, ""),
            hash((hash(context.session), 8, idle_kind)),
        )
        find = self.table.find
        rows = [find(key, EMPTY_ROW) for key in keys]
        n = self.table.stats.take(rows, axis=0)[:, N].tolist()
        left = 1.0
        masses = np.zeros(BINS, np.float32)
        for weight, row, pseudo in zip(reversed(n), reversed(rows), (8.0, 20.0, 2.0), strict=True):
            if weight:
                share = left / (weight + pseudo)
                masses += self.table.counts[row] * np.float32(share)
                left -= share * weight
        masses += _SPREAD * np.float32(left)
        return Forecast(
            masses,
            self._p_return(idle_kind, ""),
            idle_kind,
            0.0,
            Basis(idle_kind, context, [], keys),
        )

    def _p_return(self, idle_kind: IdleKind, kind: str) -> float:
        if idle_kind == "ended":
            return 0.01
        found = self.returns.get((idle_kind, kind)) or self.returns.get((idle_kind, ""))
        return found.probability if found is not None else 0.9

    def _offset_s(self, client: str) -> float:
        found = self.overheads.get(client)
        return found.seconds if found is not None else 0.0

    # -- learning --------------------------------------------------------------------------------

    def observe(
        self,
        forecast: Forecast,
        gap_s: float,
        durations_s: Sequence[float | None] | None = None,
        returned: bool = True,
    ) -> None:
        """Learn how a forecast gap came out.

        Args:
            forecast: as made at the gap's start.
            gap_s: how long it was; with ``returned`` off, how long the session had been waited for
                when it was given up.
            durations_s: of each of the forecast's calls, in order, where the client says so (None:
                not of this one). Without them the gap teaches of its slowest call alone.
            returned: whether the session came back.
        """
        basis = forecast.basis
        if basis is None:
            return
        forecast.basis = None  # a gap teaches once
        self.observed_total += 1
        kind = ""
        if basis.calls:
            lead = max(basis.calls, key=_level)
            kind = lead.features.kind
        for key in (
            ((basis.idle_kind, kind), (basis.idle_kind, "")) if kind else ((basis.idle_kind, ""),)
        ):
            self.returns.setdefault(key, Returns()).add(returned)
        if not returned:
            self._censored(basis, forecast, gap_s)
            return
        if basis.wait:
            self._count(basis.wait, log_s(gap_s))
            return
        if durations_s is not None:
            known = [d for d in durations_s if d is not None]
            if known and gap_s > max(known) and len(known) == len(basis.calls):
                self.overheads.setdefault(basis.context.client, Overhead()).add(gap_s - max(known))
            for call, duration in zip(basis.calls, durations_s, strict=False):
                if duration is not None:
                    self._learn(call, log_s(duration))
        else:
            self._learn(lead, log_s(gap_s - forecast.offset_s))

    def _learn(self, call: CallBasis, log_gap: float) -> None:
        table = self.table
        touch = table.touch
        rows: list[int] = []
        if self.learn_shared:
            rows += [touch(key) for key in call.shared]
        rows += [touch(key) for key in call.session]
        surprise = log_gap - call.expected_log_s
        slow = 1.0 if surprise > _SLOW[0] and log_gap > _SLOW[1] else 0.0
        values = [log_gap] * (len(rows) - 3) + [surprise, surprise, slow]
        stats = table.stats.take(rows, axis=0).tolist()
        first_session = len(rows) - 8
        keep = []
        for i, (node, value) in enumerate(zip(stats, values, strict=True)):
            memory = (
                SESSION_MEMORY if i >= first_session else TENANT_MEMORY if i == 4 else SHARED_MEMORY
            )
            n = node[N]
            keep.append(1 - 1 / memory)
            n = node[N] = n * (1 - 1 / memory) + 1
            miss = value - node[MEAN]
            node[MEAN] += miss / n
            node[DEV] += (abs(miss) - node[DEV]) / n
            node[FAST] += (value - node[FAST]) * (_FAST_RATE if n > 1 / _FAST_RATE else 1 / n)
            node[BEFORE], node[LAST] = node[LAST], value
        bin_ = bin_of(log_gap)
        if self.learn_shared:
            better = math.log(
                (float(call.blended[bin_]) + 1e-4) / (float(call.corrected[bin_]) + 1e-4)
            )
            for node in (stats[0], stats[3]):
                trust = node[TRUST] * _TRUST_MEMORY + better
                node[TRUST] = max(-_TRUST_LIMIT, min(_TRUST_LIMIT, trust))
        table.stats[rows] = stats
        counted = rows[:-3]
        counts = table.counts.take(counted, axis=0)
        counts *= np.array(keep[:-3], np.float32)[:, None]
        counts[:, bin_] += 1
        table.counts[counted] = counts

    def _count(self, keys: Sequence[Hashable], log_gap: float) -> None:
        masses = np.zeros(BINS, np.float32)
        masses[bin_of(log_gap)] = 1
        self._add(keys, masses, log_gap)

    def _censored(self, basis: Basis, forecast: Forecast, waited_s: float) -> None:
        """A wait given up says that the gap is longer: its mass goes where the forecast puts what
        is longer (one step of Efron's self-consistency, 1967), for half an observation."""
        start = bin_of(log_s(waited_s))
        rest = forecast.masses.copy()
        rest[:start] = 0
        total = float(rest.sum())
        if total <= 0:
            return
        rest *= np.float32(0.5 * forecast.p_return / total)
        keys: tuple[Hashable, ...] = basis.wait
        if basis.calls:
            keys = max(basis.calls, key=_level).shared
        self._add(keys, rest, None)

    def _add(
        self, keys: Sequence[Hashable], masses: NDArray[np.float32], log_gap: float | None
    ) -> None:
        table = self.table
        added = float(masses.sum())
        for key in keys:
            own = not isinstance(key, tuple)
            if not own and not self.learn_shared:
                continue
            row = table.touch(key)
            keep = 1 - 1 / (SESSION_MEMORY if own else SHARED_MEMORY)
            table.counts[row] = table.counts[row] * np.float32(keep) + masses
            node = table.stats[row]
            node[N] = node[N] * keep + added
            if log_gap is not None:
                node[MEAN] += (log_gap - node[MEAN]) / node[N]
                node[LAST] = log_gap


@dataclass(slots=True)
class _Look:
    """A call's nodes as found."""

    features: CallFeatures
    shared: tuple[Hashable, ...]
    session: tuple[Hashable, ...]
    rows: list[int]
    stats: list[list[float]]
    x: list[float]
    expected: float


def _level(call: CallBasis) -> float:
    return call.level


def _longest(calls: list[CallBasis]) -> NDArray[np.float32]:
    """The distribution of the longest of parallel calls: the slowest one's distribution function
    times a power of the others'."""
    lead = max(calls, key=_level)
    below = np.cumsum(lead.masses)
    for call in calls:
        if call is not lead:
            below *= np.cumsum(call.masses) ** np.float32(_SIBLING)
    below /= below[-1]
    below[1:] -= below[:-1].copy()
    return below
