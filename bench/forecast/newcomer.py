"""A tool never seen before: how soon is it forecast as well as it can be?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gateway.dialects.turn import ToolCall
from gateway.predictor import Context, Predictor
from gateway.predictor.train import Recorded

SEEN = 200
JUDGED = 300
LEVELS = np.linspace(0.05, 0.95, 19)


def tools(sessions: list[Recorded]) -> dict[str, NDArray[np.float64]]:
    """Times to play a new tool's: made-up ones, and those of real tools under a name that tells
    nothing, shuffled."""
    rng = np.random.default_rng(5)
    n = SEEN + JUDGED
    found = {
        "steady 7 s": 7 * 10 ** rng.normal(0, 0.1, n),
        "log-normal 40 s": 40 * 10 ** rng.normal(0, 0.4, n),
        "fast or slow": np.where(rng.random(n) < 0.6, 0.1, 90) * 10 ** rng.normal(0, 0.15, n),
        "heavy tail": 0.5 / rng.random(n) ** 1.2,
    }
    times: dict[str, list[float]] = {}
    for session in sessions:
        for turn in session.turns:
            for call, duration_s in zip(turn.calls, turn.durations_s, strict=True):
                times.setdefault(call.name, []).append(duration_s)
    for name, real in times.items():
        if len(real) >= n:
            found[f"as {name}"] = rng.permutation(np.maximum(real, 1e-3))[:n]
    return found


def pinball(quantiles: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    """Mean quantile loss of log10 s over `LEVELS`: half the CRPS, proper for the whole curve."""
    miss = actual[:, None] - quantiles
    return float(np.maximum(LEVELS * miss, (LEVELS - 1) * miss).mean())


def learn(predictor: Predictor, times_s: NDArray[np.float64], name: str) -> dict[str, float]:
    """Loss after `SEEN` gaps of the tool, over that of the best curve that does not change."""
    quantiles = []
    for number, gap_s in enumerate(times_s):
        call = ToolCall.of("", name, f'{{"number": {number}}}')
        context = Context(f"new {name} {number // 20}", "new", "other")
        forecast = predictor.forecast([call], "tool", context)
        if number >= SEEN:
            quantiles.append([np.log10(forecast.quantile(float(q))) for q in LEVELS])
        predictor.observe(forecast, float(gap_s))
    actual = np.log10(times_s[SEEN:])
    best = np.quantile(actual, LEVELS)
    loss = pinball(np.array(quantiles), actual)
    optimum = pinball(np.tile(best, (len(actual), 1)), actual)
    return {"loss": loss, "optimum": optimum, "ratio": loss / optimum}
