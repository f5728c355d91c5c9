"""vLLM's own source, from PyPI: its tests of the scheduler, and the next release's internals."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from engine_patch.vllm_source import fetch
from tests.engine_patch import run_vllm_core_tests as core_tests

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / ".cache" / "vllm-source"
T = TypeVar("T")


def with_pypi(call: Callable[[], T]) -> T:
    try:
        return call()
    except urllib.error.URLError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"PyPI does not answer: {error}")


@pytest.mark.timeout(900)
def test_vllms_own_core_tests_pass_patched_wherever_they_pass_on_stock(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stock, patched = with_pypi(lambda: core_tests.run(SOURCE))
    with capsys.disabled():
        print(f"\nvLLM's tests/v1/core, stock:   {core_tests.counts(stock)}")
        print(f"vLLM's tests/v1/core, patched: {core_tests.counts(patched)}")
    assert core_tests.lost(stock, patched) == []
    passed = [test for test, outcome in stock.items() if outcome == "passed"]
    for part in ("scheduler::", "async_scheduler::", "prefix_caching::", "priority_scheduling"):
        assert any(part in test for test in passed), part


@pytest.mark.timeout(300)
def test_vllm_0_33_has_all_that_is_touched() -> None:
    root = with_pypi(lambda: fetch("0.33.0", SOURCE, "vllm/v1/"))
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('vllm', 'torch', 'gateway')))  # an import would fail\n"
        "runpy.run_module('engine_patch.vllm_seam', run_name='__main__', alter_sys=True)\n"
    )
    checked = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "internals found" in checked.stdout
