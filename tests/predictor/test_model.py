"""What the predictor learns, and from what."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.forecast import newcomer
from gateway.dialects.turn import ToolCall
from gateway.predictor import Context, Forecast, Predictor, store
from gateway.predictor.correction import Correction
from gateway.predictor.grid import BINS
from gateway.predictor.model import MAX_CALLS
from gateway.predictor.table import NodeTable

HERE = Context("session-1", "acme", "claude-code", 50_000)


def bash(command: str, **more: object) -> ToolCall:
    return ToolCall.of("id", "Bash", json.dumps({"command": command, **more}))


def played(predictor: Predictor, call: ToolCall, gaps: list[float], context: Context) -> Forecast:
    for gap_s in gaps:
        predictor.observe(predictor.forecast([call], "tool", context), gap_s)
    return predictor.forecast([call], "tool", context)


def test_a_fresh_install_knows_common_tools() -> None:
    predictor = store.priors()
    seconds = {
        name: predictor.forecast([call], "tool", Context("new")).median_s
        for name, call in {
            "read": ToolCall.of("", "Read", '{"file_path": "a.py"}'),
            "status": bash("git status --short"),
            "test": bash("go test ./..."),
            "ask": ToolCall.of("", "AskUserQuestion", '{"questions": []}'),
        }.items()
    }
    assert seconds["read"] < 1 > seconds["status"]
    assert seconds["status"] < seconds["test"] < seconds["ask"]
    human = predictor.forecast([], "human", Context("new"))
    assert human.median_s > 30
    assert 0.3 < human.p_return < 0.99 < predictor.forecast([bash("ls")], "tool", HERE).p_return


def test_a_session_teaches_its_own_next_wait() -> None:
    predictor = store.priors()
    before = predictor.forecast([bash("make check")], "tool", HERE).median_s
    after = played(predictor, bash("make check"), [90.0] * 6, HERE)
    assert abs(math.log10(after.median_s / 90)) < 0.2 < abs(math.log10(before / 90))
    assert after.quantile(0.9) / after.quantile(0.1) < 12


def test_what_one_tenant_teaches_helps_its_next_session_most() -> None:
    predictor = store.priors()
    for session in range(20):
        played(predictor, bash("just zap"), [300.0] * 5, Context(session, "acme"))
    same = predictor.forecast([bash("just zap")], "tool", Context("new", "acme"))
    other = predictor.forecast([bash("just zap")], "tool", Context("new", "other"))
    nothing = store.priors().forecast([bash("just zap")], "tool", Context("new", "other"))
    assert abs(math.log10(same.median_s / 300)) < 0.3
    assert nothing.median_s < other.median_s


@pytest.mark.parametrize("name", ["steady 7 s", "log-normal 40 s", "fast or slow", "heavy tail"])
def test_a_new_tool_is_soon_forecast_as_well_as_it_can_be(name: str) -> None:
    learned = newcomer.learn(store.priors(), newcomer.tools([])[name], "frobnicate")
    assert learned["ratio"] < 1.2


def test_parallel_calls_take_as_long_as_the_longest() -> None:
    predictor = store.priors()
    fast, slow = ToolCall.of("", "Read", '{"file_path": "a"}'), bash("sleep 60; go test ./...")
    alone = predictor.forecast([slow], "tool", HERE)
    both = predictor.forecast([fast, slow, fast], "tool", HERE)
    for t_s in (0.1, 1.0, 10.0, 100.0):
        assert both.survival(t_s) > 0.6 * alone.survival(t_s)
    assert both.median_s > predictor.forecast([fast], "tool", HERE).median_s
    assert predictor.forecast([slow] * 300, "tool", HERE).median_s > 0
    assert both.basis is not None
    assert len(both.basis.calls) == 3 <= MAX_CALLS


def test_durations_from_the_client_teach_each_call_and_its_overhead() -> None:
    predictor = store.priors()
    context = Context("s", "acme", "claude-code")
    calls = [bash("just quick"), bash("just slow")]
    for _ in range(12):
        forecast = predictor.forecast(calls, "tool", context)
        predictor.observe(forecast, 20.4, [0.1, 20.0])
    assert predictor.overheads["claude-code"].seconds == pytest.approx(0.4, rel=0.01)
    quick = predictor.forecast(calls[:1], "tool", context)
    assert quick.offset_s == pytest.approx(0.4, rel=0.01)
    assert quick.median_s == pytest.approx(0.5, abs=0.2)


def test_a_permission_prompt_is_no_overhead_but_a_long_wait() -> None:
    predictor = store.priors()
    context = Context("s", "acme", "claude-code")
    before = predictor.forecast([bash("just ask")], "tool", context).survival(60)
    for _ in range(6):
        forecast = predictor.forecast([bash("just ask")], "tool", context)
        predictor.observe(forecast, 120.0, [0.1])
    after = predictor.forecast([bash("just ask")], "tool", context)
    assert predictor.overheads == {}
    assert after.survival(60) > max(0.5, before)


def test_a_wait_given_up_is_a_return_that_did_not_come() -> None:
    predictor = store.priors()
    before = predictor.forecast([], "human", HERE)
    for session in range(50):
        forecast = predictor.forecast([], "human", Context(session, "acme"))
        predictor.observe(forecast, 86_400.0, returned=False)
    after = predictor.forecast([], "human", HERE)
    assert after.p_return < before.p_return
    assert after.survival(86_400) >= before.survival(86_400)


def test_a_session_that_has_ended_is_hardly_expected() -> None:
    assert store.priors().forecast([], "ended", HERE).p_return < 0.05


def test_a_gap_teaches_once() -> None:
    predictor = store.priors()
    forecast = predictor.forecast([bash("ls")], "tool", HERE)
    predictor.observe(forecast, 1.0)
    predictor.observe(forecast, 1.0)
    assert predictor.observed_total == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["ls", "make", "go test", "sleep 9", "\0"]), max_size=12),
            st.sampled_from(["tool", "human", "background", "ended"]),
            st.floats(0, 1e9),
            st.booleans(),
            st.integers(0, 3),
        ),
        max_size=30,
    )
)
def test_whatever_happens_forecasts_stay_sound(
    events: list[tuple[list[str], str, float, bool, int]],
) -> None:
    predictor = PRIORS
    for commands, idle_kind, gap_s, returned, session in events:
        calls = [bash(command) for command in commands]
        forecast = predictor.forecast(calls, idle_kind, Context(session, "t"))  # type: ignore[arg-type]
        assert float(forecast.masses.sum()) == pytest.approx(1, abs=1e-3)
        assert (forecast.masses >= -1e-6).all()
        assert 0 < forecast.p_return <= 1
        assert math.isfinite(forecast.expected_remaining(gap_s))
        predictor.observe(forecast, gap_s, returned=returned)
    assert np.isfinite(predictor.table.data).all()


PRIORS = store.priors()


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    tracemalloc.start()
    table = NodeTable(100_000)
    for number in range(120_000):
        table.touch(("sub", "Bash", f"program{number % 500}", f"sub{number}"))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 100_000
    assert table.forgotten_total == 20_000
    assert table.find(("sub", "Bash", "program0", "sub0")) is None
    assert table.find(("sub", "Bash", "program499", "sub119999")) is not None
    assert taken < 50_000_000


def test_a_used_node_outlives_others_and_a_row_used_again_is_empty() -> None:
    table = NodeTable(3)
    rows = [table.touch(key) for key in "abc"]
    table.data[rows] = 1
    table.touch("a")
    row = table.touch("d")
    assert [key for key, _ in table] == ["c", "a", "d"]
    assert (table.data[row] == 0).all()


def test_trees_answer_as_they_would_one_by_one() -> None:
    rng = np.random.default_rng(4)
    trees, depth, width = 9, 4, 12
    columns = rng.integers(0, width, (trees, depth)).astype(np.int16)
    borders = rng.normal(size=(trees, depth)).astype(np.float32)
    leaves = rng.normal(0, 0.3, (trees, 1 << depth, BINS)).astype(np.float16)
    bias = rng.normal(size=BINS).astype(np.float32)
    correction = Correction(columns, borders, leaves, bias)
    for _ in range(50):
        x = rng.normal(size=width).astype(np.float32)
        scores = bias.astype(float)
        for tree in range(trees):
            leaf = sum(
                1 << level
                for level in range(depth)
                if x[columns[tree, level]] > borders[tree, level]
            )
            scores = scores + leaves[tree, leaf]
        wanted = np.exp(scores) / np.exp(scores).sum()
        assert correction.masses(x) == pytest.approx(wanted, abs=1e-4)
