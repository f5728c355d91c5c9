"""Pods come, leave and die under load; the benchmark says what agents noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.fleet.agents import Turn
from bench.fleet.report import figures


def test_a_pod_is_added_one_drained_one_killed_and_every_session_goes_on(tmp_path: Path) -> None:
    out, plot = tmp_path / "fleet.json", tmp_path / "fleet.png"
    command = [sys.executable, "-m", "bench.fleet", "--sessions", "16", "--phase-s", "3"]
    subprocess.run(
        [*command, "--speedup", "10", "--json", str(out), "--plot", str(plot)],
        check=True,
        capture_output=True,
    )
    seen = json.loads(out.read_bytes())
    added, drained, killed = seen["added"], seen["drained"], seen["killed"]
    assert added["ready_after_s"] < 5
    assert added["failed"] == 0
    assert sum(phase["turns_by_pod"].get("pod-3", 0) for phase in seen["phases"].values()) > 0
    assert drained["failed_there"] == drained["given_later"] == 0
    assert drained["went_on_elsewhere"] == drained["sessions_there"]
    assert killed["failed_there"] <= killed["running_then"]
    assert killed["failed_elsewhere"] == 0
    assert killed["went_on_elsewhere"] == killed["sessions_there"] > 0
    assert len(seen["failed_turns"]) == killed["failed_there"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_figures_say_which_turns_failed_and_where_sessions_went() -> None:
    marks = {"added": 10.0, "ready": 11.0, "drained": 20.0, "killed": 30.0, "end": 40.0}
    turns = [
        Turn("a", 0, 1.0, 1.5, 2.0, "pod-0"),
        Turn("b", 0, 12.0, 12.1, 13.0, "pod-3"),
        Turn("a", 1, 19.0, 19.5, 21.0, "pod-0"),
        Turn("a", 2, 22.0, 22.5, 23.0, "pod-1"),
        Turn("a", 3, 29.0, 29.5, 30.1, "pod-1", "broken off"),
        Turn("a", 3, 30.5, 30.9, 31.0, "pod-3"),
        Turn("b", 1, 31.0, None, 31.1, "", "status 502"),
    ]
    made = figures(turns, marks, {"added": "pod-3", "drained": "pod-0", "killed": "pod-1"})
    assert made["added"] == {
        "pod": "pod-3",
        "ready_after_s": 1.0,
        "first_turn_after_ready_s": 1.0,
        "new_sessions": 1,
        "new_sessions_there": 1,
        "failed": 0,
    }
    assert made["drained"] == {
        "pod": "pod-0",
        "running_then": 1,
        "empty_after_s": 1.0,
        "failed_there": 0,
        "given_later": 0,
        "sessions_there": 1,
        "went_on_elsewhere": 1,
    }
    assert made["killed"] == pytest.approx(
        {
            "pod": "pod-1",
            "running_then": 1,
            "failed_there": 1,
            "failed_elsewhere": 1,
            "sessions_there": 1,
            "went_on_elsewhere": 1,
            "last_went_on_after_s": 1.0,
        }
    )
    assert [phase["failed"] for phase in made["phases"].values()] == [0, 0, 1, 1]
