"""The patch on real vLLM pods with a small cache."""

from __future__ import annotations

import httpx
import pytest

from tests.engine_patch import agents

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
Pods = tuple[httpx.Client, httpx.Client, httpx.Client]


def test_hints_save_evictions_and_without_them_a_pod_is_stock(stock_and_patched: Pods) -> None:
    stock, patched, hinted = stock_and_patched
    turns = agents.workload(sessions=12, turns=8, first_tokens=2_000, seed=1)
    stock_result = agents.play(stock, turns, hints=False)
    patched_result = agents.play(patched, turns, hints=False)
    assert patched_result.cached_tokens == stock_result.cached_tokens
    before = agents.evictions(patched)
    hinted_result = agents.play(hinted, turns, hints=True)
    after = agents.evictions(hinted)
    for name, result in (
        ("stock", stock_result),
        ("patched, no hints", patched_result),
        ("patched, hints", hinted_result),
    ):
        print(f"{name:18} cached {result.cached_share:.1%} latency {result.latency_s:.2f} s")
    print(f"evicted blocks {before:.0f} -> {after:.0f}")
    assert after < 0.8 * before
    assert hinted_result.cached_share > stock_result.cached_share
    causes = agents.samples(hinted, "cachewise:evicted_blocks_total")
    assert causes["forecast"] + causes["ended"] > causes["lru"]
