from collections.abc import AsyncIterator

import pytest

from gateway.embedded import EmbeddedFleet, EngineConfig


@pytest.fixture
async def fleet() -> AsyncIterator[EmbeddedFleet]:
    config = EngineConfig(kv_capacity_tokens=65_536, max_model_len=32_768)
    async with EmbeddedFleet(pods=2, config=config, speedup=200) as fleet:
        yield fleet
        for engine in fleet.pods:
            assert engine.num_requests == 0
            assert engine.closed or engine.scheduler.pool.usage == 0
