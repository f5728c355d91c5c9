"""Which tests go to one worker: those of a file, and those of files that share real vLLM pods."""

from __future__ import annotations

from typing import Final

import pytest
from xdist.scheduler import LoadFileScheduling

GOES_WITH: Final = {
    "tests/engine/test_pods.py": "tests/engine/test_gateway.py",
    "tests/engine_patch/test_pod_events.py": "tests/engine_patch/test_pod.py",
}


class ByPods(LoadFileScheduling):
    """Files that need the same pods are one unit of work: starting them costs a minute."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return GOES_WITH.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    return ByPods(config, log)
