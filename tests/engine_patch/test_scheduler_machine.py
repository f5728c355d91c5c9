"""vLLM's scheduler under the patch, driven at random: no block is lost, no state stays behind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine_patch.sessions import SessionTable
from tests.engine_patch import agents

schedulers = pytest.importorskip("tests.engine_patch.schedulers")
BLOCK = schedulers.BLOCK

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

SESSIONS = ("a", "b", "c", "d")
sessions = st.sampled_from(SESSIONS)
SHARED = schedulers.prompt("system", 2)


class Scheduler(RuleBasedStateMachine):
    """Turns that grow, fork, are aborted and preempted; hints, resets and sessions forgotten."""

    @initialize(
        num_blocks=st.integers(10, 24),
        max_sessions=st.integers(2, 6),
        async_scheduling=st.booleans(),
        hybrid=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
    )
    def start(
        self,
        num_blocks: int,
        max_sessions: int,
        async_scheduling: bool,
        hybrid: bool,
        policy: str,
    ) -> None:
        self.engine = schedulers.Engine(
            num_blocks * (2 if hybrid else 1),
            specs=[schedulers.full()] + [schedulers.sliding(3 * BLOCK)] * hybrid,
            async_scheduling=async_scheduling,
            policy=policy,
            batch_tokens=48,
            max_seqs=3,
        )
        self.engine.reuse.sessions.max_sessions = max_sessions
        self.longest = (num_blocks - 1) * BLOCK
        self.history: dict[str | None, list[int]] = {}
        self.serial = 0

    @rule(
        session=st.none() | sessions,
        grown=st.integers(1, 6 * BLOCK),
        kept=st.floats(0, 1) | st.just(1.0),
        output_tokens=st.integers(1, 2 * BLOCK),
        priority=st.integers(0, 2),
        hinted=st.booleans(),
    )
    def arrive(
        self,
        session: str | None,
        grown: int,
        kept: float,
        output_tokens: int,
        priority: int,
        hinted: bool,
    ) -> None:
        """A session's next turn begins to wait."""
        hints = self.own_hint(session) if hinted else None
        tokens = self.grow(session, grown, kept, output_tokens)
        self.engine.add(tokens, session, output_tokens, priority=priority, kv_hints=hints)

    @rule(turns=st.lists(st.tuples(sessions, st.integers(BLOCK, 4 * BLOCK)), max_size=6))
    def turns(self, turns: list[tuple[str, int]]) -> None:
        """Turns from arrival to end, each on all that the session said before."""
        for session, grown in turns:
            self.engine.run(self.engine.add(self.grow(session, grown, 1.0, 1), session))

    def grow(self, session: str | None, grown: int, kept: float, output_tokens: int) -> list[int]:
        """The session's history, cut somewhere if it was edited, and more."""
        self.serial += 1
        tokens = self.history.get(session, SHARED)
        tokens = tokens[: int(len(tokens) * kept)]
        tokens = tokens + [10**9 + self.serial * 1000 + i for i in range(grown)]
        tokens = tokens[: self.longest - output_tokens]
        self.history[session] = tokens
        return tokens

    @staticmethod
    def own_hint(session: str | None) -> Any:
        from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

        sent = agents.reuse(session or "a", 2.0)
        return KvHintsEnvelope(
            sent["protocol_version"],
            sent["message_id"],
            [KvHintAction(**action) for action in sent["actions"]],
        )

    @rule(steps=st.integers(1, 16), seconds=st.floats(0, 1))
    def steps(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.engine.now += seconds
            self.engine.step()
            self.engine.check()

    @precondition(lambda self: self.engine.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        requests = list(self.engine.scheduler.requests.values())
        self.engine.abort(data.draw(st.sampled_from(requests)))

    @rule(session=sessions, gap_s=st.none() | st.floats(0.1, 1_000))
    def hint(self, session: str, gap_s: float | None) -> None:
        assert self.engine.hint(session, gap_s) in ("applied", "rejected")

    @rule(session=sessions, priority=st.integers(0, 100), duration_s=st.floats(0.1, 100))
    def retain(self, session: str, priority: int, duration_s: float) -> None:
        assert self.engine.retain(session, priority, duration_s) == "applied"

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(data=st.data(), kept=st.integers(0, 8))
    def invalidate(self, data: st.DataObject, kept: int) -> None:
        """What vLLM does to a request's blocks whose load by a connector failed."""
        request = data.draw(st.sampled_from(self.engine.scheduler.running))
        manager = self.engine.scheduler.kv_cache_manager
        for ids in manager.get_block_ids(request.request_id):
            manager.evict_blocks(set(ids[kept:]))

    @rule(running=st.booleans(), really=st.integers(0, 3))
    def reset(self, running: bool, really: int) -> None:
        if really:
            return
        free = not self.engine.scheduler.running
        done = self.engine.scheduler.reset_prefix_cache(reset_running_requests=running)
        if done:
            assert not list(self.engine.pool.free_block_queue.groups())
        assert done or not (free or running) or self.engine.scheduler.kv_holding_waiting

    @rule(seconds=st.floats(0, 20) | st.floats(0, 2_000))
    def wait(self, seconds: float) -> None:
        self.engine.now += seconds

    @rule()
    def ask(self) -> None:
        for operation in ("capabilities", "sessions", "metrics"):
            json.loads(self.engine.scheduler.cachewise(operation, ""))

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        table: SessionTable = self.engine.reuse.sessions
        assert len(table) <= table.max_sessions
        self.engine.run()  # nothing hangs
        self.engine.check_nothing_outlives_its_session()


TestScheduler = Scheduler.TestCase
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
