"""Every command in the pages is run. A page's shell blocks go to bash as they stand, with a PATH of
nothing but what is named here: a program in neither list is not found there, and fails the test.

What needs a cluster, a container engine, a GPU or an agent is a stand-in that notes how it was
called; a function named after it says why and checks the call as far as that goes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from bench.replay.__main__ import app as replay
from bench.replay.sample import SAMPLE
from engine_patch.command import launch_command
from gateway import cli
from gateway.analysis.capacity import PODS, pod_of
from gateway.config import Settings
from gateway.embedded.fleet import EmbeddedFleet
from tests.kubernetes_api import ApiServer
from tests.programs import program
from tests.served import Running, gateway_over, until
from tests.test_docs import PAGES, ROOT

FENCED = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"sh", "python", "yaml", "json", "toml", "text", "mermaid"}
REAL = ("curl", "openssl")
"""Programs that are run as they are; `cachewise` too, but to serve and to replay."""
BIN = Path(sys.executable).parent
NOTE = f"""#!{sys.executable} -IS
import json, os, sys
name = os.path.basename(sys.argv[0])
if name == "cachewise" and sys.argv[1:2] not in (["serve"], ["replay"]):
    os.execv("{BIN / "cachewise"}", sys.argv)
if name == "git":
    os.mkdir(sys.argv[-1])
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([name, sys.argv[1:], dict(os.environ)]), file=file)
"""


@dataclass
class Call:
    """How a stand-in was called."""

    arguments: list[str]
    env: dict[str, str]
    gateway: Running
    """One that runs, with embedded pods; the page's address is replaced by its."""
    cluster: ApiServer

    def option(self, *names: str) -> str:
        (value,) = self.options(*names)
        return value

    def options(self, *names: str) -> list[str]:
        return [
            value
            for name, value in zip(self.arguments, self.arguments[1:], strict=False)
            if name in names
        ]


Check = Callable[[Call], Awaitable[None]]


# -- stand-ins ------------------------------------------------------------------------------------


async def cachewise(call: Call) -> None:
    """`replay` wants vLLM and minutes; tests/engine_patch/test_replay.py runs it."""
    command, *arguments = call.arguments
    if command == "serve":
        await serve(call)
        return
    assert command == "replay"
    context = typer.main.get_command(replay).make_context("replay", arguments)
    assert all(path.exists() for path in context.params["trace"])
    pod_of(*(context.params[name] for name in ("model", "gpu", "gpus")), least_tokens=1)


async def serve(call: Call) -> None:
    """Its port is taken, and the pods it names are not here: it starts with its very settings, in
    this process and on another port."""
    found: list[Settings] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "run", found.append)
        patch.chdir(call.env["PWD"])
        for name in [n for n in os.environ if n.startswith("CACHEWISE_")]:
            patch.delenv(name)
        for name, value in call.env.items():
            if name.startswith(("CACHEWISE_", "XDG_")):
                patch.setenv(name, value)
        ran = await asyncio.to_thread(typer.testing.CliRunner().invoke, cli.app, call.arguments)
        assert ran.exit_code == 0, ran.output
        (settings,) = found
        given = settings.model_dump() | {"log": {"level": "error"}}
        asked = len(call.cluster.requests)
        async with gateway_over(**given) as started:
            assert (await started.get("/health")).status == 200
            if settings.discovery.kind == "kubernetes":
                await until(lambda: len(call.cluster.requests) > asked)


async def git(call: Call) -> None:
    """The repository's address is the reader's."""
    assert call.arguments[0] == "clone"
    assert len(call.arguments) == 3


async def make(call: Call) -> None:
    """Would install everything anew, from PyPI; that there is such a target is looked at."""
    (target,) = call.arguments
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


async def pip(call: Call) -> None:
    """The package is installed here already."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install, wanted = call.arguments
    assert install == "install"
    name, _, extras = wanted.rstrip("]").partition("[")
    assert name == project["name"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


async def docker(call: Call) -> None:
    """There is no container engine; test_containers.py lints the files and tries what they hold."""
    command, *_, last = call.arguments
    assert command in ("build", "push")
    if command == "build":
        assert (ROOT / last / (call.options("-f") or ["Dockerfile"])[0]).is_file()
    image = call.option("-t") if command == "build" else last
    assert re.fullmatch(r"REGISTRY/cachewise-(gateway|vllm):[\d.]+", image)


async def helm(call: Call) -> None:
    """There is no cluster; Helm's own engine renders what it would install."""
    from tests import test_chart as manifests

    words = [a for a in call.arguments if not a.startswith("-")]
    command = next(a for a in ("install", "upgrade", "test", "rollback") if a in words)
    if command == "test":
        assert "helm.sh/hook: test" in "".join(manifests.rendered("defaults").values())
    if command not in ("install", "upgrade"):
        return
    name, chart = words[words.index(command) + 1 :][:2]
    values: dict[str, Any] = {}
    for file in call.options("-f"):
        values |= manifests.example(Path(file).stem)
        assert (ROOT / file).is_file()
    for setting in call.options("--set"):
        path, _, value = setting.partition("=")
        *above, last = path.split(".")
        place = values
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    assert ROOT / chart == manifests.CHART
    made = manifests.chart().render(values, name=name, namespace=call.option("--namespace"))
    assert ("Deployment", "cachewise") in manifests.objects_of(made)


async def kubectl(call: Call) -> None:
    """There is no cluster; the objects and Secret keys it names are those of the chart."""
    from tests import test_chart as manifests

    made = {(kind.lower(), name) for kind, name in manifests.objects("defaults")}
    for word in call.arguments:
        if re.fullmatch(r"[a-z]+/[a-z-]+", word):
            assert tuple(word.split("/")) in made
        if word.startswith("--from-literal="):
            key = word.removeprefix("--from-literal=").partition("=")[0]
            assert f"key: {key}" in "".join(manifests.rendered("medium").values())


async def vllm(call: Call) -> None:
    """Wants a GPU; tests/engine starts it on the CPU with the same flags."""
    command = launch_command("MODEL")
    for name in ("--scheduler-cls", "--middleware"):
        for value in call.options(name):
            assert value == command[command.index(name) + 1]
    for events in call.options("--kv-events-config"):
        assert json.loads(events)["enable_kv_cache_events"] is True


async def turn(call: Call, base: str, path: str, key: str, model: str) -> None:
    assert base.startswith(call.gateway.url)
    address = base.removeprefix(call.gateway.url) + path
    body = {
        "model": model,
        "max_tokens": 16,
        "messages": [{"role": "user", "content": "hi"}],
    }
    reply = await call.gateway.post(address, body, headers={"authorization": f"Bearer {key}"})
    assert reply.status == 200, reply.text


async def claude(call: Call) -> None:
    """tests/agents runs the agents themselves; here what a page tells one makes a turn."""
    env = call.env
    for model in (call.option("--model"), env["ANTHROPIC_DEFAULT_HAIKU_MODEL"]):
        base, key = env["ANTHROPIC_BASE_URL"], env["ANTHROPIC_AUTH_TOKEN"]
        await turn(call, base, "/v1/messages", key, model)


async def litellm(call: Call) -> None:
    model = call.option("-m", "--model").removeprefix("openai/")
    base, key = call.env["OPENAI_API_BASE"], call.env["OPENAI_API_KEY"]
    await turn(call, base, "/chat/completions", key, model)


async def qwen(call: Call) -> None:
    env = call.env
    base, key = env["OPENAI_BASE_URL"], env["OPENAI_API_KEY"]
    await turn(call, base, "/chat/completions", key, env["OPENAI_MODEL"])


async def cline(call: Call) -> None:
    base, key = call.option("--baseurl"), call.option("--apikey")
    await turn(call, base, "/chat/completions", key, call.option("--modelid"))


STAND_INS: dict[str, Check] = {
    **{made.__name__: made for made in (cachewise, git, make, pip, docker, helm, kubectl, vllm)},
    **{made.__name__: made for made in (claude, qwen, cline)},
    "mini": litellm,
    "aider": litellm,
}


# -- pages ----------------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    found = FENCED.findall(page.read_text())
    return [re.sub(rf"(?m)^{indent}", "", text) for indent, its, text in found if its == language]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A clone's folder as far as pages speak of it, with stand-ins as its programs."""
    for entry in ("k8s", "engine_patch", "Dockerfile"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in STAND_INS:
        (programs / name).write_text(NOTE)
        (programs / name).chmod(0o755)
    for name in REAL:
        (programs / name).symlink_to(program(name, name))
    for folder in (".claude/projects", ".codex/sessions"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(SAMPLE, tmp_path / folder)
    (tmp_path / "recordings").mkdir()
    shutil.copy(ROOT / "tests" / "data" / "recording-1.jsonl", tmp_path / "recordings")
    (tmp_path / "keys").write_text("my-team: a-key-of-my-team-0123456789\n")
    (tmp_path / "cachewise.yaml").write_text(blocks(ROOT / "docs" / "configuration.md", "yaml")[0])
    return tmp_path


@asynccontextmanager
async def around(place: Path) -> AsyncIterator[tuple[Running, ApiServer]]:
    """What commands reach: a gateway, and a cluster's API."""
    with pytest.MonkeyPatch.context() as patch:
        async with (
            EmbeddedFleet(pods=2) as fleet,
            gateway_over(*fleet.urls) as gateway,
            ApiServer().serving() as cluster,
        ):
            patch.setenv("KUBECONFIG", str(cluster.kubeconfig(place / "kubeconfig")))
            yield gateway, cluster


async def ran(
    script: str, place: Path, gateway: Running, cluster: ApiServer
) -> list[tuple[str, Call]]:
    """Run a block; what it called of the stand-ins."""
    replaced = {
        "http://127.0.0.1:8080": gateway.url,
        "<this repository>": "REPOSITORY",
        r"\bMODEL\b": "embedded",
        r"\bQwen/Qwen3-8B\b": "embedded",
        r"\b(YOUR_)?KEY\b": "any",
        r"\bPOD\b": "pod-0",
        r"\bcurl\b": "curl --silent --show-error --fail-with-body",
    }
    for pattern, value in replaced.items():
        script = re.sub(pattern, value, script)
    calls = place / "calls"
    calls.write_text("")
    bash = await asyncio.create_subprocess_exec(
        *("/bin/bash", "-euo", "pipefail", "-c", f"{script}\nwait"),
        cwd=place,
        env={
            "PATH": str(place / ".venv" / "bin"),
            "HOME": str(place),
            "XDG_STATE_HOME": str(place / "state"),
            "CALLS": str(calls),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(bash.communicate(), 60)
    assert bash.returncode == 0, f"{script}\n{said.decode()}"
    return [
        (name, Call(arguments, env, gateway, cluster))
        for name, arguments, env in map(json.loads, calls.read_text().splitlines())
    ]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "sh")], ids=lambda page: str(page.relative_to(ROOT))
)
async def test_the_commands_of_a_page_work(page: Path, place: Path) -> None:
    async with around(place) as (gateway, cluster):
        for block in blocks(page, "sh"):
            for name, call in await ran(block, place, gateway, cluster):
                await STAND_INS[name](call)


async def test_a_command_that_nobody_runs_is_found(place: Path) -> None:
    async with around(place) as (gateway, cluster):
        for bad in ("kubectx fleet", "cachewise reload", "curl http://127.0.0.1:8080/v1/none"):
            with pytest.raises(AssertionError, match=bad.split()[0]):
                await ran(f"export X=1\n{bad}\nexport Y=2", place, gateway, cluster)
        ((name, call),) = await ran("cachewise serve --prt 1", place, gateway, cluster)
        with pytest.raises(AssertionError, match="prt"):
            await STAND_INS[name](call)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_in_a_block_without_a_language(page: Path) -> None:
    languages = {language for _, language, _ in FENCED.findall(page.read_text())}
    assert languages <= LANGUAGES


def test_the_table_of_kv_tokens_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for pod in PODS:
        row = f"| {pod.name} | {pod.model.kv_bytes_per_token:,} | {pod.kv_tokens:,} |"
        assert row in page, row
