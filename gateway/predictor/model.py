"""The predictor: what was learned of gaps, and how a forecast is made of it.

Nodes stand in a hierarchy from the general to the particular:

    tool kind → tool → program → subcommand → this tenant's → this session's (→ this very call)

Means of log time are shrunk level by level towards the level above,
``(n m + k m_above) / (n + k)``, and become the features of the trained correction, which gives a
distribution. Histograms of the same nodes are blended the same way on top of it. How much the
blend counts against the correction alone is learned for each tool from which of the two has
forecast better: traffic unlike the training data is soon forecast from itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gateway.dialects.turn import ToolCall
from gateway.idle import IdleKind
from gateway.predictor.correction import Correction
from gateway.predictor.delta import BETTER, GAPS, HEAD, LOG_SQUARES, LOGS, Delta, faded
from gateway.predictor.features import NUMBERS, CallWords, features_of
from gateway.predictor.forecast import Forecast
from gateway.predictor.grid import BINS, EDGES, bin_of, log_s
from gateway.predictor.table import (
    BEFORE,
    EMPTY_ROW,
    FAST,
    LAST,
    OFF,
    OFF_FAST,
    SLOW,
    SLOW_FAST,
    SQUARES,
    STATS,
    SUM,
    TRUST,
    UNIT,
    WIDTH,
    N,
    NodeTable,
)
from gateway.predictor.warp import Curve, Warp

MAX_CALLS: Final = 8
"""Parallel calls that a forecast looks at."""
MAX_NODES: Final = 100_000

SHARED_MEMORY: Final = 1_000.0
TENANT_MEMORY: Final = 300.0
SESSION_MEMORY: Final = 30.0
"""Gaps after which a node has forgotten half to two thirds of what it knew (its weight's limit)."""
KEEP_SHARED: Final = 1 - 1 / SHARED_MEMORY
KEEP_TENANT: Final = 1 - 1 / TENANT_MEMORY
_KEEP_SESSION: Final = 1 - 1 / SESSION_MEMORY

_SHRINK: Final = (1.0, 5.0, 5.0, 5.0, 5.0)
_SESSION_SHRINK: Final = (0.0, 3.0, 1.0, 1.0, 1.0)
_BLEND: Final = ((8, 6.0), (4, 8.0), (3, 8.0), (2, 20.0), (0, 40.0))
"""Of which nodes histograms are blended, from the particular to the general, and how many gaps what
stands above each is worth: this session's, this tenant's, subcommand, program, kind."""
_TRUST_AT_FIRST: Final = -2.4
_TRUST_LIMIT: Final = 30.0
_TRUST_MEMORY: Final = 0.98
_SIBLING: Final = 0.35
"""Parallel calls wait for much the same things: of all but the slowest, this power of the
distribution function counts."""
_SLOW: Final = 0.7, 0.5
"""A wait is slow that lasts 10^0.7 times what was expected, and over 10^0.5 s: a person was
asked."""

ASKED_S: Final = 5.0
"""A gap longer by this than its tools ran was spent on a person's permission, not on the client's
own work."""
_CLIENTS: Final = {"claude-code": 1.0, "codex": 2.0}

_LEAST: Final = 1e-4
_SPREAD: Final = np.diff(np.array(EDGES)).astype(np.float32) / np.float32(EDGES[-1] - EDGES[0])


@dataclass(slots=True, frozen=True)
class Context:
    """Whose gap it is. ``session`` is only hashed; ``tenant`` is kept, as its name in settings."""

    session: Hashable = None
    tenant: str = ""
    client: str = "other"
    prompt_tokens: int = 0
    last_failed: bool = False
    """Whether the session's last tool call came back as an error."""


@dataclass(slots=True)
class CallBasis:
    """A call as forecast: what learning from its outcome needs."""

    words: CallWords
    expected_log_s: float
    """Of the shared nodes, before this session's own history."""
    masses: NDArray[np.float32]
    """P(gap in bin): ``weight`` of what the histograms say, the rest what the correction does."""
    odds: NDArray[np.float32]
    """The correction's, to be divided by ``odds_sum``."""
    odds_sum: float
    weight: float
    left: float
    """Of what the histograms say, the share that is the correction's too."""
    level: float
    """Mean of ``masses`` in log10 s where there are parallel calls, which it ranks; else 0."""
    numbers: list[float]
    """Of the call (`gateway.predictor.features.NUMBERS`)."""
    x: NDArray[np.float32] | None = None
    """The features, where `Predictor.keep_features` asks for them."""


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
        self.add_many(log_s(seconds), 1)

    def add_many(self, mean_log_s: float, times: int) -> None:
        self.seen = min(self.seen + times, 100)
        self.log_s += (mean_log_s - self.log_s) * min(1.0, times / self.seen)

    @property
    def seconds(self) -> float:
        return 10**self.log_s if self.seen >= 3 else 0.0


_CENTRES: Final = ((np.array(EDGES[:-1]) + np.array(EDGES[1:])) / 2).astype(np.float32)


@dataclass(slots=True)
class Predictor:
    """Forecasts gaps and learns from them. Not for use by two threads at once.

    ``learn_shared`` off keeps what a session teaches to that session, ``keep_features`` leaves each
    call's features in the forecast's basis: both for benchmarks and training.
    """

    table: NodeTable = field(default_factory=lambda: NodeTable(MAX_NODES))
    correction: Correction | None = None
    returns: dict[tuple[str, str], Returns] = field(default_factory=dict)
    overheads: dict[str, Overhead] = field(default_factory=dict)
    warps: defaultdict[str, Warp] = field(default_factory=lambda: defaultdict(Warp))
    observed_total: int = 0
    learn_shared: bool = True
    keep_features: bool = False
    delta: Delta | None = None
    """Where what is learned is noted for other replicas of the gateway."""

    # -- forecasting -----------------------------------------------------------------------------

    def forecast(
        self, calls: Sequence[ToolCall], idle_kind: IdleKind, context: Context
    ) -> Forecast:
        """The gap that begins now, after a response with these tool calls."""
        if not calls or idle_kind in ("ended", "background"):
            return self._wait(idle_kind, context)
        seen = [self._look(*features_of(call), context) for call in calls[:MAX_CALLS]]
        expected = [look.expected for look in seen]
        bases = [self._call(look, i, expected, context) for i, look in enumerate(seen)]
        offset_s = self._offset_s(context.client)
        masses = bases[0].masses if len(bases) == 1 else _longest(bases)
        lead = max(bases, key=_level)
        return Forecast(
            masses,
            self._p_return(idle_kind, lead.words.kind),
            idle_kind,
            offset_s,
            Basis(idle_kind, context, bases, ()),
            self.warp_of(lead.words.kind, len(bases) > 1),
        )

    def warp_of(self, kind: str, parallel: bool = False) -> Curve | None:
        """The calibration of a tool kind, of parallel calls' maximum or of one call."""
        found = self.warps.get(kind + "+" if parallel else kind)
        return found.curve if found is not None else None

    def _look(self, words: CallWords, numbers: list[float], context: Context) -> _Look:
        """Find a call's nodes and shrink the means of the shared ones."""
        find = self.table.find
        rows = [find(key, EMPTY_ROW) for key in _keys(words, context)]
        rows.append(EMPTY_ROW)  # the correction's place
        data = self.table.data.take(rows, axis=0)
        stats = data[:, :STATS].tolist()
        m = 0.0
        for node, k in zip(stats[:SHARED_LEVELS], _SHRINK, strict=True):
            n = node[N]
            if n:
                unit = node[UNIT]
                m = (node[SUM] + k * unit * m) / (n + k * unit)
                n /= unit
            numbers += (m, n)
        return _Look(words, numbers, data, stats, m)

    def _call(self, look: _Look, place: int, expected: list[float], context: Context) -> CallBasis:
        m = look.expected
        parallel = len(expected) > 1
        every, of_kind, of_program, *_ = session = look.stats[SHARED_LEVELS:-1]
        x = look.numbers
        x += (
            math.log10(1 + context.prompt_tokens),
            _CLIENTS.get(context.client, 0.0),
            float(context.last_failed),
            float(len(expected)),
            float(place),
            max(e for i, e in enumerate(expected) if i != place) if parallel else -4.0,
            sum(10**e for e in expected[:place]),
            every[OFF_FAST],
            every[OFF] / every[N] if every[N] else 0.0,
            of_kind[OFF_FAST],
            of_kind[OFF] / of_kind[N] if of_kind[N] else 0.0,
            every[SLOW_FAST],
            every[SLOW] / every[N] if every[N] else 0.0,
            of_program[SLOW_FAST],
            of_program[SLOW] / of_program[N] if of_program[N] else 0.0,
            every[BEFORE],
        )
        for node, k in zip(session, _SESSION_SHRINK, strict=True):
            n = node[N]
            if not n:
                x += (0.0, m, m, m, 0.0)
                continue
            unit = node[UNIT]
            if k:  # the session's mean over all tools says nothing of this one
                m = (node[SUM] + k * unit * m) / (n + k * unit)
            x += (n / unit, node[FAST], m, node[LAST], _deviation(node))
        vector = np.array(x, np.float32)
        if self.correction is None:
            odds, odds_sum, weight = _SPREAD, 1.0, 1.0
        else:
            odds, odds_sum = self.correction.odds(vector)
            trust = look.stats[3][TRUST] + 0.2 * look.stats[0][TRUST]
            weight = 1 / (1 + math.exp(-_TRUST_AT_FIRST - trust))
        masses, left = self._mixed(look, odds, odds_sum, weight)
        level = float(masses @ _CENTRES) if parallel else 0.0
        basis = CallBasis(
            *(look.words, look.expected, masses, odds, odds_sum, weight, left, level),
            x[: len(NUMBERS)],
        )
        if self.keep_features:
            basis.x = vector
        return basis

    @staticmethod
    def _mixed(
        look: _Look, odds: NDArray[np.float32], odds_sum: float, weight: float
    ) -> tuple[NDArray[np.float32], float]:
        """The nodes' histograms from the particular to the general, each for the share it has
        earned, above them the correction; all this for ``weight``, and the correction alone for
        the rest. Returns the mixture, and the correction's share in what the histograms say."""
        stats = look.stats
        left = 1.0
        weights = [0.0] * len(stats)
        for level, pseudo in _BLEND:
            node = stats[level]
            n = node[N]
            if n:
                share = left / (n + pseudo * node[UNIT])
                weights[level] = share * weight
                left -= share * n
        weights[-1] = (1 - weight + weight * left) / odds_sum
        histograms = look.data[:, STATS:]
        histograms[-1] = odds
        return np.array(weights, np.float32) @ histograms, left

    def _wait(self, idle_kind: IdleKind, context: Context) -> Forecast:
        keys: tuple[Hashable, ...] = (
            ("wait", idle_kind),
            ("tenant", context.tenant, "wait", idle_kind, ""),
            hash((hash(context.session), 9, idle_kind)),
        )
        find = self.table.find
        rows = [find(key, EMPTY_ROW) for key in keys]
        nodes = self.table.data.take(rows, axis=0)
        left = 1.0
        masses = np.zeros(BINS, np.float32)
        for node, pseudo in zip(reversed(nodes), (8.0, 20.0, 2.0), strict=True):
            n = float(node[N])
            if n:
                share = left / (n + pseudo * float(node[UNIT]))
                masses += node[STATS:] * np.float32(share)
                left -= share * n
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
        if self.delta is not None:
            self.delta.gaps += 1
        kind = ""
        if basis.calls:
            lead = max(basis.calls, key=_level)
            kind = lead.words.kind
        for key in (
            ((basis.idle_kind, kind), (basis.idle_kind, "")) if kind else ((basis.idle_kind, ""),)
        ):
            self.returns.setdefault(key, Returns()).add(returned)
            if self.delta is not None:
                self.delta.returned(key, returned)
        if not returned:
            self._censored(basis, forecast, gap_s)
            return
        if basis.wait:
            self._count(basis.wait, log_s(gap_s))
            return
        if self.learn_shared:
            place = kind + "+" if len(basis.calls) > 1 else kind
            stated = forecast.reached(gap_s)
            self.warps[place].add(stated)
            if self.delta is not None:
                self.delta.reached(place, stated)
        if durations_s is not None:
            known = [d for d in durations_s if d is not None]
            more_s = gap_s - max(known, default=gap_s)
            if 0 < more_s <= ASKED_S and len(known) == len(basis.calls):
                self.overheads.setdefault(basis.context.client, Overhead()).add(more_s)
                if self.delta is not None:
                    self.delta.overhead(basis.context.client, log_s(more_s))
            for call, duration in zip(basis.calls, durations_s, strict=False):
                if call is lead and more_s > ASKED_S:
                    self._learn(call, basis.context, log_s(gap_s))
                elif duration is not None:
                    self._learn(call, basis.context, log_s(duration))
        else:
            self._learn(lead, basis.context, log_s(gap_s - forecast.offset_s))

    def _learn(self, call: CallBasis, context: Context, log_gap: float) -> None:
        table = self.table
        keys = _keys(call.words, context)
        surprise = log_gap - call.expected_log_s
        slow = 1.0 if surprise > _SLOW[0] and log_gap > _SLOW[1] else 0.0
        bin_ = bin_of(log_gap)
        if self.learn_shared:
            rows = [table.touch(key) for key in keys[:SHARED_LEVELS]]
            for row in rows[:-1]:
                table.add(row, KEEP_SHARED, log_gap, bin_)
            table.add(rows[-1], KEEP_TENANT, log_gap, bin_)
            better = _gain(call, bin_)
            for row in (rows[0], rows[3]):
                self.trust(row * WIDTH + TRUST, better, 1)
            if self.delta is not None:
                self.delta.gap(keys[:SHARED_LEVELS], log_gap, bin_, better)
        for key in keys[SHARED_LEVELS:]:
            table.add_session(table.touch(key), _KEEP_SESSION, log_gap, bin_, surprise, slow)

    def trust(self, place: int, better: float, gaps: float) -> None:
        """Let a moving sum in the table go on over so many gaps, ``better`` in all."""
        flat = self.table.flat
        kept = _TRUST_MEMORY**gaps
        trust = flat[place] * kept + better * (1 - kept) / ((1 - _TRUST_MEMORY) * gaps)
        flat[place] = max(-_TRUST_LIMIT, min(_TRUST_LIMIT, trust))

    def learn_from(self, delta: Delta) -> None:
        """Learn what another replica of the gateway has learned, as if its gaps had been seen
        here."""
        table = self.table
        for key, row in delta.nodes.items():
            n = float(row[GAPS])
            if n <= 0:
                continue
            place = table.touch(key)
            table.normalise(place)
            node = table.data[place]
            kept, gain = faded(KEEP_TENANT if key[0] == "tenant" else KEEP_SHARED, n)
            node[N:] *= np.float32(kept)
            node[N] += n * gain
            node[SUM] += row[LOGS] * gain
            node[SQUARES] += row[LOG_SQUARES] * gain
            node[STATS:] += row[HEAD:] * np.float32(gain)
            if key[0] in ("kind", "sub"):
                self.trust(place * WIDTH + TRUST, float(row[BETTER]), n)
        for pair, (returned, gone) in delta.returns.items():
            known = self.returns.setdefault(pair, Returns())
            kept, gain = faded(KEEP_SHARED, returned + gone)
            known.returned = known.returned * kept + returned * gain
            known.gone = known.gone * kept + gone * gain
        for name, counts in delta.warps.items():
            warp = self.warps[name]
            warp.counts = [a + b for a, b in zip(warp.counts, counts, strict=True)]
            warp.refresh()
        for name, (n, logs) in delta.overheads.items():
            if n > 0:
                self.overheads.setdefault(name, Overhead()).add_many(logs / n, round(n))
        self.observed_total += delta.gaps

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
            words = max(basis.calls, key=_level).words
            keys = _keys(words, basis.context)[:SHARED_LEVELS]
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
            if not own and self.delta is not None:
                self.delta.masses(key, masses, log_gap)
            row = table.touch(key)
            keep = _KEEP_SESSION if own else KEEP_SHARED
            table.normalise(row)
            node = table.data[row]
            node[N:] *= np.float32(keep)
            node[STATS:] += masses
            node[N] += added
            if log_gap is not None:
                node[SUM] += log_gap
                node[SQUARES] += log_gap * log_gap
                node[LAST] = log_gap


@dataclass(slots=True)
class _Look:
    """A call's nodes as found; ``numbers`` grow into its features."""

    words: CallWords
    numbers: list[float]
    data: NDArray[np.float32]
    stats: list[list[float]]
    expected: float


def _deviation(node: list[float]) -> float:
    """Standard deviation of log10 s."""
    n = node[N]
    if not n:
        return 0.0
    variance = (node[SQUARES] - node[SUM] * node[SUM] / n) / n
    return math.sqrt(variance) if variance > 0 else 0.0


SHARED_LEVELS: Final = 5


def _keys(words: CallWords, context: Context) -> tuple[Hashable, ...]:
    """A call's nodes: five that all share (one of them the tenant's) and five of the session, whose
    keys are numbers, so that they mean nothing outside this process."""
    kind, tool, program, sub, digest = words
    s = hash(context.session)
    return (
        ("kind", kind),
        ("tool", tool),
        ("program", kind, program),
        ("sub", tool, program, sub),
        ("tenant", context.tenant, tool, program, sub),
        hash((s, 0)),
        hash((s, 1, kind)),
        hash((s, 2, tool, program)),
        hash((s, 3, tool, program, sub)),
        hash((s, 4, digest)),
    )


def _gain(call: CallBasis, bin_: int) -> float:
    """By how much the histograms forecast this bin better than the correction, log likelihood."""
    if call.weight > 0.999:
        return 0.0
    corrected = float(call.odds[bin_]) / call.odds_sum
    alone = (1 - call.weight) * corrected
    blended = max(0.0, float(call.masses[bin_]) - alone) / call.weight
    return math.log((blended + _LEAST) / (corrected + _LEAST))


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
