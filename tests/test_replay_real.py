"""Scaling sessions down for the replay on real vLLM, and what is made of its figures."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from bench.replay import real, scaled, traces
from bench.replay.sample import SAMPLE
from bench.replay.scaled import ANSWER_TOKENS, MIN_ADDED_TOKENS, ScaledTurn
from bench.replay.traces import Turn


def turn(blocks: int, gap_s: float = 0.0, first: int = 0, tool: bool = True) -> Turn:
    return Turn(tuple(range(first, first + blocks)), 100, gap_s, "tool" if tool else "human")


def test_prompts_and_gaps_are_divided_and_the_last_turn_answers() -> None:
    session = [turn(100, gap_s=50), turn(120, gap_s=20), turn(200, gap_s=3), turn(300)]
    assert scaled.scale(session, tokens_by=16, gaps_by=10, turns=3) == [
        ScaledTurn(400, 0.0, calls_tool=True),
        ScaledTurn(480 - 400 - ANSWER_TOKENS, 2.0, calls_tool=True),
        ScaledTurn(800 - 480 - ANSWER_TOKENS, 0.3, calls_tool=False),
    ]


def test_a_prompt_that_hardly_grows_still_gets_something_new() -> None:
    added = [t.added_tokens for t in scaled.scale([turn(100), turn(101)], 64, 1, 8)]
    assert added == [100, MIN_ADDED_TOKENS]


def test_a_session_ends_where_its_prompt_is_no_longer_extended() -> None:
    session = [turn(100), turn(120), turn(130, first=1), turn(140)]
    short = scaled.scale(session, 16, 1, 8)
    assert [t.calls_tool for t in short] == [True, False]


def test_the_cache_is_a_share_of_the_working_set_and_holds_the_longest_session() -> None:
    sessions = [scaled.scale(s, 20, 10, 8) for s in traces.load([SAMPLE])[:16]]
    kv_tokens = scaled.kv_tokens(sessions, pods=2, working_sets=2.5, block_tokens=32)
    needed = sum(map(scaled.final_tokens, sessions))
    assert kv_tokens % 32 == 0
    assert 2 * kv_tokens * 2.5 == pytest.approx(needed, rel=0.02)
    alone = scaled.kv_tokens(sessions[:1], pods=1, working_sets=2.5, block_tokens=32)
    assert alone > scaled.final_tokens(sessions[0])


def test_filler_is_the_same_for_a_seed_and_unlike_for_another() -> None:
    words = scaled.one_token_words(["Ġthe", "Ġof", "Ġtests", "tests", "Ġ{", "Ġré"])
    assert words == ["tests", "the"]
    assert len(scaled.filler(words, 50, "a").split()) == 50
    assert scaled.filler(words, 50, "a") == scaled.filler(words, 50, "a")
    assert scaled.filler(words, 50, "a") != scaled.filler(words, 50, "b")


def seen(latency_s: float, prompt_tokens: int = 100, cached_tokens: int = 0) -> real.TurnSeen:
    return real.TurnSeen(0, latency_s, latency_s / 2, prompt_tokens, cached_tokens, 10, True)


def row(policy: str, latencies_s: list[float]) -> real.Row:
    more = {"routing": "round_robin", "admission": "off", "patched": False, "makespan_s": 9.0}
    loads = {"machine_load_before": (1.0, 0.0, 0.0), "machine_load_after": (2.0, 0.0, 0.0)}
    found = real.figures([seen(latency_s) for latency_s in latencies_s])
    return {"policy": policy, "holds": 0, "held_s": 0.0} | more | found | loads


def test_session_time_is_the_sum_of_latencies_and_cached_tokens_are_weighed_by_length() -> None:
    found = real.figures([seen(1.0, 100, 0), seen(3.0, 300, 200)])
    assert (found["session_s"], found["p50_s"], found["cached_share"]) == (4.0, 2.0, 0.5)
    assert (found["turns"], found["tool_calls"], found["first_token_p50_s"]) == (2, 2, 1.0)


def test_each_policy_is_compared_with_stock_whatever_the_order() -> None:
    rows = [row("cachewise", [1.0, 1.0]), row("stock", [2.0, 3.0])]
    real.compare(rows)
    assert [each["ratio"] for each in rows] == [2.5, 1.0]
    alone = [row("cachewise", [1.0, 1.0])]
    real.compare(alone)
    assert "ratio" not in alone[0]
    output = StringIO()
    Console(file=output, width=200).print(real.table([*rows, *alone], "a load"))
    assert "2 (2.50x)" in output.getvalue()
    assert "1.0 → 2.0" in output.getvalue()


def test_holds_are_counted_over_how_they_ended() -> None:
    metrics = """\
# TYPE cachewise_hold_seconds histogram
cachewise_hold_seconds_bucket{hold_end="released",le="+Inf"} 3
cachewise_hold_seconds_count{hold_end="released"} 3
cachewise_hold_seconds_sum{hold_end="released"} 12.5
cachewise_hold_seconds_count{hold_end="too_long"} 1
cachewise_hold_seconds_sum{hold_end="too_long"} 2
# TYPE cachewise_turns counter
cachewise_turns_total 7
"""
    assert real._holds(metrics) == (4, 14.5)


def test_a_tool_call_is_written_in_long_pieces_and_blanks_are_left_out() -> None:
    vocabulary = {"<|im_end|>": 0, "c": 1, "command": 2, "Ġ": 3, "Ċ": 4, 'Ġ"': 5, "zebra": 6}
    bias = real.Language.of(vocabulary).tool_call_bias
    assert bias["2"] > bias["5"] > bias["1"] > 0 > bias["3"] == bias["4"]
    assert "6" not in bias


def test_only_the_patched_contender_starts_vllm_with_the_patch() -> None:
    for patched in (False, True):
        flags = real._pod_flags(3_200, patched)
        assert ("--scheduler-cls" in flags, "--middleware" in flags) == (patched, patched)
        assert flags[flags.index("--num-gpu-blocks-override") + 1] == "100"
