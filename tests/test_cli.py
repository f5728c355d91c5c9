"""The real command in a process of its own, and the server it sets up."""

import asyncio
import importlib.util
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trustme
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import gateway
from gateway import cli, connect
from gateway.config import ConfigError, Settings, load_settings

COMMAND = str(Path(sys.executable).parent / "cachewise")


def cachewise(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CACHEWISE_")}
    return subprocess.run(
        [COMMAND, *arguments],
        check=False,
        capture_output=True,
        encoding="utf-8",
        env=clean | env,
        timeout=60,
    )


def one_error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("cachewise: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("cachewise: ").rstrip("\n")


def test_version_is_the_package_version() -> None:
    assert cachewise("version").stdout == f"cachewise {gateway.__version__}\n"


def test_serve_refuses_a_bad_value_from_any_source_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("relay: {idle_timeout: 3}\n")
    line = one_error_line(cachewise("serve", CACHEWISE_RELAY__IDLE_TIMEOUT_S="abc"))
    assert line.startswith("relay.idle_timeout_s: 'abc' is not a number; allowed: ")
    line = one_error_line(cachewise("serve", "--port", "abc"))
    assert line.startswith("port: 'abc' is not a whole number; allowed: ")
    line = one_error_line(cachewise("serve", "--config", str(file)))
    assert line.startswith("relay.idle_timeout: unknown key; did you mean 'relay.idle_timeout_s'?")
    line = one_error_line(cachewise("serve", "--config", str(tmp_path / "none.yaml")))
    assert "cannot be read (No such file or directory)" in line


def test_serve_says_in_one_line_that_the_port_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = one_error_line(cachewise("serve", "--port", str(port)))
    assert line == f"port: {port} is in use on 127.0.0.1; allowed: a free port, 0 for any"


def test_serve_says_in_one_line_that_a_tls_file_is_missing() -> None:
    line = one_error_line(cachewise("serve", CACHEWISE_TLS__CERTFILE="/nowhere/tls.crt"))
    assert line.startswith("tls.certfile: '/nowhere/tls.crt' cannot be read (No such file")


def test_an_address_of_another_machine_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"host: '192\.0\.2\.1' cannot be listened on"):
        cli.listen(Settings(host="192.0.2.1", port=0))


def test_config_check_accepts_a_good_file_and_refuses_a_bad_one(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("pods: [http://a:8000]\nlog: {format: json}\n")
    assert cachewise("config", "check", str(file)).stdout == f"{file}: ok\n"
    file.write_text("log: {format: xml}\n")
    line = one_error_line(cachewise("config", "check", str(file)))
    assert line == (
        f"log.format: 'xml' is not one of the choices; allowed: plain, json (from {file})"
    )


def test_config_show_gives_every_value_its_source_and_hides_secrets(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(
        "probe: {interval_s: 7}\nport: 1\npods: [{url: http://a:1, api_key: pod-secret}]\n"
    )
    result = cachewise(
        *("config", "show", "--config", str(file), "--port", "3", "--model-alias", "*=qwen"),
        CACHEWISE_PORT="2",
        CACHEWISE_API_KEYS="acme=client-secret-0123456789",
        CACHEWISE_ACCESS__ADMIN_TOKEN="admin-secret",
    )
    assert result.returncode == 0
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    assert rows["port"] == ["3", "flag"]
    assert rows["models.aliases"] == ["*=qwen", "flag"]
    assert rows["probe.interval_s"] == ["7.0", "file"]
    assert rows["pods"] == ["http://a:1", "file"]
    assert rows["access.api_keys"] == ["acme", "(hidden)", "env"]
    assert rows["access.admin_token"] == ["(hidden)", "env"]
    assert rows["log.level"] == ["info", "default"]
    assert "secret" not in result.stdout
    assert "sha256" not in result.stdout


def test_engine_command_prints_the_launch_line_of_a_patched_pod() -> None:
    flags = ["--max-model-len", "4096", "--served-model-name", "a name"]
    result = cachewise(
        *("engine", "command", "org/model", "--host", "127.0.0.1", "--port", "9", "--", *flags)
    )
    assert (result.returncode, result.stderr) == (0, "")
    words = shlex.split(result.stdout)
    assert words[:7] == ["vllm", "serve", "org/model", "--host", "127.0.0.1", "--port", "9"]
    assert words[-4:] == flags
    for flag in ("--scheduler-cls", "--middleware"):
        module, _, _ = words[words.index(flag) + 1].rpartition(".")
        assert importlib.util.find_spec(module), module
    assert shlex.split(cachewise("engine", "command", "m").stdout)[3:7] == [
        *("--host", "0.0.0.0", "--port", "8000")
    ]


def test_engine_command_refuses_a_flag_of_vllm_before_the_dashes() -> None:
    result = cachewise("engine", "command", "m", "--max-model-len", "4096")
    assert result.returncode == 2
    assert "--max-model-len" in result.stderr


def test_replay_says_what_it_lacks(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("{}")
    done = cachewise("replay", str(trace), "--policy", "nonsense")
    assert done.returncode == 2
    assert "--policy nonsense: allowed are stock" in done.stderr
    done = cachewise("replay", str(trace))
    assert done.returncode == 2
    assert "vLLM is not installed" in done.stderr or "no trace of a known format" in done.stderr


def test_keys_new_prints_a_key_that_its_line_admits() -> None:
    first, second = cachewise("keys", "new", "acme").stdout.splitlines()
    key = first.partition(":")[2].strip()
    line = second.partition(":")[2].strip()
    keys = load_settings({}, None, {"CACHEWISE_API_KEYS": f"acme={key}"}).access.api_keys
    assert line == f"acme: {keys['acme'][0].get_secret_value()}"
    assert one_error_line(cachewise("keys", "new", "a b")).startswith("tenant: 'a b' is not a name")


def test_connect_covers_every_client_with_the_given_address() -> None:
    text = cachewise("connect", "--url", "http://gw:9/v1/", "--model", "qwen").stdout
    for client in connect.CLIENTS:
        assert f"## {client.name}\n" in text
    assert "ANTHROPIC_BASE_URL=http://gw:9\n" in text
    assert 'base_url = "http://gw:9/v1"' in text
    assert "/v1/v1" not in text
    assert "{" not in text.replace("{\n", "").replace('{"', "").replace(": {}", "")


def test_the_files_in_the_guide_are_well_formed() -> None:
    import json
    import tomllib

    parsers = {"toml": tomllib.loads, "json": json.loads, "yaml": yaml.safe_load}
    read = {}
    for client in connect.CLIENTS:
        text = client.setup.format(url="http://gw:9", model="org/m", key="k")
        if client.language in parsers:
            read[client.name] = parsers[client.language](text)
        elif client.language == "python":
            compile(text, client.name, "exec")
    assert read["Codex"]["model_providers"]["cachewise"]["base_url"] == "http://gw:9/v1"
    assert read["OpenCode"]["provider"]["cachewise"]["models"] == {"org/m": {}}
    assert read["Continue"]["models"][0]["apiBase"] == "http://gw:9/v1"


def test_the_banner_says_what_is_served_and_who_can_reach_it() -> None:
    text = cli.banner(Settings(), 8080)
    assert "http://127.0.0.1:8080/health" in text
    assert "http://127.0.0.1:8080/metrics" in text
    assert "http://127.0.0.1:8080/ui" in text
    assert "2 embedded pods: a stand-in that generates no real text" in text
    assert "loopback only" in text
    assert "ANTHROPIC_BASE_URL=http://127.0.0.1:8080 " in text
    for name in ("Claude Code", "Codex", "OpenCode", "mini-swe-agent", "OpenAI", "Anthropic"):
        assert name in text

    env = {"CACHEWISE_PODS": "http://a:1", "CACHEWISE_HOST": "0.0.0.0"}
    text = cli.banner(load_settings({}, None, env), 8080)
    assert "1 pod\n" in text
    assert "WITHOUT API keys" in text
    env["CACHEWISE_API_KEYS"] = "acme=0123456789abcdef"
    text = cli.banner(load_settings({}, None, env), 8080)
    assert "clients need an API key" in text
    assert "0123456789abcdef" not in text


async def echo(request: Request) -> PlainTextResponse:
    status = 426 if request.headers.get("upgrade") else 200
    return PlainTextResponse(request.url.scheme, status)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[int]:
    listening = cli.listen(settings)
    port = listening.getsockname()[1]
    server = cli.server(settings, Starlette(routes=[Route("/", echo)]))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield port
    finally:
        server.should_exit = True
        await task


async def test_tls_files_make_the_server_speak_https_with_that_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(key)
    settings = load_settings({"port": 0, "tls": {"certfile": cert, "keyfile": key}}, None, {})
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with serving(settings) as port:
        async with httpx.AsyncClient(verify=trusting) as client:
            answer = await client.get(f"https://127.0.0.1:{port}/")
        assert (answer.status_code, answer.text) == (200, "https")
        async with httpx.AsyncClient() as distrusting:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await distrusting.get(f"https://127.0.0.1:{port}/")
    assert f"https://127.0.0.1:{port}" in cli.banner(settings, port)


async def test_the_server_names_no_software_and_hands_an_upgrade_to_the_app_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    async with serving(Settings(port=0)) as port, httpx.AsyncClient() as client:
        answer = await client.get(f"http://127.0.0.1:{port}/")
        assert "server" not in answer.headers
        refused = await client.get(f"http://127.0.0.1:{port}/", headers=upgrade)
        assert refused.status_code == 426
    assert "upgrade" not in caplog.text.lower()


async def test_localhost_and_ipv6_can_be_listened_on() -> None:
    for host in ("localhost", "::1"):
        try:
            listening = cli.listen(Settings(host=host, port=0))
        except ConfigError:
            assert host == "::1", "a machine may have no IPv6"
            continue
        listening.close()
    assert "http://[::1]:8080/health" in cli.banner(Settings(host="::1"), 8080)


@pytest.mark.skipif(importlib.util.find_spec("gateway.app") is None, reason="needs gateway.app")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_starts_answers_and_ends_in_order_on_a_signal(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", "0", "--log-format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Finished server process" in errors
    finally:
        process.kill()
        process.communicate()
