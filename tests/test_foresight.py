"""The forecast at work in a gateway: seen in the API, learned from, kept, and never in the way."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.dialects.turn import ToolCall
from gateway.foresight import Foresight, matched_durations
from gateway.predictor import Context, store
from tests.served import Exchange, Pod, gateway_over, until

SESSION = {"x-claude-code-session-id": "5d0f0d3e-0000-4000-8000-000000000001"}


def answer_with(calls: list[tuple[str, dict[str, Any]]]) -> Any:
    """A pod that asks for these tools."""

    async def answer(exchange: Exchange) -> None:
        content: list[dict[str, Any]] = [{"type": "text", "text": "hm"}]
        content += [
            {"type": "tool_use", "id": f"toolu_{i}", "name": name, "input": arguments}
            for i, (name, arguments) in enumerate(calls)
        ]
        body = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": content,
            "stop_reason": "tool_use" if calls else "end_turn",
            "usage": {"input_tokens": 1000, "output_tokens": 10},
        }
        exchange.whole(json.dumps(body).encode())

    return answer


def turn(number: int, calls: int = 1) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
    for _ in range(number):
        uses = [
            {"type": "tool_use", "id": f"toolu_{i}", "name": "Bash", "input": {}}
            for i in range(calls)
        ]
        results = [
            {"type": "tool_result", "tool_use_id": f"toolu_{i}", "content": "x"}
            for i in range(calls)
        ]
        messages += [{"role": "assistant", "content": uses}, {"role": "user", "content": results}]
    tools = [{"name": "Bash", "input_schema": {"type": "object"}}]
    return {"model": "m", "max_tokens": 16, "messages": messages, "tools": tools}


async def test_an_idle_session_shows_when_it_is_expected_back() -> None:
    pod = Pod(answer_with([("Bash", {"command": "go test ./... && echo s3cr3t_value"})]))
    async with pod, gateway_over(pod) as gateway:
        assert (await gateway.post("messages", turn(0), headers=SESSION)).status == 200
        await until(gateway.settled)
        listed = (await gateway.get("/v1/cachewise/sessions")).json["data"]
        forecast = listed[0]["forecast"]
        assert 0.9 < forecast["p_return"] <= 1
        remaining = forecast["remaining_s"]
        assert 0 <= remaining["p10"] < remaining["p50"] < remaining["p90"]
        assert forecast["expected_remaining_s"] > 0
        detail = await gateway.get(f"/v1/cachewise/sessions/{listed[0]['id']}")
        curve = detail.json["forecast"]["survival"]
        assert 2 <= len(curve) <= 32
        assert "s3cr3t" not in detail.text
        assert await gateway.metric("cachewise_forecast_nodes") > 100


async def test_a_gap_is_judged_and_learned_from() -> None:
    pod = Pod(answer_with([("Bash", {"command": "just zap"})]))
    async with pod, gateway_over(pod) as gateway:
        for number in range(4):
            headers = SESSION | {"x-claude-code-prev-tool-durations": "Bash=20"}
            assert (await gateway.post("messages", turn(number), headers=headers)).status == 200
            await until(gateway.settled)
        predictor = gateway.gateway.foresight.predictor
        assert predictor.observed_total == 3
        assert predictor.table.find(("sub", "Bash", "just", "zap")) is not None
        assert await gateway.metric('cachewise_forecast_gaps_total{tool_kind="shell"}') == 3
        below = 'cachewise_forecast_gaps_below_total{quantile="0.975",tool_kind="shell"}'
        assert await gateway.metric(below) <= 3


@pytest.mark.parametrize("method", ["fell_idle", "came_back"])
async def test_a_fault_of_the_forecast_is_counted_and_the_turn_goes_on(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Foresight, method, broken)
    pod = Pod(answer_with([("Bash", {"command": "ls"})]))
    async with pod, gateway_over(pod) as gateway:
        reply = await gateway.post("messages", turn(0), headers=SESSION)
        assert reply.status == 200
        await until(gateway.settled)
        assert await gateway.metric('cachewise_degraded_total{stage="forecast"}') == 1


async def test_what_was_learned_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "forecast.npz"
    pod = Pod(answer_with([("Bash", {"command": "just zap"})]))
    async with pod:
        async with gateway_over(pod, forecast={"state_file": str(path)}) as gateway:
            for number in range(3):
                await gateway.post("messages", turn(number), headers=SESSION)
                await until(gateway.settled)
            assert not path.exists()
        assert path.exists()
        async with gateway_over(pod, forecast={"state_file": str(path)}) as gateway:
            predictor = gateway.gateway.foresight.predictor
            assert predictor.observed_total == 2
            assert predictor.table.find(("sub", "Bash", "just", "zap")) is not None


async def test_it_is_saved_at_an_interval_and_a_disk_that_refuses_stops_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "a-file").write_text("")
    refused = tmp_path / "a-file" / "forecast.npz"
    pod = Pod(answer_with([("Bash", {"command": "just zap"})]))
    settings = {"state_file": str(tmp_path / "good"), "save_interval_s": 0.05}
    async with pod, gateway_over(pod, forecast=settings) as gateway:
        for number in range(2):
            await gateway.post("messages", turn(number), headers=SESSION)
            await until(gateway.settled)
        await until((tmp_path / "good").exists)
    settings["state_file"] = str(refused)
    async with pod, gateway_over(pod, forecast=settings) as gateway:
        for number in range(2):
            await gateway.post("messages", turn(number), headers=SESSION)
            await until(gateway.settled)
        failed = gateway.gateway.metrics.forecast_saves.labels("failed")
        await until(lambda: failed._value.get() >= 1)
        assert (await gateway.post("messages", turn(2), headers=SESSION)).status == 200


def test_the_clients_durations_find_their_calls() -> None:
    predictor = store.priors()
    calls = [
        ToolCall.of("", "Bash", '{"command": "go test ./..."}'),
        ToolCall.of("", "Read", '{"file_path": "a"}'),
        ToolCall.of("", "Bash", '{"command": "ls"}'),
    ]
    forecast = predictor.forecast(calls, "tool", Context("s"))
    assert matched_durations(forecast, b"Bash=14;Read=5;Bash=33000") == [33.0, 0.005, 0.014]
    assert matched_durations(forecast, b"Read=5") == [None, 0.005, None]
    for odd in (b"", b";;;", b"Bash", b"=4", b"Bash=x;Bash=1", b"Bash=-1", b"\xff=1", b"Read=1e3"):
        assert matched_durations(forecast, odd) is None
    assert matched_durations(predictor.forecast([], "human", Context("s")), b"Bash=1") is None
