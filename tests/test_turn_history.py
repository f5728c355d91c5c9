"""The latest turns are kept with their reasons, and no more of them than said."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.embedded.fleet import EmbeddedFleet
from gateway.routing import Candidate, Decision
from gateway.turn_history import CANDIDATES_KEPT, TurnHistory, explained
from gateway.waits import Fixed
from tests.crowded import (
    ENGINE,
    Gate,
    SmallPod,
    agent_body,
    held,
    occupied,
    of,
    place_of,
)
from tests.served import Running, gateway_over, until


def flow(sid: str, number: int, gateway: Any = None) -> Any:
    """A turn that knows nothing but its session."""
    session = SimpleNamespace(sid=sid, idle_kind=None, in_flight=0)
    change = SimpleNamespace(cause=None)
    turn = SimpleNamespace(
        session=session,
        number=number,
        gap=None,
        change=change,
        request_class="main",
        identified_by="new",
        prompt_tokens=1,
        same_tokens=0,
    )
    return SimpleNamespace(
        turn=turn,
        started_at=1.0,
        held_s=0.0,
        first_byte_at=None,
        decision=None,
        ticket=None,
        hold=None,
        losses={},
        forecast=None,
        outcome="ok",
        status=200,
        attempts=1,
        pod_run=None,
        gateway=gateway,
    )


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=120),
    st.integers(1, 6),
    st.integers(1, 30),
)
def test_of_the_latest_turns_of_all_the_latest_of_each_session_are_kept(
    sids: list[int], turns_kept: int, total_kept: int
) -> None:
    history = TurnHistory(0.0, turns_kept, total_kept)
    for number, sid in enumerate(sids):
        one = flow(str(sid), number)
        history.begin(one)
        history.end(one, 2.0, None)
        history.end(one, 3.0, None)  # idempotent
    assert not history.open
    latest = list(enumerate(sids))[-total_kept:]
    for sid in range(6):
        expected = [number for number, one in latest if one == sid][-turns_kept:]
        kept = [orjson.loads(orjson.dumps(span))["n"] for span in history.spans(str(sid))]
        assert kept == expected
    assert len(history) <= min(total_kept, 6 * turns_kept)
    assert len(history._order) <= total_kept


def test_a_fleet_of_a_hundred_pods_leaves_few_candidates_with_the_chosen_one_among_them() -> None:
    pods: list[Any] = [SimpleNamespace(name=f"pod-{n}") for n in range(100)]
    candidates = tuple(Candidate(pod, 0, float(n), 0.0, 0.0) for n, pod in enumerate(pods))
    found = explained(Decision(pods[70], "session_hash", "policy", 0, 10, candidates))
    names = [c["pod"] for c in found["candidates"]]
    assert names == ["pod-70", *(f"pod-{n}" for n in range(CANDIDATES_KEPT - 1))]
    assert found["weighed"] == 100


@settings(deadline=None)
@given(
    st.lists(st.floats(0.001, 1e5), min_size=1, max_size=32, unique=True).map(sorted),
    st.data(),
)
def test_quantiles_of_a_drawn_curve_rise_and_lie_on_it(times: list[float], data: Any) -> None:
    falling = data.draw(
        st.lists(st.floats(0.0, 0.999), min_size=len(times), max_size=len(times)).map(
            lambda values: sorted(values, reverse=True)
        )
    )
    fixed = Fixed(0.9, tuple(zip(times, falling, strict=True)))
    asked = [0.1, 0.25, 0.5, 0.75, 0.9]
    found = fixed.quantiles(asked)
    known = [s for s in found if s is not None]
    assert known == sorted(known)
    assert found[len(known) :] == [None] * (len(asked) - len(known))
    for probability, seconds in zip(asked, found, strict=True):
        if seconds is None:
            assert falling[-1] > 1 - probability
        else:
            assert 0 <= seconds <= times[-1] + 0.001
            before = max((p for t, p in fixed.points if t >= seconds + 0.001), default=0.0)
            assert before <= 1 - probability + 1e-9


def test_a_quantile_lies_on_the_line_between_two_points() -> None:
    fixed = Fixed(1.0, ((10.0, 0.5), (20.0, 0.0)))
    assert fixed.quantiles([0.25, 0.5, 0.75]) == [5.0, 10.0, 15.0]


async def turns_of(gateway: Running, name: str) -> list[Any]:
    session = next(s for s in gateway.gateway.sessions if s.key.endswith(f":{name}"))
    found = (await gateway.get(f"/v1/cachewise/sessions/{session.sid}/turns")).json["data"]
    return list(found)


async def test_a_held_turn_tells_why_while_it_waits_and_afterwards() -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, gateway_over(pod) as gateway, occupied(gateway):
        second = asyncio.create_task(
            gateway.post("chat", agent_body("chat", "second"), headers=of("second"))
        )
        await until(lambda: held(gateway) == 1)
        waiting = (await turns_of(gateway, "second"))[0]
        assert waiting["span"]["phase"] == "held"
        assert "route" not in waiting["reasons"]
        hold = waiting["reasons"]["hold"]
        assert hold["reason"] == "no_room"
        assert hold["needed_tokens"] > hold["free_tokens"]
        assert [c["pod"] for c in hold["offered"]["candidates"]] == ["pod-0"]
        await asyncio.sleep(0.05)
        gate.open("first", "second")
        assert (await second).status == 200
        over = (await turns_of(gateway, "second"))[0]
    assert over["span"]["end"] == "ok"
    assert over["span"]["held"] >= 0.05
    assert over["span"]["first"] >= over["span"]["held"]
    assert over["reasons"]["hold"]["reason"] == "no_room"
    assert over["reasons"]["hold"]["seconds"] == over["span"]["held"]
    assert over["reasons"]["route"]["reason"] == "admitted"
    assert not gateway.gateway.history.open


async def test_a_client_that_leaves_while_held_leaves_its_turn_in_the_history_only() -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, gateway_over(pod) as gateway, occupied(gateway):
        second = asyncio.create_task(
            gateway.post("chat", agent_body("chat", "second"), headers=of("second"))
        )
        await until(lambda: held(gateway) == 1)
        second.cancel()
        await until(lambda: held(gateway) == 0)
        await until(lambda: place_of(gateway, "second") is None)
        last = (await turns_of(gateway, "second"))[0]
        assert last["span"]["end"] == "client_gone"
        assert "pod" not in last["span"]


async def test_an_answer_with_tools_foretells_the_gap_and_the_next_turn_tells_what_it_was() -> None:
    script = {"turns": [{"tool_calls": [{"name": "bash", "arguments": {"command": "secret-dir"}}]}]}
    headers = of("one") | {"x-embedded-script": json.dumps(script)}
    async with (
        EmbeddedFleet(pods=1, config=ENGINE) as fleet,
        gateway_over(*fleet.urls) as gateway,
    ):
        usage = {"include_usage": True}
        body = agent_body(
            "chat", "one", "embedded", tokens=2_000, stream=True, stream_options=usage
        )
        answer = await gateway.post("chat", body, headers=headers)
        assert answer.status == 200
        call = {"id": "call-1", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
        body["messages"] += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call-1", "content": "out"},
        ]
        await gateway.post("chat", body, headers=headers)
        body["messages"][0]["content"] = "altogether different " * 300
        await gateway.post("chat", body, headers=headers)
        last, second, first = [one["span"] for one in await turns_of(gateway, "one")]
        assert first["tools"] == ["bash"]
        assert first["next"] == "tool"
        assert len(first["q"]) == 5
        assert 0 < first["p"] <= 1
        assert first["kv"][1] == 0
        assert first["lost"] == {"first_turn": first["kv"][0]}
        assert second["gap"] == "tool"
        assert second["kv"][1] > 1_000
        assert last["break"][0] == "edit"
        assert last["lost"]["prefix_break"] > 0
        everything = (await gateway.get(f"/v1/cachewise/turns?session={sid_of(gateway)}")).text
        everything += json.dumps(await turns_of(gateway, "one"))
        assert "secret-dir" not in everything
        assert "altogether" not in everything


def sid_of(gateway: Running) -> str:
    return next(iter(gateway.gateway.sessions)).sid
