"""What of a tool call is looked at."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.dialects.turn import ToolCall
from gateway.predictor.features import NUMBERS, features_of
from gateway.predictor.kinds import KINDS, kind_of
from gateway.predictor.records import call_of
from tests.yardstick import cpu_s, plain_python_s


def call(name: str, **arguments: object) -> ToolCall:
    return ToolCall.of("id", name, json.dumps(arguments))


def number(of: ToolCall, name: str) -> float:
    return features_of(of)[1][NUMBERS.index(name)]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("shell", "Bash exec_command bash run_shell_command run_commands terminal shell"),
        ("read", "Read read_file view read_files"),
        ("edit", "Edit Write MultiEdit apply_patch str_replace_editor file_editor replace"),
        ("search", "Grep Glob grep_search ToolSearch"),
        ("poll", "write_stdin wait_agent TaskOutput CheckBackgroundJob read_background_output"),
        ("subagent", "Agent Task task spawn_agent delegate new_task multi_agent_v1.spawn_agent"),
        ("human", "AskUserQuestion ExitPlanMode request_user_input question ask_user"),
        ("background", "Monitor ScheduleWakeup CronCreate loop_wakeup"),
        ("web", "WebFetch WebSearch webfetch web_search"),
        ("plan", "TodoWrite update_plan TaskUpdate"),
        ("mcp", "mcp__linear__create_issue mcp__x"),
        ("other", "frobnicate"),
    ],
)
def test_the_kind_of_every_clients_tools(kind: str, names: str) -> None:
    assert {kind_of(name) for name in names.split()} == {kind}


def test_a_shell_call() -> None:
    words, _ = features_of(call("Bash", command="cd x && go test ./...", timeout=120_000))
    assert words[:4] == ("shell", "Bash", "go", "test")
    assert number(call("Bash", command="x", timeout=120_000), "timeout_log_s") == pytest.approx(
        2.08, abs=0.01
    )
    assert number(call("Bash", command="x", timeout=90), "timeout_log_s") == pytest.approx(
        1.96, abs=0.01
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"command": "go test ./..."},
        {"cmd": "go test ./..."},
        {"command": ["bash", "-lc", "go test ./..."]},
        {"command": ["go", "test", "./..."]},
        {"commands": ["go test ./..."]},
    ],
)
def test_a_command_under_every_clients_key(arguments: dict[str, object]) -> None:
    words, _ = features_of(call("shell", **arguments))
    assert (words.program, words.sub) == ("go", "test")


def test_arguments_that_were_cut_are_read_as_far_as_they_go() -> None:
    text = json.dumps({"command": "cargo build", "run_in_background": True, "x": "y" * 100_000})
    words, numbers = features_of(ToolCall.of("", "Bash", text))
    assert (words.program, words.sub) == ("cargo", "build")
    assert numbers[NUMBERS.index("background")] == 1


def test_qwen_wraps_deferred_tools() -> None:
    words, _ = features_of(call("agent", subagent_type="Explore", prompt="find"))
    assert (words.kind, words.program) == ("subagent", "explore")


def test_equal_calls_have_equal_digests() -> None:
    one, other = call("Bash", command="ls"), call("Bash", command="ls -l")
    assert features_of(one)[0].digest == features_of(call("Bash", command="ls"))[0].digest
    assert features_of(one)[0].digest != features_of(other)[0].digest


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=300))
def test_nothing_makes_it_raise(name: str, arguments: str) -> None:
    words, numbers = features_of(ToolCall.of("", name, arguments))
    assert words.kind in KINDS
    assert len(numbers) == len(NUMBERS)
    assert all(isinstance(value, float) for value in numbers)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner),
    max_leaves=12,
)
keys = st.sampled_from(
    ["command", "cmd", "commands", "timeout", "yield_time_ms", "subagent_type", "prompt", "block"]
)


@settings(deadline=None)
@given(
    st.sampled_from(["Bash", "Agent", "write_stdin", "Skill", "Monitor"]),
    st.dictionaries(keys, json_values),
)
def test_fields_of_odd_types_do_not_make_it_raise(name: str, fields: dict[str, object]) -> None:
    _, numbers = features_of(ToolCall.of("", name, json.dumps(fields)))
    assert all(value == value and abs(value) < 1e6 for value in numbers)


HOSTILE = [
    '{"command": "' + "a" * 1_000_000,
    '{"command": "' + '\\"' * 500_000,
    '{"' + "a" * 1_000_000 + '":1}',
    "[" * 1_000_000,
    '{"a":' * 200_000,
    '{"command":"' * 80_000,
    "\0" * 1_000_000,
    '{"timeout": ' + "9" * 100_000 + "}",
    '{"command": "' + "\\u0000" * 2_000 + '"}',
    '"' * 1_000_000,
    '{"command": "' + "x" * 60_000 + '"}',
    "\ud800{" * 30_000,
    " " * 1_000_000,
    '{"command":["' + '","'.join(["-c"] * 20_000) + '"]}',
]


@pytest.mark.parametrize("name", ["Bash", "Agent", "write_stdin", "Skill", "x" * 100_000])
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_arguments_cost_a_millisecond_at_most(name: str, text: str) -> None:
    hostile = ToolCall("id", name, text, len(text))
    assert cpu_s(lambda: features_of(hostile)) < plain_python_s()


def test_records_become_what_clients_send() -> None:
    def made(tool: str, args: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(call_of({"tool": tool, "args": args}).arguments)
        return found

    assert made("Bash", "[timeout=60000] go test ./...") == {
        "timeout": 60_000,
        "command": "go test ./...",
    }
    assert made("exec_command", "[yield=1000] ls") == {"yield_time_ms": 1000, "cmd": "ls"}
    assert made("Edit", "./a.go old=3 new=5") == {
        "file_path": "./a.go",
        "old_string": "***",
        "new_string": "*****",
    }
    assert made("Grep", "pattern=a b path=./x -n=True") == {
        "pattern": "a b",
        "path": "./x",
        "-n": True,
    }
    assert made("Agent", "type=Explore prompt=4 [bg]") == {
        "subagent_type": "Explore",
        "prompt": "****",
        "run_in_background": True,
    }


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="no recorded sessions beside the clone")
def test_every_recorded_call_is_of_a_known_kind() -> None:
    from gateway.predictor.train import load

    calls = [c for s in load(SHARED) for t in s.turns for c in t.calls][::7]
    other = sum(features_of(c)[0].kind == "other" for c in calls)
    assert other < 0.002 * len(calls)
