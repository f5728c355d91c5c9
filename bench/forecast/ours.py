"""Our predictor on recorded sessions: trained on some, run through others, and what came of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gateway.predictor
from gateway.predictor import Context, Forecast, Predictor, store
from gateway.predictor.calibration import label_of
from gateway.predictor.forecast import Forecast as ForecastType
from gateway.predictor.train import Recorded, replay, trained
from gateway.predictor.warp import calibrated

CACHE = Path(".cache") / "bench-forecast"


@dataclass
class Outcomes:
    """Forecasts and what became of them, one entry a wait."""

    actual_s: list[float] = field(default_factory=list)
    forecasts: list[ForecastType] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)

    def add(self, forecast: ForecastType, actual_s: float, kind: str, session: int) -> None:
        self.forecasts.append(forecast)
        self.actual_s.append(actual_s)
        self.kinds.append(kind)
        self.sessions.append(session)

    @property
    def median_s(self) -> NDArray[np.float64]:
        return np.array([forecast.median_s for forecast in self.forecasts])

    @property
    def score(self) -> NDArray[np.float64]:
        """What ranks sessions."""
        return np.array([forecast.typical_log_s for forecast in self.forecasts])

    @property
    def reached(self) -> NDArray[np.float64]:
        """How far up its calibrated distribution each actual time fell."""
        stated = [f.reached(t) for f, t in zip(self.forecasts, self.actual_s, strict=True)]
        return np.array(
            [
                s if f.warp is None else calibrated(f.warp, s)
                for f, s in zip(self.forecasts, stated, strict=True)
            ]
        )


def fitted(sessions: Sequence[Recorded], trees: int, calibrate: bool = True) -> Predictor:
    """Trained on these sessions; kept on disk while the predictor's code stays as it is."""
    mark = blake2b(digest_size=16)
    for path in sorted(Path(gateway.predictor.__file__).parent.glob("*.py")):
        if path.name not in ("calibration.py", "store.py", "forecast.py"):
            mark.update(path.read_bytes())
    mark.update(repr((trees, calibrate, [(s.source, s.name) for s in sessions])).encode())
    path = CACHE / f"{mark.hexdigest()}.npz"
    if not path.exists():
        store.Snapshot(trained(sessions, trees, calibrate), with_correction=True).write(path)
    return store.read(path)


def run_calls(
    predictor: Predictor, sessions: Sequence[tuple[int, Recorded]], learn_shared: bool = False
) -> Outcomes:
    """Each call by itself, in order (see `gateway.predictor.train.replay`)."""
    predictor.learn_shared = learn_shared
    found = Outcomes()
    for number, session in sessions:
        for turn, place, call, whole in replay(predictor, session, in_order=True):
            kind = call.words.kind
            warp = predictor.warp_of(kind)
            alone = Forecast(call.masses, whole.p_return, "tool", warp=warp)
            found.add(alone, turn.durations_s[place], kind, number)
    return found


def run_gaps(
    predictor: Predictor, sessions: Sequence[tuple[int, Recorded]], with_humans: bool = False
) -> Outcomes:
    """Each turn's gap, its parallel calls together, as a gateway sees it; people's too if asked."""
    predictor.learn_shared = False
    found = Outcomes()
    for number, session in sessions:
        for turn, place, _, whole in replay(predictor, session):
            if place == 0:
                found.add(whole, max(turn.durations_s), label_of(whole), number)
        for gap_s in session.human_gaps_s if with_humans else ():
            waiting = predictor.forecast([], "human", Context((session.source, session.name)))
            found.add(waiting, gap_s, "human", number)
            predictor.observe(waiting, gap_s)
    return found


def cost(predictor: Predictor, sessions: Sequence[Recorded]) -> tuple[float, float]:
    """Microseconds of CPU of one forecast and one observation, mean over turns of one call."""
    predictor.learn_shared = True
    gc.collect()
    gc.freeze()  # as the gateway does
    forecasting_s = observing_s = 0.0
    n = 0
    for session in sessions:
        for turn in session.turns:
            if len(turn.calls) > 1:
                continue
            context = session.context(turn)
            begun_s = time.thread_time()
            forecast = predictor.forecast(turn.calls, "tool", context)
            made_s = time.thread_time()
            predictor.observe(forecast, turn.durations_s[0])
            observing_s += time.thread_time() - made_s
            forecasting_s += made_s - begun_s
            n += 1
    return 1e6 * forecasting_s / n, 1e6 * observing_s / n
