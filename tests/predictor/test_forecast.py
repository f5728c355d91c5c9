"""A forecast's curve, and what is read off it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.predictor.forecast import HORIZON_S, Forecast
from gateway.predictor.grid import BINS, EDGES, EDGES_S, bin_of, log_s
from gateway.predictor.warp import BINS as WARP_BINS
from gateway.predictor.warp import Warp, calibrated, stated

weights = st.lists(st.floats(0, 1), min_size=BINS, max_size=BINS).filter(lambda w: sum(w) > 0.01)
warps = st.lists(st.floats(0, 1000), min_size=WARP_BINS, max_size=WARP_BINS)
elapsed = st.floats(0, 1e6)
relaxed = settings(deadline=None, max_examples=60)


def forecast_of(w: list[float], p_return: float = 0.9, warp: list[float] | None = None) -> Forecast:
    masses = np.array(w, np.float32)
    curve = Warp(warp).curve if warp is not None else None
    return Forecast(masses / masses.sum(), p_return, "tool", warp=curve)


@relaxed
@given(weights, st.none() | warps, st.lists(st.floats(0, 1e7), min_size=2, max_size=20))
def test_survival_falls_from_one_and_never_to_nothing(
    w: list[float], warp: list[float] | None, times: list[float]
) -> None:
    forecast = forecast_of(w, warp=warp)
    falling = [forecast.survival(t) for t in sorted(times)]
    assert forecast.survival(0) == 1
    assert all(0 < p <= 1 for p in falling)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(falling))


@relaxed
@given(weights, st.none() | warps, st.floats(0.01, 0.99), elapsed)
def test_a_quantile_is_where_the_curve_passes(
    w: list[float], warp: list[float] | None, p: float, waited: float
) -> None:
    forecast = forecast_of(w, warp=warp)
    remains = forecast.quantile(p, waited)
    assert forecast.survival_given(waited + 1.01 * remains + 1e-6, waited) <= 1 - p + 5e-3
    assert forecast.survival_given(waited + 0.99 * remains - 1e-6, waited) >= 1 - p - 5e-3


@relaxed
@given(weights, elapsed)
def test_what_is_expected_is_the_area_under_the_curve(w: list[float], waited: float) -> None:
    forecast = forecast_of(w)
    found = forecast.expected_remaining(waited)
    assert 0 < found <= HORIZON_S * 1.001
    t = waited + np.concatenate([[0], np.geomspace(1e-4, HORIZON_S, 1000)])
    s = np.array([forecast.survival_given(float(each), waited) for each in t])
    area = float(((s[1:] + s[:-1]) / 2 * np.diff(t)).sum())
    assert found == pytest.approx(area, rel=0.2, abs=0.1)


@relaxed
@given(weights, elapsed, st.lists(st.floats(0, 1e6), min_size=2, max_size=9))
def test_a_wait_conditioned_on_its_age_is_a_survival_curve_too(
    w: list[float], waited: float, more: list[float]
) -> None:
    forecast = forecast_of(w)
    falling = [forecast.survival_given(waited + each, waited) for each in [0.0, *sorted(more)]]
    assert falling[0] == pytest.approx(1)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(falling))
    assert forecast.survival_given(3.0, 0.0) == pytest.approx(forecast.survival(3.0))


def test_the_longer_an_unlikely_wait_has_lasted_the_longer_it_will() -> None:
    w = [0.0] * BINS
    w[bin_of(0.0)] = 1
    forecast = forecast_of(w)
    medians = [forecast.quantile(0.5, waited) for waited in (10.0, 100.0, 1000.0, 10_000.0)]
    assert medians == sorted(medians)


@relaxed
@given(weights, st.floats(0.01, 1), elapsed, elapsed)
def test_the_longer_the_wait_the_less_likely_the_return(
    w: list[float], p_return: float, one: float, other: float
) -> None:
    forecast = forecast_of(w, p_return)
    sooner, later = sorted((one, other))
    assert forecast.p_return_given(0) == pytest.approx(p_return)
    assert forecast.p_return_given(later) <= forecast.p_return_given(sooner) + 1e-9


@relaxed
@given(weights, st.none() | warps, st.integers(2, 32))
def test_a_curve_is_what_a_hint_takes(
    w: list[float], warp: list[float] | None, max_points: int
) -> None:
    points = forecast_of(w, warp=warp).curve(max_points)
    assert 1 <= len(points) <= max_points
    assert all(b[0] > a[0] and b[1] < a[1] for a, b in itertools.pairwise(points))
    assert all(0 <= p <= 1 and t >= 0 for t, p in points)


def test_a_clients_own_time_shifts_the_curve() -> None:
    w = [0.0] * BINS
    w[bin_of(0.0)] = 1
    forecast = forecast_of(w)
    shifted = Forecast(forecast.masses, 1, "tool", offset_s=0.5)
    assert shifted.survival(0.4) == 1
    assert shifted.median_s == pytest.approx(forecast.median_s + 0.5)


def test_bins_cover_all_times() -> None:
    assert len(EDGES_S) == BINS + 1 == len(EDGES)
    assert [bin_of(log_s(t)) for t in (0, 1e-9, 1e-3)] == [0, 0, 0]
    assert bin_of(log_s(1e12)) == BINS - 1
    for i, (low, high) in enumerate(itertools.pairwise(EDGES)):
        assert bin_of((low + high) / 2) == i


def test_calibration_makes_stated_quantiles_true_ones() -> None:
    rng = np.random.default_rng(1)
    warp = Warp()
    for reached in rng.beta(3, 3, 4000):  # forecasts that were too wide
        warp.add(float(reached))
    again = np.array([calibrated(warp.curve, float(u)) for u in rng.beta(3, 3, 4000)])
    for width in (0.5, 0.8, 0.95):
        assert (np.abs(again - 0.5) <= width / 2).mean() == pytest.approx(width, abs=0.02)


@relaxed
@given(warps, st.floats(0, 1))
def test_calibration_can_be_undone(counts: list[float], p: float) -> None:
    curve = Warp(counts).curve
    assert calibrated(curve, stated(curve, p)) == pytest.approx(p, abs=1e-6)
    assert math.isclose(curve[-1], 1)
