import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.embedded.prompt import BYTES_PER_TOKEN, block_hashes
from gateway.embedded.scheduler import EngineConfig, Request, Scheduler

BLOCK = 4


def make_scheduler(capacity_blocks: int, max_num_batched_tokens: int = 16) -> Scheduler:
    return Scheduler(
        EngineConfig(
            block_size_tokens=BLOCK,
            kv_capacity_tokens=capacity_blocks * BLOCK,
            max_model_len=capacity_blocks * BLOCK,
            max_num_batched_tokens=max_num_batched_tokens,
        )
    )


def make_request(
    text: bytes, prompt_tokens: int, output_tokens: int, request_id: str = ""
) -> Request:
    data = (text * 4000)[: (prompt_tokens + output_tokens) * BYTES_PER_TOKEN]
    return Request(request_id, prompt_tokens, output_tokens, block_hashes(data, BLOCK), 0.0)


def run(scheduler: Scheduler, horizon_s: float = 0.0) -> float:
    """Step until idle; returns the modelled seconds."""
    now = 0.0
    for _ in range(10_000):
        step = scheduler.schedule(horizon_s)
        if step is None:
            assert not scheduler.has_work
            return now
        now += step.duration_s
        scheduler.complete(step, now)
    raise AssertionError("the scheduler does not come to an end")


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded() -> None:
    scheduler = make_scheduler(20)
    request = make_request(b"a", prompt_tokens=40, output_tokens=3)
    scheduler.add(request)
    chunks = []
    for now in range(5):
        step = scheduler.schedule()
        assert step is not None
        chunks += step.scheduled.values()
        progressed = scheduler.complete(step, float(now))
        assert bool(progressed) == (now >= 2)
    assert chunks == [16, 16, 8, 1, 1]
    assert request.first_token_s == 2.0
    assert not scheduler.has_work
    assert scheduler.pool.usage == 0


def test_it_measures_how_long_requests_wait_and_tokens_take() -> None:
    now = 100.0
    config = EngineConfig(block_size_tokens=4, kv_capacity_tokens=48, max_model_len=48)
    scheduler = Scheduler(config, clock=lambda: now)
    for text in (b"a", b"b"):
        request = make_request(text, 40, 8)
        request.arrival_s = now
        scheduler.add(request)
    while (step := scheduler.schedule(horizon_s=1.0)) is not None:
        now += step.iterations
        scheduler.complete(step, now)
    # Eight steps of a second each; the second waits for the blocks of the first.
    counters = scheduler.counters
    assert sum(counters.first_token_s.counts) == sum(counters.queue_s.counts) == 2
    assert counters.queue_s.sum == 8
    assert counters.first_token_s.sum == 1 + 9
    assert sum(counters.inter_token_s.counts) == counters.inter_token_s.sum == 14


def test_the_next_turn_finds_the_prompt_and_the_answer() -> None:
    scheduler = make_scheduler(50)
    scheduler.add(make_request(b"a", 40, 20))
    run(scheduler)
    second = make_request(b"a", 80, 4)
    scheduler.add(second)
    run(scheduler)
    # 60 tokens are known, the last of them was never computed: 14 whole blocks.
    assert second.num_cached_tokens == 56
    assert scheduler.counters.prefix_cache_queries == 40 + 80
    assert scheduler.counters.prefix_cache_hits == 56


def test_the_last_token_of_a_fully_cached_prompt_is_computed_again() -> None:
    scheduler = make_scheduler(50)
    for _ in range(2):
        request = make_request(b"a", 40, 2)
        scheduler.add(request)
        run(scheduler)
    assert request.num_cached_tokens == 36


def test_requests_wait_for_blocks_in_order_of_arrival() -> None:
    scheduler = make_scheduler(12)
    big, small = make_request(b"a", 40, 4, "big"), make_request(b"b", 40, 4, "second")
    tiny = make_request(b"c", 4, 4, "tiny")
    for request in (big, small, tiny):
        scheduler.add(request)
    step = scheduler.schedule()
    assert step is not None
    assert [r.request_id for r in step.scheduled] == ["big"]
    assert [r.request_id for r in scheduler.waiting] == ["second", "tiny"]
    scheduler.complete(step, 0.0)
    run(scheduler)
    assert big.num_preemptions == small.num_preemptions == 0
    assert scheduler.counters.prompt_tokens == 84


def test_the_youngest_is_preempted_when_blocks_run_out_and_still_finishes() -> None:
    scheduler = make_scheduler(10)
    old, young = make_request(b"a", 16, 20, "old"), make_request(b"b", 16, 20, "young")
    scheduler.add(old)
    scheduler.add(young)
    run(scheduler)
    assert old.num_preemptions == 0
    assert young.num_preemptions >= 1
    assert scheduler.counters.preemptions == young.num_preemptions
    assert old.generated_tokens == young.generated_tokens == 20
    assert scheduler.pool.usage == 0


@pytest.mark.parametrize("when", ["waiting", "running", "mid-step"])
def test_abort_frees_the_blocks_at_once(when: str) -> None:
    scheduler = make_scheduler(20)
    request = make_request(b"a", 40, 10)
    scheduler.add(request)
    step = None
    if when != "waiting":
        step = scheduler.schedule()
        assert step is not None
    if step is not None and when == "running":
        scheduler.complete(step, 0.0)
    scheduler.abort(request)
    scheduler.abort(request)
    assert scheduler.pool.usage == 0
    assert not scheduler.has_work
    assert scheduler.counters.finished["abort"] == 1
    if step is not None and when == "mid-step":
        assert scheduler.complete(step, 1.0) == []


def test_many_decodes_at_once_take_the_time_of_as_many_steps() -> None:
    def seconds(horizon_s: float) -> tuple[float, int]:
        scheduler = make_scheduler(100)
        request = make_request(b"a", 16, 301)
        scheduler.add(request)
        spent, steps = 0.0, 0
        while (step := scheduler.schedule(horizon_s)) is not None:
            steps += 1
            spent += step.duration_s
            scheduler.complete(step, spent)
        assert request.generated_tokens == 301
        assert scheduler.pool.num_cached_blocks == 316 // BLOCK
        return spent, steps

    (single_s, single), (joined_s, joined) = seconds(0.0), seconds(0.1)
    assert joined_s == pytest.approx(single_s, rel=0.01)
    assert joined < single / 5


def test_a_request_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than max_model_len"):
        make_scheduler(10).add(make_request(b"a", 40, 1))
    with pytest.raises(ValueError, match="more than the KV cache holds"):
        EngineConfig(kv_capacity_tokens=100, max_model_len=101)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"a", b"bc", b"def"]),
            st.integers(1, 40),
            st.integers(1, 20),
            st.integers(0, 6),
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([0.0, 0.05]),
    st.data(),
)
def test_any_mix_of_requests_and_aborts_ends_with_every_block_free(
    plans: list[tuple[bytes, int, int, int]], horizon_s: float, data: st.DataObject
) -> None:
    scheduler = make_scheduler(16)
    alive: list[Request] = []
    aborted: list[Request] = []
    for text, prompt_tokens, output_tokens, steps in plans:
        request = make_request(text, prompt_tokens, output_tokens)
        scheduler.add(request)
        alive.append(request)
        for _ in range(steps):
            step = scheduler.schedule(horizon_s)
            if step is None:
                break
            if data.draw(st.integers(0, 5)) == 0:
                victim = data.draw(st.sampled_from(alive))
                if not victim.finished:
                    scheduler.abort(victim)
                    alive.remove(victim)
                    aborted.append(victim)
                    if not alive:
                        break
            scheduler.complete(step, 0.0)
            held = [block for r in scheduler.running for block in r.blocks]
            assert len({b.block_id for b in held}) + scheduler.pool.num_free_blocks == 16
    run(scheduler, horizon_s)
    assert all(request.generated_tokens == request.output_tokens for request in alive)
    assert scheduler.pool.usage == 0
    assert all(block.ref_cnt == 0 for block in scheduler.pool.blocks)
    assert scheduler.counters.finished["abort"] == len(aborted)
