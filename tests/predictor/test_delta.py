"""What replicas tell each other of what they have learned: sums that merge in any order, and that
teach what the gaps themselves would have taught."""

import json
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.dialects.turn import ToolCall
from gateway.predictor import Context, Predictor, store
from gateway.predictor.delta import MAX_NODES, Delta, DeltaError
from gateway.predictor.grid import BINS
from gateway.predictor.table import STATS, SUM, N
from gateway.predictor.warp import BINS as WARP_BINS

words = st.text("abc", min_size=1, max_size=2)
keys = st.lists(words, min_size=1, max_size=5).map(tuple)
whole = st.integers(0, 50)


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    """Of whole numbers, so that sums are exact."""
    made = Delta()
    for _ in range(draw(st.integers(0, 12))):
        made.gaps += 1
        at = draw(st.lists(keys, min_size=1, max_size=4))
        made.gap(at, float(draw(st.integers(-3, 4))), draw(st.integers(0, BINS - 1)), 1.0)
    for _ in range(draw(st.integers(0, 3))):
        made.returned((draw(words), draw(words)), draw(st.booleans()))
        made.reached(draw(words), draw(st.floats(0, 1)))
        made.overhead(draw(words), float(draw(whole)))
    if draw(st.booleans()):
        masses = np.zeros(BINS, np.float32)
        masses[draw(st.integers(0, BINS - 1))] = draw(whole)
        made.masses(draw(keys), masses, None)
    return made


def plain(delta: Delta) -> object:
    nodes = {key: row.tolist() for key, row in delta.nodes.items()}
    return delta.gaps, nodes, delta.returns, delta.warps, delta.overheads


def merged(*parts: Delta) -> Delta:
    made = Delta()
    for part in parts:
        made.merge(part)
    return made


@given(deltas(), deltas(), deltas())
@settings(deadline=None)
def test_deltas_merge_in_any_order_and_grouping(a: Delta, b: Delta, c: Delta) -> None:
    before = plain(a)
    sums = [plain(d) for d in (merged(a, b, c), merged(c, a, b), merged(a, merged(b, c)))]
    assert sums[0] == sums[1] == sums[2]
    assert plain(a) == before
    assert plain(merged(a, Delta())) == before


@given(deltas())
@settings(deadline=None)
def test_a_delta_is_read_as_it_was_written(delta: Delta) -> None:
    assert plain(Delta.unpack(delta.pack())) == plain(delta)


@given(st.binary(max_size=100))
def test_bytes_that_are_no_delta_are_refused(data: bytes) -> None:
    with pytest.raises(DeltaError):
        Delta.unpack(data)


def sample() -> Delta:
    made = Delta(gaps=3)
    for bin_ in (1, 2, 2):
        made.gap([("kind", "shell"), ("tool", "bash")], 0.5, bin_, 0.1)
    made.reached("shell", 0.5)
    made.returned(("tool", "shell"), True)
    made.overhead("codex", -1.0)
    return made


FIELDS = msgspec.msgpack.decode(sample().pack())
NAN = np.array([np.nan] * 8, np.float32).tobytes()


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, 2),
        (1, -1),
        (2, [["a"]]),
        (2, [["a"], ["a"]]),
        (2, [["a"] * 6, ["b"]]),
        (2, [["a" * 65], ["b"]]),
        (3, b"123"),
        (3, NAN),
        (3, (-np.ones(8, np.float32)).tobytes()),
        (4, np.array([0, 2 * BINS], np.uint32).tobytes()),
        (5, NAN[:16]),
        (5, b"\0" * 4),
        (6, {"a": [1.0, float("inf")]}),
        (7, {"a": [1.0] * (WARP_BINS - 1)}),
        (8, {"a": [-1.0, 0.0]}),
        (8, {"a" * 200: [1.0, 0.0]}),
    ],
)
def test_a_delta_with_odd_parts_is_refused(at: int, value: object) -> None:
    assert Delta.unpack(msgspec.msgpack.encode(FIELDS))
    with pytest.raises(DeltaError):
        Delta.unpack(msgspec.msgpack.encode([*FIELDS[:at], value, *FIELDS[at + 1 :]]))


def test_a_delta_does_not_grow_without_end() -> None:
    delta = Delta()
    for n in range(MAX_NODES + 10):
        delta.gap([("tool", str(n))], 0.0, 0, 0.0)
    assert len(delta.nodes) == MAX_NODES


# -- learning from it -----------------------------------------------------------------------------

CALLS = [
    ToolCall.of("id", "Bash", json.dumps({"command": command}))
    for command in ("make test", "git status", "go test ./...", "frobnicate --all")
]


def wait(predictor: Predictor, call: ToolCall, gap_s: float, session: str) -> None:
    forecast = predictor.forecast([call], "tool", Context(session, "acme", "codex"))
    predictor.observe(forecast, gap_s)


def gaps(count: int, seed: int = 1) -> list[tuple[ToolCall, float, str]]:
    rng = random.Random(seed)
    typical = {id(call): 10 ** rng.uniform(-1, 2) for call in CALLS}
    return [
        (call, typical[id(call)] * 10 ** rng.gauss(0, 0.2), f"s{rng.randrange(40)}")
        for call in rng.choices(CALLS, k=count)
    ]


def replicas(count: int) -> list[Predictor]:
    made = [Predictor() for _ in range(count)]
    for predictor in made:
        predictor.delta = Delta()
    return made


def exchange(fleet: list[Predictor]) -> None:
    told = [predictor.delta for predictor in fleet]
    for predictor in fleet:
        predictor.delta = Delta()
    for predictor, own in zip(fleet, told, strict=True):
        for delta in told:
            if delta is not own:
                assert delta is not None
                predictor.learn_from(Delta.unpack(delta.pack()))


def medians(predictor: Predictor) -> list[float]:
    context = Context("new", "acme", "codex")
    return [np.log10(predictor.forecast([c], "tool", context).median_s) for c in CALLS]


def test_replicas_that_tell_each_other_know_what_one_that_saw_all_would_know() -> None:
    alone, fleet = Predictor(), replicas(3)
    for n, (call, gap_s, session) in enumerate(gaps(1_200)):
        wait(alone, call, gap_s, session)
        wait(fleet[n % 3], call, gap_s, session)
        if n % 100 == 99:
            exchange(fleet)
    shared = [key for key, _ in alone.table if isinstance(key, tuple)]
    for predictor in fleet:
        assert predictor.observed_total == alone.observed_total
        for key in shared:
            mine, its = (p.table.data[p.table.touch(key)] for p in (predictor, alone))
            for p in (predictor, alone):
                p.table.normalise(p.table.touch(key))
            assert mine[N] == pytest.approx(its[N], rel=0.01)
            assert mine[SUM] / mine[N] == pytest.approx(its[SUM] / its[N], abs=0.02)
            assert mine[STATS:].sum() == pytest.approx(mine[N], rel=1e-3)
        assert medians(predictor) == pytest.approx(medians(alone), abs=0.1)
        for pair, returns in alone.returns.items():
            assert predictor.returns[pair].probability == pytest.approx(
                returns.probability, abs=0.01
            )
        assert predictor.warps.keys() == alone.warps.keys()


def test_a_replica_that_has_seen_nothing_is_taught() -> None:
    fleet = replicas(2)
    for call, gap_s, session in gaps(200):
        wait(fleet[0], call, gap_s, session)
    before = medians(fleet[1])
    exchange(fleet)
    assert medians(fleet[1]) == pytest.approx(medians(fleet[0]), abs=0.15)
    assert medians(fleet[1]) != pytest.approx(before, abs=0.15)


def test_what_is_told_holds_nothing_of_a_session() -> None:
    (predictor,) = replicas(1)
    for call, gap_s, session in gaps(50):
        wait(predictor, call, gap_s, session)
    predictor.observe(predictor.forecast([], "human", Context("s", "acme")), 100.0)
    predictor.observe(
        predictor.forecast([CALLS[0]], "tool", Context("s", "acme")), 9.0, returned=False
    )
    assert predictor.delta is not None
    assert predictor.delta.gaps == 52
    assert {key[0] for key in predictor.delta.nodes} == {
        *("kind", "tool", "program", "sub", "tenant", "wait")
    }
    Delta.unpack(predictor.delta.pack())


def test_trust_moves_as_over_single_gaps() -> None:
    one, other = store.priors(), store.priors()
    one.delta = Delta()
    for call, gap_s, session in gaps(20):
        wait(one, call, gap_s, session)
    other.learn_from(one.delta)
    row = one.table.touch(("kind", "shell")), other.table.touch(("kind", "shell"))
    trust = [p.table.stats[r, 5] for p, r in zip((one, other), row, strict=True)]
    assert trust[0] == pytest.approx(trust[1], abs=1.5)
