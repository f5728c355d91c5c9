"""The flow of a turn: what is counted in is counted out, and pods are learned from."""

from __future__ import annotations

import pytest

from gateway import hints
from gateway.admission import Admission
from gateway.conductor import Conductor
from tests.test_admission import CAPACITY, Soon, ask, ended, pod


def conductor() -> Conductor:
    return Conductor(Admission(lambda ticket: None))


def test_a_turn_is_counted_in_and_out_and_teaches() -> None:
    flow, home = conductor(), pod()
    ticket = flow.arrive(ask("s", 20_000), [home], 0.0)
    run = flow.start(ticket, 0.0)
    assert (home.in_flight, home.queued_prefill_tokens) == (1, 20_000)
    flow.first_token(run, 2.0)
    assert home.queued_prefill_tokens == 0
    before = home.rate.tokens
    assert flow.end(run, 5.0, ended(20_000, cached_tokens=0)) == {"first_turn": 20_000}
    assert home.in_flight == 0
    assert home.rate.tokens == pytest.approx(0.9 * before + 20_000)
    assert home.residency.tokens("s") == 20_000


def test_a_turn_that_was_not_answered_leaves_nothing() -> None:
    flow, home = conductor(), pod()
    run = flow.start(flow.arrive(ask("s", 20_000), [home], 0.0), 0.0)
    assert flow.end(run, 1.0, None) == {}
    assert (home.in_flight, home.queued_prefill_tokens) == (0, 0)
    assert home.residency.tokens("s") == 0


def test_losses_have_their_cause() -> None:
    flow, a, b = conductor(), pod("a"), pod("b")

    def turn(where: object, cached_tokens: int, now: float) -> dict[str, int]:
        wanted = ask("s", 20_000, same_tokens=19_000, home="a")
        run = flow.start(flow.arrive(wanted, [where], now), now)  # type: ignore[list-item]
        return dict(flow.end(run, now + 1, ended(20_000, cached_tokens=cached_tokens)))

    turn(a, 0, 0)
    assert turn(a, 19_000, 10) == {"prefix_break": 1_000}
    assert turn(a, 9_000, 20) == {"prefix_break": 1_000, "evicted": 10_000}
    assert turn(b, 0, 30) == {"prefix_break": 1_000, "moved": 19_000}
    flow.restarted(b, 35)
    assert turn(b, 0, 40) == {"prefix_break": 1_000, "pod_restart": 19_000}
    flow.forget("s", 50)
    assert turn(b, 0, 60) == {"first_turn": 20_000}
    assert flow.totals.lost_tokens["evicted"] == 10_000


def test_a_restart_empties_the_belief() -> None:
    flow, home = conductor(), pod()
    run = flow.start(flow.arrive(ask("s"), [home], 0.0), 0.0)
    flow.end(run, 1.0, ended())
    flow.restarted(home, 2.0)
    assert home.residency.total_tokens == 0
    assert home.residency.capacity_tokens == CAPACITY


def test_hints_pass_the_pod_s_own_check() -> None:
    from engine_patch.hints import parse

    actions = [
        hints.reuse("s", "tool", Soon(3.0), elapsed_s=1.0),
        hints.reuse("s", "background", Soon(3.0)),
        hints.reuse("s", "human", None),
        hints.reuse("s", "ended", None),
    ]
    envelope, parsed = parse(hints.envelope("m1", *actions))
    assert [action.action_id for action in envelope.actions] == ["0", "1", "2", "3"]
    kinds = [payload.idle_kind for _, payload in parsed if payload is not None]  # type: ignore[union-attr]
    assert kinds == ["tool", "tool", "ended", "ended"]
