from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_patch.forecast import Forecast, recompute_cost


@st.composite
def forecasts(draw: st.DrawFn) -> Forecast:
    times = sorted(draw(st.lists(st.floats(0.01, 5_000), min_size=1, max_size=32, unique=True)))
    falls = sorted(
        draw(st.lists(st.floats(0.02, 1), min_size=len(times), max_size=len(times))), reverse=True
    )
    return Forecast(tuple(zip(times, falls, strict=True)), draw(st.floats(0, 1)))


def with_return(forecast: Forecast, p_return: float) -> Forecast:
    curve = list(zip(forecast._times_s, forecast._survival, strict=True))
    return Forecast(curve, p_return)


def step(gap_s: float, p_return: float = 1.0) -> Forecast:
    return Forecast(((gap_s, 1.0), (gap_s + 0.001, 0.0)), p_return)


@given(st.floats(1, 1_000), st.floats(0, 0.98))
def test_a_known_gap_is_worth_one_over_the_time_left(gap_s: float, waited: float) -> None:
    rate = step(gap_s).reuse_rate(waited * gap_s)
    assert rate == pytest.approx(1 / (gap_s * (1 - waited)), rel=0.08)


@given(forecasts(), st.floats(0, 10_000))
def test_the_rate_is_finite_and_not_negative(forecast: Forecast, elapsed_s: float) -> None:
    rate = forecast.reuse_rate(elapsed_s)
    assert math.isfinite(rate)
    assert rate >= 0


@given(forecasts(), st.floats(0, 10_000))
def test_a_likelier_return_is_never_worth_less(forecast: Forecast, elapsed_s: float) -> None:
    likelier = with_return(forecast, min(1.0, forecast.p_return + 0.1))
    assert likelier.reuse_rate(elapsed_s) >= forecast.reuse_rate(elapsed_s) * (1 - 1e-9)


@given(forecasts(), st.floats(1, 100))
def test_beyond_the_curve_a_session_ages_like_lru(forecast: Forecast, factor: float) -> None:
    late = forecast.last_s * factor
    sure = with_return(forecast, 1.0)
    assert sure.reuse_rate(late) == pytest.approx(1 / late)


@given(forecasts(), st.integers(0, 31), st.sampled_from([-1, 0, 1]))
def test_the_very_moment_of_a_point_is_no_exception(f: Forecast, i: int, side: int) -> None:
    at = f._times_s[min(i, len(f._times_s) - 1)]
    rate = f.reuse_rate(math.nextafter(at, math.inf * side) if side else at)
    assert 0 <= rate < 1e6


def test_points_at_one_moment_are_one_point() -> None:
    t = 0.01
    twin = Forecast(((t, 0.9), (math.nextafter(t, 1), 0.5), (9.0, 0.1)), 1.0)
    assert twin.reuse_rate(t / 2) == pytest.approx(
        Forecast(((t, 0.5), (9.0, 0.1)), 1.0).reuse_rate(t / 2)
    )


def test_a_session_that_never_returns_is_worth_nothing() -> None:
    assert step(5, p_return=0).reuse_rate(1) == 0


def test_a_slow_tail_does_not_hide_a_quick_return() -> None:
    mixed = Forecast(((2.0, 0.1), (600.0, 0.05)), 0.9)
    assert mixed.reuse_rate(0) > 0.3  # 80 % are back within two seconds
    assert mixed.reuse_rate(10) < 0.02  # not back by then: it is one of the slow ones


def test_waiting_conditions_the_forecast() -> None:
    tool = step(10)
    assert tool.reuse_rate(8) > tool.reuse_rate(1)


@settings(max_examples=300, deadline=None)
@given(forecasts(), st.floats(0.01, 5_000))
def test_the_rate_is_the_best_over_all_horizons(forecast: Forecast, elapsed_s: float) -> None:
    """Against a plain numeric integral over a fine grid of horizons."""
    r = forecast.p_return
    start = r * forecast.survival_at(elapsed_s) + 1 - r
    horizon = max(forecast.last_s, elapsed_s) * 20
    best, kept, t = 0.0, 0.0, elapsed_s
    for k in range(1, 300):
        t_next = elapsed_s * (horizon / elapsed_s) ** (k / 300)
        absent = r * forecast.survival_at((t + t_next) / 2) + 1 - r
        kept += absent * (t_next - t)
        t = t_next
        gain = start - (r * forecast.survival_at(t) + 1 - r)
        best = max(best, gain / kept)
    if best * horizon > 1e-3:
        assert forecast.reuse_rate(elapsed_s) >= best * 0.85


def test_later_tokens_cost_more_to_recompute() -> None:
    assert recompute_cost(0, 30_000) == 1
    assert recompute_cost(30_000, 30_000) == 2


def test_what_is_left_below_the_tails_share_is_the_tails() -> None:
    """A curve that goes on below 1 % has no cliff there: it ends where it reaches 1 %."""
    rates = [
        Forecast([(10.0, 0.02), (100.0, 0.01), (150.0, 0.005), (300.0, 0.0)], 1.0).reuse_rate(t)
        for t in (101.0, 110.0, 140.0, 160.0, 250.0)
    ]
    assert rates == [
        pytest.approx(Forecast([(10.0, 0.02), (100.0, 0.01)], 1.0).reuse_rate(t))
        for t in (101.0, 110.0, 140.0, 160.0, 250.0)
    ]
