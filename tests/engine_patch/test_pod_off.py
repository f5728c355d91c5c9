"""`CACHEWISE_PATCH=off`: stock vLLM under the same launch line."""

from __future__ import annotations

import pytest

from tests.engine_patch import agents
from tests.engine_patch.conftest import Pod
from tests.engine_patch.test_pod import DIALECTS, HINTS, generate

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


def test_a_pod_switched_off_serves_as_stock_and_says_that_it_is_inactive(
    switched_off: Pod,
) -> None:
    client = switched_off.client
    for path in DIALECTS:
        for hints in (agents.reuse("s", 50.0), "not even an envelope"):
            assert generate(switched_off, path, "s", kv_hints=hints).status_code == 200
    assert client.get(f"{HINTS}/capabilities").json()["active"] is False
    assert client.get(f"{HINTS}/sessions").json() == {"sessions": []}
    assert client.post(HINTS, json=agents.reuse("s", 50.0)).status_code == 501
    assert agents.samples(client, "cachewise:patch_active") == {"": 0}
    assert not switched_off.logged("CacheWise patch active")
    assert not switched_off.logged("Traceback")
