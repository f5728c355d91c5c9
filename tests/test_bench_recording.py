from bench.overhead.load import WORKLOADS
from bench.recording.__main__ import COUNTED, EVERY, row


def test_every_workload_of_the_overhead_is_measured() -> None:
    assert set(COUNTED) == set(EVERY) == {workload.name for workload in WORKLOADS}


def test_the_ratio_is_the_median_of_pairs_within_its_interval() -> None:
    pairs = [(1.0 + 0.1 * k, 1.02 * (1.0 + 0.1 * k)) for k in range(20)]
    found = row([*pairs, (1.0, 9.0)])
    assert abs(found["ratio"] - 1.02) < 1e-9
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"] < 1.03
