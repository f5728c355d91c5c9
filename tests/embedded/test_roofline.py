import pytest

from gateway.embedded.roofline import HardwareModel, prefill_flops, step_time_s

H200X2 = HardwareModel()


def test_a_decode_step_is_bound_by_reading_weights_and_kv() -> None:
    weights_s = 65e9 / (2 * 4.8e12 * 0.7)
    kv_s = 100_000 * 262_144 / (2 * 4.8e12 * 0.7)
    assert step_time_s(H200X2, [], 0, 1) == pytest.approx(weights_s + 0.002)
    assert step_time_s(H200X2, [], 100_000, 8) == pytest.approx(weights_s + kv_s + 0.002)


def test_a_prefill_step_is_bound_by_arithmetic_and_an_empty_one_by_overhead() -> None:
    flops = 2 * 32.5e9 * 2048 + 4 * 64 * 5120 * (2048 * 1000 + 2048**2 / 2)
    assert step_time_s(H200X2, [(1000, 2048)], 0, 0) == pytest.approx(flops / 990e12 + 0.002)
    assert step_time_s(H200X2, [], 0, 0) == 0.002


def test_prefill_in_chunks_costs_the_same_arithmetic_as_at_once() -> None:
    chunks = sum(prefill_flops(H200X2, start, 500) for start in range(0, 5000, 500))
    assert chunks == pytest.approx(prefill_flops(H200X2, 0, 5000))
