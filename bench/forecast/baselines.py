"""What others forecast with, each as a function of calls in order: a point estimate in seconds.

Each is fitted on training sessions and then runs through a test session, told the truth after each
call: what it would see in a gateway.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gateway.dialects.turn import ToolCall
from gateway.predictor.features import features_of
from gateway.predictor.train import Recorded

FLOOR_S = 1e-3


class Baseline(Protocol):
    name: str

    def fit(self, sessions: Sequence[Recorded]) -> None: ...
    def start(self) -> None:
        """A new session begins."""

    def predict(self, call: ToolCall) -> float: ...
    def observe(self, call: ToolCall, duration_s: float) -> None: ...


def calls_of(sessions: Sequence[Recorded]) -> list[tuple[ToolCall, float]]:
    return [
        (call, duration_s)
        for session in sessions
        for turn in session.turns
        for call, duration_s in zip(turn.calls, turn.durations_s, strict=True)
    ]


class MovingAverage:
    """The session's mean so far (InferCept, arXiv 2402.01869)."""

    name = "moving average per session (InferCept)"

    def fit(self, sessions: Sequence[Recorded]) -> None:
        self.first_s = float(np.mean([duration_s for _, duration_s in calls_of(sessions)]))

    def start(self) -> None:
        self.sum_s, self.n = self.first_s, 1

    def predict(self, call: ToolCall) -> float:
        return self.sum_s / self.n

    def observe(self, call: ToolCall, duration_s: float) -> None:
        self.sum_s += duration_s
        self.n += 1


class Clusters:
    """TF-IDF of name and arguments, MiniBatchKMeans with 100 clusters, the cluster's median (the
    paper's predictor, arXiv 2606.16824)."""

    name = "TF-IDF + MiniBatchKMeans C=100 (the paper's)"

    def fit(self, sessions: Sequence[Recorded]) -> None:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.feature_extraction.text import TfidfVectorizer

        calls = calls_of(sessions)
        self.words = TfidfVectorizer(max_features=2000)
        vectors = self.words.fit_transform([self._text(call) for call, _ in calls])
        self.means = MiniBatchKMeans(100, random_state=0, n_init=3)
        found = self.means.fit_predict(vectors)
        times: dict[int, list[float]] = defaultdict(list)
        for cluster, (_, duration_s) in zip(found, calls, strict=True):
            times[int(cluster)].append(duration_s)
        self.median_s = {cluster: float(np.median(each)) for cluster, each in times.items()}

    @staticmethod
    def _text(call: ToolCall) -> str:
        return f"{call.name} {call.arguments[:2000]}"

    def start(self) -> None:
        pass

    def predict(self, call: ToolCall) -> float:
        cluster = self.means.predict(self.words.transform([self._text(call)]))[0]
        return self.median_s.get(int(cluster), 1.0)

    def predict_all(self, calls: Sequence[ToolCall]) -> list[float]:
        found = self.means.predict(self.words.transform([self._text(call) for call in calls]))
        return [self.median_s.get(int(cluster), 1.0) for cluster in found]

    def observe(self, call: ToolCall, duration_s: float) -> None:
        pass


class Medians:
    """The median of a group of calls, falling back to coarser groups."""

    def __init__(self, name: str, levels: int) -> None:
        self.name = name
        self.levels = levels

    def _groups(self, call: ToolCall) -> list[Any]:
        words, _ = features_of(call)
        return [(), call.name, (call.name, words.program, words.sub)][: self.levels + 1]

    def fit(self, sessions: Sequence[Recorded]) -> None:
        times: dict[Any, list[float]] = defaultdict(list)
        for call, duration_s in calls_of(sessions):
            for group in self._groups(call):
                times[group].append(duration_s)
        self.median_s = {g: float(np.median(t)) for g, t in times.items() if len(t) >= 3}

    def start(self) -> None:
        pass

    def predict(self, call: ToolCall) -> float:
        for group in reversed(self._groups(call)):
            found = self.median_s.get(group)
            if found is not None:
                return found
        return 1.0

    def observe(self, call: ToolCall, duration_s: float) -> None:
        pass


class SessionEwma:
    """Per session and tool, a moving average of log time over the tool's median."""

    name = "per session and tool log-EWMA over a tool prior"
    rate = 0.5

    def fit(self, sessions: Sequence[Recorded]) -> None:
        self.prior = Medians("", 1)
        self.prior.fit(sessions)

    def start(self) -> None:
        self.log_s: dict[str, float] = {}

    def predict(self, call: ToolCall) -> float:
        found = self.log_s.get(call.name)
        return 10**found if found is not None else self.prior.predict(call)

    def observe(self, call: ToolCall, duration_s: float) -> None:
        before = self.log_s.get(call.name)
        if before is None:
            before = math.log10(max(self.prior.predict(call), FLOOR_S))
        now = math.log10(max(duration_s, FLOOR_S))
        self.log_s[call.name] = before + self.rate * (now - before)


def baselines() -> list[Baseline]:
    found: list[Baseline] = [
        MovingAverage(),
        Medians("per tool median", 1),
        Medians("tool + program/subcommand", 2),
        SessionEwma(),
    ]
    try:
        import sklearn  # noqa: F401
    except ImportError:
        print("scikit-learn is not installed: the paper's predictor is left out")
    else:
        found.insert(1, Clusters())
    return found


def run(baseline: Baseline, sessions: Sequence[Recorded]) -> tuple[list[float], float]:
    """Predictions for all calls in order, and microseconds a single prediction."""
    found: list[float] = []
    spent_s = 0.0
    timed = 0
    for session in sessions:
        baseline.start()
        calls = calls_of([session])
        if isinstance(baseline, Clusters):
            found += baseline.predict_all([call for call, _ in calls])
            for call, _ in calls[:3]:
                before_s = time.thread_time()
                baseline.predict(call)
                spent_s += time.thread_time() - before_s
                timed += 1
            continue
        for call, duration_s in calls:
            before_s = time.thread_time()
            found.append(baseline.predict(call))
            spent_s += time.thread_time() - before_s
            timed += 1
            baseline.observe(call, duration_s)
    return found, 1e6 * spent_s / max(timed, 1)
