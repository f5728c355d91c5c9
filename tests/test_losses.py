"""Why tokens were lost: each has one cause."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.losses import ROUNDING_TOKENS, Left, lost_tokens


def test_a_session_that_is_new_loses_what_no_other_left_there() -> None:
    assert lost_tokens(9_000, 0, 2_000, None, "a", 0) == {"first_turn": 7_000}
    assert lost_tokens(9_000, 0, 9_000, None, "a", 0) == {}


def test_what_was_cached_in_full_is_no_loss_even_if_a_block_is_missing() -> None:
    left = Left(9_000, "a", 0)
    assert lost_tokens(9_500, 9_000, 9_000, left, "a", 0) == {}
    assert lost_tokens(9_500, 9_000, 9_000 - ROUNDING_TOKENS + 1, left, "a", 0) == {}


def test_missing_tokens_were_evicted_moved_or_lost_in_a_restart() -> None:
    left = Left(9_000, "a", 0)
    assert lost_tokens(9_500, 9_000, 1_000, left, "a", 0) == {"evicted": 8_000}
    assert lost_tokens(9_500, 9_000, 1_000, left, "a", 1) == {"pod_restart": 8_000}
    assert lost_tokens(9_500, 9_000, 1_000, left, "b", 1) == {"moved": 8_000}


def test_a_changed_prompt_breaks_what_came_after_the_change() -> None:
    left = Left(9_000, "a", 0)
    assert lost_tokens(4_000, 3_000, 3_000, left, "a", 0) == {"prefix_break": 6_000}
    assert lost_tokens(4_000, 3_000, 0, left, "a", 0) == {"prefix_break": 6_000, "evicted": 3_000}


tokens = st.integers(0, 200_000)


@given(tokens, tokens, tokens, tokens, st.sampled_from("ab"), st.integers(0, 1))
def test_no_token_is_lost_twice(
    prompt: int, same: int, cached: int, before: int, pod: str, epoch: int
) -> None:
    same = min(same, prompt, before)
    cached = min(cached, prompt)
    losses = lost_tokens(prompt, same, cached, Left(before, "a", 0), pod, epoch)
    assert all(tokens > 0 for tokens in losses.values())
    assert sum(losses.values()) <= before
    assert len(losses.keys() & {"evicted", "moved", "pod_restart"}) <= 1
