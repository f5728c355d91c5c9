"""What a replay answers, and the pods it can be asked about."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from bench.engine.roofline import DENSE_32B, OVERHEAD_S, Roofline
from bench.replay.__main__ import app, fleet_of, loads
from bench.replay.answer import answer
from bench.replay.sample import SAMPLE
from bench.replay.traces import BLOCK_TOKENS, Turn
from gateway.analysis import capacity


def row(policy: str, load: int = 24, **more: Any) -> dict[str, Any]:
    told = {"session_s": 100.0, "prefilled_tokens": 1e6, "p99_s": 20.0, "lost_tokens": {}}
    return {"policy": policy, "per_pod": load, "pods": 1, "seed": 1} | told | more


LOST = {"lost_tokens": {"evicted": 900_000}}


def test_the_answer_tells_the_gain_and_in_the_same_sentence_what_gets_worse() -> None:
    better: dict[str, Any] = {"session_s": 47.6, "prefilled_tokens": 0.62e6, "p99_s": 44.0}
    said = answer([row("stock", **LOST), row("unpatched", **better), row("cachewise", **better)])
    assert said == (
        "At 24 concurrent sessions: 38 % less prefill and sessions 2.1x sooner than on stock vLLM"
        " (100 s → 48 s), but the 99th percentile of a turn 2.2x longer (20 s → 44 s); the patch"
        " adds nothing to what admission does."
    )


def test_where_everything_fits_the_answer_is_that_nothing_changes() -> None:
    rows = [row("stock", 4), row("cachewise", 4), row("stock", **LOST), row("cachewise")]
    assert answer(rows) == (
        "At 4 concurrent sessions everything fits: nothing changes."
        " At 24 concurrent sessions nothing changes."
    )


def test_a_loss_is_told_and_so_is_what_pods_without_the_patch_do() -> None:
    rows = [
        row("stock"),
        row("unpatched", session_s=50.0),
        row("cachewise", session_s=125.0, prefilled_tokens=1.2e6, p99_s=10.0),
    ]
    assert answer(rows) == (
        "At 24 concurrent sessions: 20 % more prefill and sessions 1.2x later than on stock vLLM"
        " (100 s → 125 s), and the 99th percentile of a turn 2.0x shorter (20 s → 10 s); without"
        " the patch no less prefill and sessions 2.0x sooner, with the same 99th percentile of a"
        " turn (20 s → 20 s)."
    )


def test_seeds_are_averaged() -> None:
    rows = [row("stock", session_s=s, seed=s) for s in (100.0, 300.0)]
    rows += [row("unpatched", session_s=s, seed=s) for s in (50.0, 150.0)]
    assert "sessions 2.0x sooner than on stock vLLM (200 s → 100 s)" in answer(rows)


def test_without_both_policies_there_is_no_answer() -> None:
    assert answer([row("stock"), row("paper")]).startswith("No answer: it takes the policies stock")


def test_the_usual_pod_is_that_of_the_published_figures() -> None:
    fleet = fleet_of(None, None, None, None, 1)
    assert (fleet.kv_tokens, fleet.roofline) == (700_000, DENSE_32B)
    named = Roofline.of(capacity.USUAL)
    for tokens, cached in ((2_048, 0), (64, 100_000)):
        told = [
            each.step_s(each.prefill_flops(tokens, cached), 16, 500_000)
            for each in (DENSE_32B, named)
        ]
        assert told[0] == pytest.approx(told[1], rel=0.02)
        assert told[0] > OVERHEAD_S


def test_model_and_gpus_are_meant_by_parts_of_their_names() -> None:
    fleet = fleet_of("devstral", "a100", None, None, 2)
    assert fleet.name == "Devstral-Small-24B on 1xA100-80GB"
    assert fleet.kv_tokens == capacity.Pod(capacity.MISTRAL_24B, capacity.A100, 1).kv_tokens
    assert fleet_of("480b", None, None, None, 1).name == "Qwen3-Coder-480B FP8 on 8xH200-141GB"
    assert fleet_of("70b", "b200", None, None, 1).name == "Llama-3.3-70B FP8 on 1xB200-180GB"
    assert fleet_of(None, "h100", None, 123_456, 1).kv_tokens == 123_456


def test_more_gpus_and_fewer_active_parameters_are_faster() -> None:
    def step_s(pod: capacity.Pod) -> float:
        roofline = Roofline.of(pod)
        return roofline.step_s(roofline.prefill_flops(2_048, 50_000), 1, 100_000)

    two, four = (capacity.Pod(capacity.QWEN_32B, capacity.H100, n) for n in (2, 4))
    assert step_s(four) < step_s(two)
    assert step_s(capacity.Pod(capacity.QWEN_30B, capacity.H100, 2)) < step_s(two)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "qwen"], "--model qwen: could be Qwen3-Coder-30B-A3B, Qwen2.5-Coder-32B"),
        (["--gpu", "tpu"], "--gpu tpu: allowed are A100-80GB, H100-80GB"),
        (["--model", "480b", "--gpus", "2"], "leaves 0 tokens of KV beside the weights"),
    ],
)
def test_pods_that_cannot_be_are_refused(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, [str(SAMPLE), *options])
    assert done.exit_code == 2
    assert words in done.stderr


def test_loads_are_half_of_what_fits_all_and_twice() -> None:
    fleet = fleet_of(None, None, None, 100 * BLOCK_TOKENS * 8, 1)
    piece = [Turn(tuple(range(n)), 1, 0.0, "tool") for n in (50, 150)]
    assert loads([piece] * 40, fleet) == [4, 8, 16]
    assert loads([piece] * 10, fleet) == [4, 8]
    assert loads([piece] * 3, fleet) == [3]
