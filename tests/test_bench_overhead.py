import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from bench.bodies import AgentSession, chat_body
from bench.overhead.load import AGENT_MIDDLE_TURN
from bench.overhead.mock_engine import CHUNKS, stream_events


def test_an_agent_body_is_about_400_kb_in_about_200_messages() -> None:
    body = AgentSession(1).body(AGENT_MIDDLE_TURN)
    request = orjson.loads(body)
    assert len(body) == pytest.approx(400_000, rel=0.1)
    assert len(request["messages"]) == 2 + 2 * AGENT_MIDDLE_TURN
    assert len(request["tools"]) == 15


def test_each_turn_repeats_the_history_and_adds_2_6_percent() -> None:
    session = AgentSession(2)
    for turn in range(40, 120, 7):
        before, after = session.body(turn), session.body(turn + 1)
        assert after.startswith(before.removesuffix(b"]}"))
        assert (len(after) - len(before)) / len(before) == pytest.approx(0.026, rel=0.1)


def test_every_tool_call_is_answered_by_the_message_after_it() -> None:
    messages = orjson.loads(AgentSession(3).body(50))["messages"][2:]
    for call, result in zip(messages[::2], messages[1::2], strict=True):
        assert call["tool_calls"][0]["id"] == result["tool_call_id"]


def test_bodies_are_fixed_by_their_seed_and_distinct_between_seeds() -> None:
    assert AgentSession(4).body(20) == AgentSession(4).body(20)
    first, second = (orjson.loads(AgentSession(seed).body(20))["messages"] for seed in (4, 5))
    same = [a for a, b in zip(first[1:], second[1:], strict=True) if a == b]
    assert not same


def test_a_chat_body_is_about_1_kb() -> None:
    assert len(chat_body(1)) == pytest.approx(1000, rel=0.1)
    assert orjson.loads(chat_body(1, stream=True))["stream"] is True


def test_the_stream_has_100_chunks_then_done() -> None:
    *chunks, done = stream_events()
    parsed = [orjson.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]
    assert len(parsed) == CHUNKS
    assert parsed[-1]["usage"]["total_tokens"] == 356
    assert done == b"data: [DONE]\n\n"


def test_a_quick_run_of_the_bare_relay_reports_every_workload(tmp_path: Path) -> None:
    figures, picture = tmp_path / "overhead.json", tmp_path / "overhead.png"
    command = [sys.executable, "-m", "bench.overhead", "--quick", "--only", "bare"]
    command += ["--json", str(figures), "--plot", str(picture)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], timeout=100)
    result = orjson.loads(figures.read_bytes())
    assert result["absent"] == {}
    assert set(result["workloads"]) == {"json_1k", "agent_400k", "stream_100"}
    for contenders in result["workloads"].values():
        assert set(contenders) == {"direct", "bare"}
        row = contenders["bare"]
        assert row["cpu_ms"] > 0
        assert row["rss_mb"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["ratio"] is None
    assert picture.stat().st_size > 0
