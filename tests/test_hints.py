"""What pods are told, when, and what clients may not tell them."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_patch.hints import MAX_ACTIONS, parse
from gateway.dialects import MalformedRequestError, without_hints
from gateway.dialects.turn import ToolCall
from gateway.embedded.fleet import EmbeddedFleet
from gateway.fleet.pod import Pod as FleetPod
from gateway.fleet.probe import Capabilities, ProbeResult
from gateway.hints import MAX_QUEUED, HintSender, reuse
from gateway.idle import IdleKind
from gateway.sessions import Session
from gateway.waits import Fixed, Wait, Waits, begun
from tests.crowded import AGENT_WIRES, SmallPod, agent_body, of
from tests.served import PATHS, WIRES, Exchange, Pod, body_of, gateway_over, until
from tests.yardstick import cpu_s, plain_python_s

CURVE = ((1.0, 0.8), (10.0, 0.1), (60.0, 0.01))


@dataclass
class Curve:
    points: Sequence[tuple[float, float]] = CURVE
    p_return: float = 0.9

    def curve(self) -> Sequence[tuple[float, float]]:
        return self.points


@dataclass
class Forecasts:
    """Says the same of every gap, and remembers what it was asked and told."""

    asked: list[tuple[list[str], IdleKind]] = field(default_factory=list)
    observed: list[float | None] = field(default_factory=list)

    def fell_idle(self, _: Session, calls: Sequence[ToolCall], idle_kind: IdleKind) -> Curve:
        self.asked.append(([call.name for call in calls], idle_kind))
        return Curve()

    def came_back(self, _: Session, gap_s: float | None, __: Any) -> None:
        self.observed.append(gap_s)

    def given_up(self, _: Session, now: float) -> None:
        return


class HintedPod(SmallPod):
    """A raw pod that takes hints."""

    def __init__(self, *args: Any, status: int = 200) -> None:
        super().__init__(*args)
        self.status = status
        self.hints: list[Exchange] = []

    async def _dispatch(self, exchange: Exchange) -> None:
        if exchange.path == "/v1/kv_hints":
            self.hints.append(exchange)
            actions = json.loads(exchange.body)["actions"]
            results = [{"action_id": a["action_id"], "status": "applied"} for a in actions]
            exchange.whole(json.dumps({"results": results}).encode(), self.status)
        elif exchange.path == "/v1/kv_hints/capabilities":
            exchange.whole(b'{"active": true}')
        elif exchange.path == "/version":
            exchange.whole(b'{"version": "0.32.0"}')
        else:
            await super()._dispatch(exchange)

    def told(self) -> list[dict[str, Any]]:
        return [
            action["payload"]
            for exchange in self.hints
            for action in json.loads(exchange.body)["actions"]
        ]


SCRIPT = json.dumps(
    {"turns": [{"tool_calls": [{"name": "bash", "arguments": {"command": "ls"}}]}, {"text": "ok"}]}
)


@pytest.mark.parametrize("wire", AGENT_WIRES)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_embedded_pod_knows_when_to_expect_a_session(wire: str, stream: bool) -> None:
    async with EmbeddedFleet(pods=1) as fleet, gateway_over(*fleet.urls) as gateway:
        loop = gateway.gateway.loop
        loop.foresight = forecasts = Forecasts()  # type: ignore[assignment]
        headers = of("a") | {"x-embedded-script": SCRIPT}
        body = agent_body(wire, "a", "embedded", tokens=100, stream=stream)
        assert (await gateway.post(wire, body, headers=headers)).status == 200
        assert forecasts.asked == [(["bash"], "tool")]
        (session,) = gateway.gateway.sessions
        await until(lambda: not loop.hints._tasks)
        async with gateway.client.get(fleet.urls[0] + "/v1/kv_hints/sessions") as response:
            rows = {row["session_id"]: row for row in (await response.json())["sessions"]}
        row = rows[session.sid]
        assert row["idle_kind"] == "tool"
        assert await gateway.metric('cachewise_hints_total{hint_result="applied"}') == 1
        # It comes back: the forecast is compared with what was.
        body["messages" if "messages" in body else "input"] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y"},
            {"role": "user", "content": "z"},
        ]
        await gateway.post(wire, body, headers=headers)
        before, gap_s = forecasts.observed
        assert before is None
        assert gap_s is not None
        assert gap_s > 0


async def test_the_pod_is_told_before_the_stream_ends() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "bash", "arguments": "{}"}}
    events = [
        {"id": "1", "choices": [{"index": 0, "delta": {"tool_calls": [call]}}]},
        {"id": "1", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    ]
    may_end = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        exchange.begin_stream()
        for event in events:
            exchange.chunk(b"data: %b\n\n" % json.dumps(event).encode())
        await may_end.wait()
        exchange.chunk(b"data: [DONE]\n\n")
        exchange.end_stream()

    hints = {"token": "hint-secret-token"}
    async with HintedPod(answer) as pod, gateway_over(pod, hints=hints) as gateway:
        gateway.gateway.loop.foresight = Forecasts()  # type: ignore[assignment]
        body = agent_body("chat", "a", stream=True)
        turn = asyncio.create_task(gateway.post("chat", body, headers=of("a")))
        await until(lambda: bool(pod.hints))
        (session,) = gateway.gateway.sessions
        assert session.in_flight == 1
        parse(pod.hints[0].body)
        (told,) = pod.told()
        assert told["session_id"] == session.sid
        assert told["survival"] == [list(point) for point in CURVE]
        assert (told["idle_kind"], told["p_return"]) == ("tool", 0.9)
        assert pod.hints[0].header(b"x-kv-hints-token") == [b"hint-secret-token"]
        may_end.set()
        assert (await turn).status == 200
        await asyncio.sleep(0.05)
        assert len(pod.hints) == 1, "once is enough"


async def test_a_session_that_ends_is_given_up() -> None:
    async def answer(exchange: Exchange) -> None:
        exchange.whole(b'{"id": "1", "choices": [{"finish_reason": "stop", "message": {}}]}')

    async with HintedPod(answer) as pod, gateway_over(pod) as gateway:
        body = agent_body("chat", "a", tokens=100)
        await gateway.post("chat", body, headers=of("a"))
        await until(lambda: len(pod.told()) == 1)
        await gateway.post("chat", body, headers=of("b", final=True))
        await until(lambda: len(pod.told()) == 2)
        assert [told["idle_kind"] for told in pod.told()] == ["human", "ended"]
        # One that is forgotten is given up too.
        gateway.gateway.sessions.ttl_s = -1
        await until(lambda: len(pod.told()) == 3)
        assert pod.told()[2]["idle_kind"] == "ended"
        assert pod.told()[2]["session_id"] == pod.told()[0]["session_id"]
        assert gateway.gateway.loop.admission.books["pod-0"].places == {}


async def test_a_pod_that_takes_no_hints_gets_none() -> None:
    async with SmallPod() as pod, gateway_over(pod) as gateway:
        gateway.gateway.loop.foresight = Forecasts()  # type: ignore[assignment]
        await gateway.post("chat", agent_body("chat", "a"), headers=of("a"))
        await asyncio.sleep(0.05)
        assert [turn.path for turn in pod.turns] == [PATHS["chat"]]


async def test_a_wait_that_outlives_a_quantile_is_told_again() -> None:
    forecast = Fixed.of(Curve())
    waits = Waits()
    waits.begin(begun("a", "pod", "tool", forecast, 100.0))
    waits.begin(begun("b", "pod", "tool", forecast, 100.0))
    told: list[tuple[str, float]] = []

    def tell(now: float) -> None:
        waits.outlived(now, lambda wait: told.append((wait.sid, now - wait.since)))

    tell(105.0)
    assert told == []
    waits.end("b")
    for now in (110.0, 110.5, 159.0, 160.0, 161.0, 1000.0):
        tell(now)
    assert told == [("a", 10.0), ("a", 60.0)]
    assert waits.end("a") is not None
    assert (len(waits), waits.end("a")) == (0, None)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(0, 40))))
def test_waits_keep_at_most_one_gap_a_session(steps: list[tuple[str, bool, int]]) -> None:
    waits = Waits()
    live: dict[str, Wait] = {}
    now = 0.0
    for sid, begins, seconds in steps:
        now += seconds
        waits.outlived(now, lambda wait: None if live[wait.sid] is wait else pytest.fail("stale"))
        if begins:
            live[sid] = begun(sid, "pod", "tool", Fixed.of(Curve()), now)
            waits.begin(live[sid])
        else:
            assert waits.end(sid) is live.pop(sid, None)
        assert len(waits) == len(live)
        assert len(waits._due) <= 66 + 2 * len(live) + len(steps)


# -- delivery --------------------------------------------------------------------------------------


def hinted(pod: Pod, name: str = "p") -> FleetPod:
    able = ProbeResult(ready=True, capabilities=Capabilities(session_id=True, kv_hints=True))
    return FleetPod(name=name, url=pod.url, api_key="pod-key", ready=True, probed=able)


async def test_hints_gather_while_one_is_on_its_way_and_old_ones_give_way() -> None:
    counted: dict[str, int] = {}

    def count(result: str, number: int) -> None:
        counted[result] = counted.get(result, 0) + number

    async with HintedPod() as pod, HintSender(count, None) as sender:
        to = hinted(pod)
        for n in range(MAX_QUEUED + 10):
            sender.send(to, reuse(f"s{n}", "tool", Curve()))
        sender.send(to, reuse(f"s{MAX_QUEUED}", "ended", None))
        await until(lambda: not sender.queued("p") and not sender._tasks)
        assert counted == {"applied": MAX_QUEUED, "dropped": 10}
        assert len(pod.hints) == MAX_QUEUED // MAX_ACTIONS
        told = {t["session_id"]: t["idle_kind"] for t in pod.told()}
        assert "s0" not in told
        assert told[f"s{MAX_QUEUED}"] == "ended"
        assert pod.hints[0].header(b"authorization") == [b"Bearer pod-key"]
        assert pod.hints[0].header(b"x-kv-hints-token") == []
        assert len({json.loads(e.body)["message_id"] for e in pod.hints}) == len(pod.hints)


@pytest.mark.parametrize("fault", ["status", "gone", "silent"])
async def test_hints_that_cannot_be_delivered_are_counted_and_given_up(fault: str) -> None:
    counted: list[tuple[str, int]] = []
    async with (
        HintedPod(status=403 if fault == "status" else 200) as pod,
        HintSender(lambda *it: counted.append(it), None, timeout_s=0.2) as sender,
    ):
        if fault == "gone":
            await pod.stop()
        elif fault == "silent":

            async def nothing(exchange: Exchange) -> None:
                await exchange.gone.wait()

            pod._dispatch = nothing  # type: ignore[method-assign]
        sender.send(hinted(pod), reuse("a", "tool", Curve()))
        await until(lambda: bool(counted))
        assert counted == [("failed", 1)]
        assert not sender._tasks


# -- what clients may not say ----------------------------------------------------------------------

HINTS = {"protocol_version": "0.1", "message_id": "m", "actions": []}


@pytest.mark.parametrize("wire", WIRES)
async def test_a_clients_own_hints_do_not_reach_the_pod(wire: str) -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        body = json.dumps(body_of(wire) | {"x": "kv_hints"}).encode()
        sent = body[:-1] + b' , "kv_hints" : ' + json.dumps(HINTS).encode() + b"}"
        reply = await gateway.post(wire, sent, headers={"x-kv-hints-token": "guess"})
        assert reply.status == 200
        assert pod.turns[0].body == body
        assert pod.turns[0].header(b"x-kv-hints-token") == []


async def test_hints_of_a_trusted_tenant_do_with_the_gateways_own_token() -> None:
    hints = {"trusted_tenants": ["default"], "token": "hint-secret-token"}
    async with Pod() as pod, gateway_over(pod, hints=hints) as gateway:
        body = json.dumps(body_of("chat") | {"kv_hints": HINTS}).encode()
        await gateway.post("chat", body, headers={"x-kv-hints-token": "guess"})
        assert pod.turns[0].body == body
        assert pod.turns[0].header(b"x-kv-hints-token") == [b"hint-secret-token"]
        await gateway.post("chat")
        assert pod.turns[1].header(b"x-kv-hints-token") == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.sampled_from(["", "kv_hints", 'a"b', "é"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kv_hints", "model", "a", "\\"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ['"kv_hints"', r'"k\u0076_hints"', r'"kv_\u0068ints"', r'"\u006bv\u005Fhints"']
)


@given(
    fields=st.dictionaries(st.sampled_from(["a", "b", "c\\", "hints"]), VALUES, max_size=4),
    hints=VALUES,
    key=KEYS,
    place=st.integers(0, 5),
    blank=st.sampled_from(["", " ", "\n\t "]),
)
def test_only_the_top_level_field_is_taken_out(
    fields: dict[str, Any], hints: Any, key: str, place: int, blank: str
) -> None:
    pairs = [f"{json.dumps(k)}{blank}:{blank}{json.dumps(v)}" for k, v in fields.items()]
    pairs.insert(0, '"model": "m"')
    at = min(place, len(pairs))
    hinted = [*pairs[:at], f"{key}{blank}:{blank}{json.dumps(hints)}", *pairs[at:]]
    sep = f"{blank},{blank}"
    body = ("{" + sep.join(hinted) + "}").encode()
    try:
        left = without_hints(body)
    except MalformedRequestError:
        # A nested field of the same spelling and value, too many of them: never silently wrong.
        assert body.count(b"hints") > 1
        return
    assert json.loads(left) == {"model": "m", **fields}
    for pair in pairs:
        assert pair.encode() in left
    assert without_hints(left) == left


@pytest.mark.parametrize("second", ["1", "2"])
def test_hints_given_twice_are_both_taken_out(second: str) -> None:
    body = b'{"kv_hints":1,"model":"m","kv_hints":%b}' % second.encode()
    assert without_hints(body) == b'{"model":"m"}'


def test_hints_given_many_times_are_refused() -> None:
    fields = ",".join(f'"kv_hints":{n}' for n in range(9))
    with pytest.raises(MalformedRequestError, match="kv_hints"):
        without_hints(f'{{"model":"m",{fields}}}'.encode())


@pytest.mark.parametrize(
    "body",
    [
        '{"model":"m",' + " " * 500_000 + '"a":[],"kv_hints":1,"b":2}',
        '{"model":"m","kv_hints":1' + " " * 500_000 + "}",
        '{"model":"m",' + ",".join(f'"kv_hints":{n}' for n in range(40_000)) + "}",
        '{"model":"m","a":[' + '{"kv_hints":1},' * 30_000 + '0],"kv_hints":1}',
        '{"model":"m","kv_hints":"' + "x" * 500_000 + '"}',
        '{"model":"m","kv_hints":"' + "[(" * 250_000 + '"}',
    ],
    ids=["blanks", "blanks behind", "many", "nested", "long", "odd"],
)
def test_taking_hints_out_of_any_body_costs_little(body: str) -> None:
    def take() -> None:
        with suppress(MalformedRequestError):
            without_hints(body.encode())

    assert cpu_s(take) < 100 * plain_python_s()
