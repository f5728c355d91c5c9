"""vLLM's features on the patched scheduler, with live hints: they work, and leave nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine_patch.hints import parse
from tests.engine_patch import agents

schedulers = pytest.importorskip("tests.engine_patch.schedulers")
torch = pytest.importorskip("torch")
Engine, BLOCK, prompt = schedulers.Engine, schedulers.BLOCK, schedulers.prompt

pytestmark = pytest.mark.engine


def lora(name: str, number: int) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, f"/adapters/{name}")


GAP_S = 10.0


def fill(engine: Any, requests: int = 12) -> None:
    """Traffic of no session, 4 blocks a request, in a bit less than `GAP_S`."""
    for i in range(requests):
        engine.now += 0.95 * GAP_S / requests
        engine.turn(prompt(f"x{i}@{engine.now:.1f}", 4))


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_hinted_session_outlives_traffic_that_evicts_it_without_a_hint(
    async_scheduling: bool,
) -> None:
    for hinted in (False, True):
        engine = Engine(41, async_scheduling=async_scheduling)
        engine.turn(prompt("a", 10), "a")
        if hinted:
            assert engine.hint("a", GAP_S) == "applied"
        fill(engine)
        cached = engine.turn([*prompt("a", 10), 1], "a")
        assert cached == (10 * BLOCK if hinted else 0)
        engine.check_nothing_outlives_its_session()


def test_a_session_that_has_ended_goes_before_all_others() -> None:
    engine = Engine(41)
    engine.turn(prompt("b", 10), "b")
    engine.turn(prompt("a", 10), "a")
    assert engine.hint("a", None) == "applied"
    fill(engine, 7)  # 20 blocks are free, 8 are of one of the two
    assert engine.resident("b") == 10
    assert engine.resident("a") < 10
    engine.check_nothing_outlives_its_session()


def test_loras_do_not_share_a_prompts_blocks_and_each_takes_hints() -> None:
    engine = Engine(81, lora=True)
    tokens = prompt("same", 10)
    assert engine.turn(tokens, "a", lora_request=lora("one", 1)) == 0
    assert engine.turn(tokens, "b", lora_request=lora("two", 2)) == 0
    assert engine.turn(tokens, "c") == 0
    assert engine.turn([*tokens, 1], "d", lora_request=lora("one", 1)) == 10 * BLOCK
    engine.abort()
    assert engine.hint("a", GAP_S) == engine.hint("d", GAP_S) == "applied"
    fill(engine, 20)
    assert engine.turn([*tokens, 2], "d", lora_request=lora("one", 1)) == 10 * BLOCK
    assert engine.turn([*tokens, 2], "b", lora_request=lora("two", 2)) == 0
    engine.check_nothing_outlives_its_session()


def test_two_running_loras_keep_a_third_waiting_and_the_order_lets_it_in() -> None:
    engine = Engine(81, lora=True)
    running = [
        engine.add(prompt(n, 2), n, 8, lora_request=lora(n, i)) for i, n in enumerate("ab", 1)
    ]
    engine.step()
    engine.hint("c", GAP_S)
    third = engine.add(prompt("c", 2), "c", 1, lora_request=lora("c", 3))
    engine.step()
    assert third.num_computed_tokens == 0
    engine.run(*running, third)
    engine.check_nothing_outlives_its_session()


@pytest.mark.parametrize("first", ["full", "sliding"])
def test_a_hybrid_model_keeps_a_hinted_sessions_blocks_of_every_group(first: str) -> None:
    specs = [schedulers.full(), schedulers.sliding(4 * BLOCK)]
    for hinted in (False, True):
        engine = Engine(81, specs=specs if first == "full" else specs[::-1])
        engine.turn(prompt("a", 12), "a")
        owned = engine.resident("a")
        assert owned > 12  # a window's blocks too
        if hinted:
            assert engine.hint("a", GAP_S) == "applied"
        fill(engine)
        assert engine.turn([*prompt("a", 12), 1], "a") == (12 * BLOCK if hinted else 0)
        engine.check_nothing_outlives_its_session()


def test_a_connectors_hit_is_loaded_for_a_hinted_session(tmp_path: Path) -> None:
    engine = Engine(41, connector=("ExampleConnector", {"shared_storage_path": str(tmp_path)}))
    assert engine.reuse is not None
    tokens = [*prompt("a", 10), 1, 2]
    stored = torch.tensor(tokens[: 10 * BLOCK])
    engine.scheduler.connector._generate_foldername_debug(stored, [], create_folder=True)
    request = engine.add(tokens, "a")
    engine.run(request)
    assert engine.cached_tokens[request.request_id] == 10 * BLOCK  # all from the connector
    engine.hint("a", GAP_S)
    fill(engine)
    assert engine.resident("a") == 10
    assert engine.turn([*prompt("a", 10), 2, 3], "a") == 10 * BLOCK
    engine.check_nothing_outlives_its_session()


def test_a_connector_that_walks_the_free_queue_gets_stocks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "vllm.engine_patch"):
        engine = Engine(41, connector=("SimpleCPUOffloadConnector", {"cpu_bytes_to_use": 1 << 20}))
    assert engine.reuse is None
    assert "SimpleCPUOffloadConnector" in caplog.text
    assert type(engine.pool.free_block_queue).__name__ == "FreeKVCacheBlockQueue"
    for operation in ("hints", "capabilities", "sessions", "metrics"):
        assert json.loads(engine.scheduler.cachewise(operation, "{}")) == {"active": False}
    assert engine.turn(prompt("a", 10), "a") == 0
    assert engine.turn([*prompt("a", 10), 1], "a") == 10 * BLOCK


def test_priorities_rule_the_waiting_order_and_hints_the_eviction() -> None:
    engine = Engine(41, policy="priority", max_seqs=1)
    engine.turn(prompt("a", 10), "a")
    engine.hint("a", 500.0)
    first = engine.add(prompt("b", 4), "b", 4, priority=0)
    engine.step()
    resident = engine.add([*prompt("a", 10), 1], "a", 1, priority=5)
    urgent = engine.add(prompt("c", 8), "c", 1, priority=1)
    engine.run(first)
    engine.run(urgent)
    assert not resident.is_finished()  # though it needs fewer blocks
    engine.run(resident)
    assert engine.cached_tokens[resident.request_id] == 10 * BLOCK
    assert not json.loads(engine.scheduler.cachewise("capabilities", ""))["waiting_order"]
    engine.check_nothing_outlives_its_session()


@pytest.mark.parametrize("short", [True, False])
def test_the_request_that_needs_fewest_blocks_goes_first_where_not_all_that_wait_fit(
    short: bool,
) -> None:
    engine = Engine(21 if short else 41, max_seqs=1)
    engine.turn(prompt("a", 10), "a")
    engine.hint("a", 500.0)
    first = engine.add(prompt("b", 4), "b", 4)
    engine.step()
    large = engine.add(prompt("c", 8), "c")
    resident = engine.add([*prompt("a", 10), 1], "a")
    engine.run(first)
    engine.run(resident)
    assert large.is_finished() is not short
    engine.run(large)
    engine.check_nothing_outlives_its_session()


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_preemption_under_a_tiny_pool_ends_all_and_keeps_the_books(
    policy: str, async_scheduling: bool
) -> None:
    engine = Engine(13, policy=policy, async_scheduling=async_scheduling)
    for name in "abc":
        engine.hint(name, 5.0)
    requests = [engine.add(prompt(n, 3), n, 12, priority=i) for i, n in enumerate("abc")]
    engine.run(*requests)
    assert sum(r.num_preemptions for r in requests) > 0
    assert {r.num_output_tokens for r in requests} == {12}
    engine.check_nothing_outlives_its_session()


def test_a_prefix_cache_reset_leaves_no_block_to_a_session_and_hints_work_on() -> None:
    engine = Engine(41)
    engine.turn(prompt("a", 10), "a")
    engine.hint("a", GAP_S)
    busy = engine.add(prompt("b", 4), "b", 20)
    engine.step()
    assert not engine.scheduler.reset_prefix_cache()  # b runs: vLLM refuses
    assert engine.resident("a") == 10
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.check()
    assert engine.resident("a") == engine.resident("b") == 0
    engine.run(busy)
    assert engine.turn([*prompt("a", 10), 1], "a") == 0
    engine.hint("a", GAP_S)
    fill(engine, 10)
    assert engine.turn([*prompt("a", 10), 2], "a") == 10 * BLOCK
    engine.check_nothing_outlives_its_session()


def test_what_sleep_asks_of_the_scheduler_ends_all_and_waking_finds_it_whole() -> None:
    from vllm.v1.core.sched.interface import PauseState

    engine = Engine(41)
    engine.turn(prompt("a", 10), "a")
    engine.hint("a", GAP_S)
    running, waiting = (engine.add(prompt(n, 20), n, 20) for n in "bc")
    engine.step()
    # EngineCore.sleep(1 or 2): pause_scheduler("abort", clear_cache=True), then the weights.
    engine.abort(*engine.scheduler.requests.values())
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    assert running.is_finished()
    assert waiting.is_finished()
    engine.check()
    assert not list(engine.pool.free_block_queue.groups())
    asleep = engine.add(prompt("d", 4), "d")
    engine.step()
    assert not asleep.is_finished()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run(asleep)
    assert engine.turn([*prompt("a", 10), 1], "a") == 0
    engine.check_nothing_outlives_its_session()


def test_hints_in_a_request_are_for_its_session_and_malformed_ones_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

    def hints(priority: int) -> Any:
        directives = [{"start": 0, "end": None, "priority": priority, "duration": 60.0}]
        action = KvHintAction("1", "kv.retain", "1.0", {"scope": None, "directives": directives})
        return KvHintsEnvelope("0.1", f"m{priority}", [action])

    engine = Engine(41)
    engine.turn(prompt("a", 10), "a", kv_hints=hints(100))
    with caplog.at_level(logging.WARNING, "vllm.engine_patch"):
        engine.turn(prompt("b", 10), "b", kv_hints=hints(101))
    assert "priority" in caplog.text
    fill(engine)
    assert engine.resident("a") == 10
    assert engine.resident("b") == 0
    engine.check_nothing_outlives_its_session()


def test_the_oldest_session_is_forgotten_with_its_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEWISE_MAX_SESSIONS", "3")
    engine = Engine(81)
    for i in range(8):
        engine.turn(prompt(f"s{i}", 4), f"s{i}")
        engine.hint(f"s{i}", GAP_S)
        engine.check()
    assert [engine.resident(f"s{i}") for i in range(8)] == [0] * 5 + [4] * 3
    engine.check_nothing_outlives_its_session()


def test_an_aborted_wait_and_an_aborted_run_leave_nothing() -> None:
    engine = Engine(41, max_seqs=1)
    engine.hint("a", GAP_S)
    running, waiting = (engine.add(prompt(n, 8), n, 50) for n in "ab")
    engine.step()
    engine.abort(waiting)
    engine.step()
    engine.abort(running)
    engine.check()
    assert {s.open_turns for s in engine.reuse.sessions} == {0}
    assert len(engine.reuse.order) == 0
    engine.check_nothing_outlives_its_session()


def test_messages_remembered_for_idempotence_are_bounded() -> None:
    engine = Engine(41)
    for i in range(5_000):
        envelope, actions = parse(agents.reuse(f"s{i % 10}", GAP_S))
        engine.reuse.hints.apply(envelope, actions, engine.now)
    assert len(engine.reuse.hints._answered) == 4_096
    engine.check_nothing_outlives_its_session()
