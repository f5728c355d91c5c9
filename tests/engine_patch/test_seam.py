from __future__ import annotations

from pathlib import Path

import pytest

from engine_patch import command, vllm_seam


def test_what_a_vllm_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vllm/v1/core/sched"
    path.mkdir(parents=True)
    (path / "scheduler.py").write_text(
        "class Scheduler:\n"
        "    def __init__(self): self.waiting = []\n"
        "    def schedule(self, budget): ...\n"
    )
    missing = "\n".join(vllm_seam.missing_from(tmp_path))
    assert "scheduler.Scheduler.schedule('self', 'throttle_prefills') now takes" in missing
    assert "Scheduler._free_request_blocks not found" in missing
    assert "Scheduler.waiting not" not in missing
    assert "block_pool.BlockPool not found" in missing


def test_a_new_method_of_the_queue_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "vllm/v1/core"
    path.mkdir(parents=True)
    (path / "kv_cache_utils.py").write_text(
        "class FreeKVCacheBlockQueue:\n    def pop_coldest(self): ...\n"
    )
    missing = "\n".join(vllm_seam.missing_from(tmp_path))
    assert "FreeKVCacheBlockQueue.pop_coldest is new and not implemented" in missing


def test_without_vllm_the_check_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(vllm_seam.IncompatibleVllmError, match="not installed"):
        vllm_seam.check()


def test_the_switch_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHEWISE_PATCH", raising=False)
    assert not vllm_seam.switched_off()
    monkeypatch.setenv("CACHEWISE_PATCH", "off")
    assert vllm_seam.switched_off()


@pytest.mark.engine
def test_the_installed_vllm_has_all_that_is_touched() -> None:
    vllm_seam.check()


def test_the_launch_line_quotes_what_it_must() -> None:
    line = command.launch_line("org/model", port=9, extra=["--served-model-name", "a b"])
    assert line.startswith("vllm serve org/model --host 0.0.0.0 --port 9 --scheduler-cls engine_")
    assert line.endswith("--served-model-name 'a b'")
