"""The clients of `python -m bench.replay --real`, on the pods of the other tests here."""

import asyncio
from pathlib import Path

import pytest

from bench.replay import real
from bench.replay.scaled import ScaledTurn
from tests.engine import pods, tiny_model
from tests.engine.pods import BLOCK_SIZE_TOKENS, VllmPod

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

SESSION = [
    ScaledTurn(400, 0.0, calls_tool=True),
    ScaledTurn(60, 0.05, calls_tool=True),
    ScaledTurn(60, 0.05, calls_tool=False),
]


def test_clients_call_tools_and_find_their_last_prompt_cached(
    vllm_pods: list[VllmPod], tmp_path: Path
) -> None:
    language = real.Language.of(tiny_model.write_unweighted(tmp_path / "m", tiny_model.Shape()))
    progress: list[None] = []
    with pods.gateway(
        vllm_pods, tmp_path / "log", {"CACHEWISE_FORECAST__STATE_FILE": "off"}
    ) as url:
        # Alone: beside others, on pods this fast, a turn may well go where nobody waits.
        seen = asyncio.run(real._clients(url, [SESSION], language, lambda: progress.append(None)))
    assert len(seen) == len(progress) == 3
    first, second, last = seen
    assert [turn.called_tool for turn in seen] == [True, True, False]
    assert first.cached_tokens < first.prompt_tokens / 2
    for before, after in ((first, second), (second, last)):
        assert after.cached_tokens > before.prompt_tokens - 2 * BLOCK_SIZE_TOKENS
        assert 0 < after.first_token_s <= after.latency_s
