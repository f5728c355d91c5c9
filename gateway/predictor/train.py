"""Train the priors that ship with the package, from records of real sessions.

Sources and licences of the shipped file: `gateway/predictor/PRIORS.md`. Run again with
``cachewise forecast train --data DIR``; needs the extra ``train`` (CatBoost).
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from gateway.dialects.turn import ToolCall
from gateway.predictor.correction import Correction
from gateway.predictor.features import features_of
from gateway.predictor.forecast import Forecast
from gateway.predictor.grid import BINS, bin_of, log_s
from gateway.predictor.model import MAX_CALLS, CallBasis, Context, Predictor, Returns
from gateway.predictor.records import call_of, read
from gateway.predictor.table import TRUST, N
from gateway.predictor.warp import Warp

TREES: Final = 300
DEPTH: Final = 6
RATE: Final = 0.13
FOLDS: Final = 3
CALIBRATION_FOLDS: Final = 3
SEED: Final = 7
SHAKEN_SESSION: Final = 0.3
SHAKEN_COMMAND: Final = 0.5
"""Standard deviations of log10 of the scales of `shaken`."""

CLIENTS: Final = {"claude": "claude-code", "codex": "codex"}


@dataclass(slots=True)
class Turn:
    """A turn of a recorded session: its calls, how long each took, and the gap."""

    calls: list[ToolCall]
    durations_s: list[float]
    records: list[dict[str, Any]]
    prompt_tokens: int
    last_failed: bool = False


@dataclass(slots=True)
class Recorded:
    """A recorded session."""

    source: str
    name: str
    client: str
    turns: list[Turn] = field(default_factory=list)
    human_gaps_s: list[float] = field(default_factory=list)

    def context(self, turn: Turn) -> Context:
        return Context(
            (self.source, self.name),
            self.source,
            self.client,
            turn.prompt_tokens,
            turn.last_failed,
        )


def load(folder: Path) -> list[Recorded]:
    """The sessions of ``tool-calls-*.jsonl.gz`` and ``tool-turns-*.jsonl.gz`` in a folder, in the
    order of time. Raises `FileNotFoundError` where there are none."""
    calls = sorted(folder.glob("tool-calls*.jsonl.gz"))
    if not calls:
        raise FileNotFoundError(f"{folder}: no tool-calls*.jsonl.gz in it")
    sessions: dict[tuple[str, str], Recorded] = {}
    turns: dict[tuple[str, str, int], Turn] = {}
    for path in calls:
        for record in sorted(
            read(path), key=lambda r: (r["source"], r["session"], r["turn"], r["index"])
        ):
            if record["duration_s"] is None:
                continue
            place = record["source"], record["session"]
            session = sessions.get(place)
            if session is None:
                client = CLIENTS.get(record["agent"], "other")
                session = sessions[place] = Recorded(*place, client)
            turn = turns.get((*place, record["turn"]))
            if turn is None:
                turn = turns[*place, record["turn"]] = Turn([], [], [], record["ctx"] or 0)
                session.turns.append(turn)
            turn.calls.append(call_of(record))
            turn.durations_s.append(record["duration_s"])
            turn.records.append(record)
    for session in sessions.values():
        for before, turn in pairwise(session.turns):
            turn.last_failed = before.records[-1]["is_error"] is True
    for path in sorted(folder.glob("tool-turns*.jsonl.gz")):
        for record in read(path):
            found = sessions.get((record["source"], record["session"]))
            if found is not None and record["gap_kind"] == "user":
                found.human_gaps_s.append(record["gap_s"])
    return list(sessions.values())


Seen = tuple[Turn, int, CallBasis, Forecast]
"""A call of a turn: the turn, the call's place in it, what was forecast of it, and the turn's whole
forecast."""


def replay(predictor: Predictor, session: Recorded, in_order: bool = False) -> Iterator[Seen]:
    """Forecast and observe a session's turns in order; yields its calls before they are observed,
    at most `MAX_CALLS` a turn.

    As a gateway sees it, a turn's parallel calls are forecast together and learned from together
    when all are done. With ``in_order`` each call is forecast when those before it in the list have
    been learned from, as records of calls are usually scored.
    """
    for turn in session.turns:
        durations = turn.durations_s[:MAX_CALLS]
        if not in_order:
            forecast = predictor.forecast(turn.calls, "tool", session.context(turn))
            assert forecast.basis is not None
            for place, call in enumerate(forecast.basis.calls):
                yield turn, place, call, forecast
            predictor.observe(forecast, max(durations), durations)
            continue
        for place, duration_s in enumerate(durations):
            forecast = predictor.forecast(turn.calls, "tool", session.context(turn))
            assert forecast.basis is not None
            yield turn, place, forecast.basis.calls[place], forecast
            alone: list[float | None] = [None] * len(durations)
            alone[place] = duration_s
            predictor.observe(forecast, duration_s, alone)


def nodes_of(sessions: Sequence[Recorded]) -> Predictor:
    """A predictor that has seen the sessions, without tenants and without what is theirs alone."""
    predictor = Predictor()
    for session in sessions:
        for _ in replay(predictor, session):
            pass
        predictor.overheads.clear()
        for gap_s in session.human_gaps_s:
            waiting = predictor.forecast([], "human", Context((session.source, session.name)))
            predictor.observe(waiting, gap_s)
    predictor.returns = returns_of(sessions)
    return prior_part(predictor)


def returns_of(sessions: Sequence[Recorded]) -> dict[tuple[str, str], Returns]:
    """Returns after each kind of wait. A recorded session ends once: where its last turn was
    answered by a person's silence, that is a wait without return."""
    human = float(sum(len(session.human_gaps_s) for session in sessions))
    tool = float(sum(len(session.turns) for session in sessions))
    ends = float(len(sessions))
    scale = min(1.0, 500 / max(human + ends, 1))
    return {
        ("human", ""): Returns(human * scale, ends * scale),
        ("background", ""): Returns(human * scale, ends * scale / 2),
        ("tool", ""): Returns(990.0, max(1.0, 1000 * 0.01 * ends / max(tool, 1))),
    }


def prior_part(predictor: Predictor) -> Predictor:
    """What of a predictor is of use to everybody: nodes of no tenant and no session, their weight
    cut so that new traffic soon counts."""
    kept = Predictor(returns=predictor.returns)
    old, new = predictor.table, kept.table
    for key, row in old:
        if isinstance(key, tuple) and key[0] != "tenant":
            to = new.touch(key)
            old.normalise(row)
            new.data[to] = old.data[row]
            new.data[to, TRUST] = 0
            n = float(old.data[row, N])
            new.data[to, N:] *= np.float32(min(1.0, PRIOR_WEIGHT / n) if n else 1.0)
    return kept


PRIOR_WEIGHT: Final = 100.0
"""Gaps that a prior counts for at most."""


def rows_of(sessions: Sequence[Recorded]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features and bins of calls as three kinds of traffic would show them: each session as one
    more of those that the priors are from, with priors from sessions of other folds; as another
    organisation's, with priors from all others; and as it would run on machines of its own
    (`shaken`). So the trees learn when to believe the priors, and when the session itself."""
    folds = [str(number % FOLDS) for number in range(len(sessions))]
    owners = [session.source.partition("/")[0] for session in sessions]
    xs: list[NDArray[np.float32]] = []
    ys: list[int] = []
    for groups in (folds, owners):
        for group in sorted(set(groups)):
            predictor = nodes_of([s for s, g in zip(sessions, groups, strict=True) if g != group])
            predictor.learn_shared = False
            predictor.keep_features = True
            for number, session in enumerate(sessions):
                if groups[number] != group:
                    continue
                for seen in (session, shaken(session, number)) if groups is folds else (session,):
                    # Half of the sessions as gateways see them, half call by call.
                    for turn, place, call, _ in replay(predictor, seen, in_order=number % 2 == 1):
                        assert call.x is not None
                        xs.append(call.x)
                        ys.append(bin_of(log_s(turn.durations_s[place])))
    return np.array(xs, np.float32), np.array(ys)


def shaken(session: Recorded, seed: int) -> Recorded:
    """The session with all times scaled at random, and those of each of its commands once more: the
    same calls on other machines, in other repositories (domain randomisation: Tobin et al., IROS
    2017)."""
    rng = np.random.default_rng((SEED, seed))
    whole = rng.normal(0, SHAKEN_SESSION)
    scales: dict[tuple[str, ...], float] = {}
    made = Recorded(session.source, session.name + " shaken", session.client)
    for turn in session.turns:
        durations_s = []
        for call, duration_s in zip(turn.calls, turn.durations_s, strict=True):
            words, _ = features_of(call)
            command = words.tool, words.program, words.sub
            if command not in scales:
                scales[command] = 10 ** (whole + rng.normal(0, SHAKEN_COMMAND))
            durations_s.append(max(duration_s, 1e-3) * scales[command])
        made.turns.append(replace(turn, durations_s=durations_s))
    return made


def correction_of(
    x: NDArray[np.float32], y: NDArray[np.int64], trees: int = TREES, threads: int = 2
) -> Correction:
    """Fit the trees. Raises `ImportError` where CatBoost is not installed."""
    from catboost import CatBoostClassifier

    y = np.append(y, np.arange(BINS))  # every bin must be there
    x = np.append(x, np.zeros((BINS, x.shape[1]), np.float32), axis=0)
    weight = np.append(np.ones(len(y) - BINS), np.full(BINS, 1e-3))
    model = CatBoostClassifier(
        loss_function="MultiClass",
        iterations=trees,
        depth=DEPTH,
        learning_rate=RATE,
        boosting_type="Plain",
        bootstrap_type="Bernoulli",
        subsample=0.35,
        rsm=0.25,
        border_count=64,
        random_strength=2,
        leaf_estimation_iterations=1,
        thread_count=threads,
        random_seed=SEED,
        allow_writing_files=False,
        verbose=0,
    )
    model.fit(x, y, sample_weight=weight)
    return exported(model)


def exported(model: Any) -> Correction:
    """CatBoost's oblivious trees as arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        model.save_model(str(path), format="json")
        data = orjson.loads(path.read_bytes())
    trees = data["oblivious_trees"]
    depth = max(len(tree["splits"] or []) for tree in trees)
    columns = np.zeros((len(trees), depth), np.int16)
    limits = np.full((len(trees), depth), np.inf, np.float32)
    leaves = np.zeros((len(trees), 1 << depth, BINS), np.float16)
    for i, tree in enumerate(trees):
        for j, split in enumerate(tree["splits"] or []):
            columns[i, j] = split["float_feature_index"]
            limits[i, j] = split["border"]
        values = np.array(tree["leaf_values"], np.float64).reshape(-1, BINS)
        leaves[i, : len(values)] = values
    bias = np.array(data["scale_and_bias"][1], np.float32)
    if bias.shape != (BINS,):
        bias = np.zeros(BINS, np.float32)
    return Correction(columns, limits, leaves, bias)


def trained(sessions: Sequence[Recorded], trees: int = TREES, calibrate: bool = True) -> Predictor:
    """Priors, correction and calibration from recorded sessions. Sessions are calibrated on by
    predictors trained on the others, a third at a time."""
    predictor = nodes_of(sessions)
    parts = CALIBRATION_FOLDS if calibrate and len(sessions) >= 4 * CALIBRATION_FOLDS else 0
    for part in range(parts):
        others = [session for i, session in enumerate(sessions) if i % parts != part]
        trial = nodes_of(others)
        trial.correction = correction_of(*rows_of(others), trees)
        for kind, warp in warps_of(trial, sessions[part::parts]).items():
            known = predictor.warps[kind]
            known.counts = [a + b for a, b in zip(known.counts, warp.counts, strict=True)]
            known.refresh()
    predictor.correction = correction_of(*rows_of(sessions), trees)
    return predictor


def warps_of(predictor: Predictor, sessions: Sequence[Recorded]) -> dict[str, Warp]:
    """Where in their forecasts the sessions' calls and gaps ended."""
    predictor.learn_shared = False
    found: defaultdict[str, Warp] = defaultdict(Warp)
    for session in sessions:
        for turn, place, call, whole in replay(predictor, session):
            alone = Forecast(call.masses, 1.0, "tool").reached(turn.durations_s[place])
            found[call.words.kind].add(alone)
            if place == 0 and len(turn.calls) > 1:
                lead = max(predictor_calls(whole), key=lambda each: each.level)
                ended = whole.reached(max(turn.durations_s))
                found[lead.words.kind + "+"].add(ended)
    for warp in found.values():
        warp.refresh()
    return found


def predictor_calls(forecast: Forecast) -> list[CallBasis]:
    """The calls of a forecast that has not been observed yet."""
    assert forecast.basis is not None
    return forecast.basis.calls
