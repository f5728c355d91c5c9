"""Scaling sessions down for the replay on real vLLM, and what is made of its figures."""

from __future__ import annotations

import pytest

from bench.replay import scaled, traces
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
