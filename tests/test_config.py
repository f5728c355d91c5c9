"""Where settings come from, and the one line that a wrong one gives."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gateway import config
from gateway.config import ConfigError, Settings, load_settings, resolve

DOCS = Path(__file__).parent.parent / "docs"

# A few settings of each kind, with values that are in range.
VALUES: dict[tuple[str, ...], st.SearchStrategy[Any]] = {
    ("port",): st.integers(0, 65535),
    ("host",): st.sampled_from(["127.0.0.1", "0.0.0.0", "::1", "localhost"]),
    ("routing", "policy"): st.sampled_from(
        ["expected_ttft", "least_loaded", "round_robin", "session_hash"]
    ),
    ("relay", "idle_timeout_s"): st.floats(0.001, 1e6),
    ("relay", "max_attempts"): st.integers(1, 10),
    ("models", "aliases"): st.dictionaries(
        st.text("abc*-/.", min_size=1), st.text("xyz-/.", min_size=1), min_size=1
    ),
    ("access", "forward_client_key"): st.booleans(),
    ("log", "level"): st.sampled_from(["debug", "info", "warning", "error"]),
}
LAYER = st.fixed_dictionaries({}, optional=VALUES)


def nested(layer: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, value in layer.items():
        if len(path) == 1:
            result[path[0]] = value
        else:
            result.setdefault(path[0], {})[path[1]] = value
    return result


def as_variable(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return str(value)


def value_at(settings: Settings, path: tuple[str, ...]) -> Any:
    found: Any = settings
    for part in path:
        found = getattr(found, part)
    return found


def error(
    flags: dict[str, Any] | None = None,
    file: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags or {}, file, env or {})
    text = str(caught.value)
    assert "\n" not in text
    return text


@given(flags=LAYER, env=LAYER, file=LAYER)
def test_flags_win_over_environment_over_file_over_defaults(
    tmp_path_factory: pytest.TempPathFactory,
    flags: dict[tuple[str, ...], Any],
    env: dict[tuple[str, ...], Any],
    file: dict[tuple[str, ...], Any],
) -> None:
    yaml_file = tmp_path_factory.getbasetemp() / "gateway.yaml"
    yaml_file.write_text(yaml.safe_dump(nested(file)))
    variables = {config.env_name(path): as_variable(value) for path, value in env.items()}
    settings, sources = resolve(nested(flags), yaml_file, variables)
    for path in VALUES:
        for layer, source in ((flags, "flag"), (env, "env"), (file, "file")):
            if path in layer:
                assert value_at(settings, path) == layer[path]
                assert sources[".".join(path)] == source
                break
        else:
            assert value_at(settings, path) == value_at(Settings(), path)
            assert sources[".".join(path)] == "default"


def test_settings_built_in_code_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEWISE_PORT", "1")
    assert Settings().port == 8080


def test_a_flag_of_none_and_an_empty_variable_are_not_given() -> None:
    assert load_settings({"port": None}, None, {"CACHEWISE_HOST": ""}) == Settings()


def test_the_variables_of_a_kubernetes_service_named_like_us_are_ignored() -> None:
    env = {
        "CACHEWISE_PORT": "tcp://10.0.0.1:8080",
        "CACHEWISE_SERVICE_HOST": "10.0.0.1",
        "CACHEWISE_SERVICE_PORT_HTTP": "8080",
        "CACHEWISE_PORT_8080_TCP_ADDR": "10.0.0.1",
        "CACHEWISE_GATEWAY_PORT": "tcp://10.0.0.2:80",
    }
    assert load_settings({}, None, env) == Settings()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://pod:8000", "http://pod:8000"),
        ("http://pod:8000/", "http://pod:8000"),
        ("http://pod:8000/v1", "http://pod:8000"),
        ("https://pod/v1/", "https://pod"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_pod_address_is_reduced_to_its_origin(given: str, url: str) -> None:
    assert load_settings({"pods": [given]}, None, {}).pods[0].url == url


@pytest.mark.parametrize(
    "bad",
    [
        "pod:8000",
        "ftp://pod",
        "http://",
        "http://pod:0",
        "http://pod:99999",
        "http://pod/api",
        "http://pod?x=1",
        "http://u:p@pod",
    ],
)
def test_what_is_no_pod_address_is_refused(bad: str) -> None:
    text = error({"pods": [bad]})
    assert text.startswith("pods.0.url: ")
    assert "allowed: http://HOST[:PORT]" in text


def test_pods_come_from_a_variable_a_file_or_flags_alike(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("pods: [http://a:1, {url: http://b:2, name: bee, api_key: s3cret}]")
    a, b = load_settings({}, file, {}).pods
    assert (a.url, b.url, b.name) == ("http://a:1", "http://b:2", "bee")
    assert b.api_key is not None
    assert b.api_key.get_secret_value() == "s3cret"
    env = {"CACHEWISE_PODS": "http://a:1, http://b:2"}
    assert [pod.url for pod in load_settings({}, file, env).pods] == ["http://a:1", "http://b:2"]
    json_env = {"CACHEWISE_PODS": '[{"url": "http://c:3", "name": "see"}]'}
    assert load_settings({}, file, json_env).pods[0].name == "see"


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (
            {"CACHEWISE_RELAY__IDLE_TIMEOUT_S": "abc"},
            "relay.idle_timeout_s: 'abc' is not a number; allowed: a number > 0 "
            "(from CACHEWISE_RELAY__IDLE_TIMEOUT_S)",
        ),
        (
            {"CACHEWISE_RELAY__IDLE_TIMEOUT_S": "inf"},
            "relay.idle_timeout_s: 'inf' is out of range; allowed: a number > 0 "
            "(from CACHEWISE_RELAY__IDLE_TIMEOUT_S)",
        ),
        (
            {"CACHEWISE_PORT": "99999"},
            "port: '99999' is out of range; allowed: a whole number from 0 to 65535 "
            "(from CACHEWISE_PORT)",
        ),
        (
            {"CACHEWISE_PORT": "8080.5"},
            "port: '8080.5' is not a whole number; allowed: a whole number from 0 to 65535 "
            "(from CACHEWISE_PORT)",
        ),
        (
            {"CACHEWISE_ROUTING__POLICY": "fastest"},
            "routing.policy: 'fastest' is not one of the choices; allowed: expected_ttft, "
            "least_loaded, round_robin, session_hash (from CACHEWISE_ROUTING__POLICY)",
        ),
        (
            {"CACHEWISE_ACCESS__FORWARD_CLIENT_KEY": "maybe"},
            "access.forward_client_key: 'maybe' is not true or false; allowed: true or false "
            "(from CACHEWISE_ACCESS__FORWARD_CLIENT_KEY)",
        ),
        (
            {"CACHEWISE_MODELS__ALIASES": "a"},
            "models.aliases: 'a' is not a list of A=B; allowed: NAME=SERVED[,NAME=SERVED…] "
            "(from CACHEWISE_MODELS__ALIASES)",
        ),
        (
            {"CACHEWISE_PODS": "[{"},
            "pods: '[{' is not valid JSON; allowed: URL[,URL…], or a list of URL or of url, name, "
            "api_key, dp_ranks, kv_events, kv_events_replay (from CACHEWISE_PODS)",
        ),
        (
            {"CACHEWISE_PODS": '[{"name": "x"}]'},
            "pods.0.url: is missing; allowed: http://HOST[:PORT] or https://HOST[:PORT] "
            "(from CACHEWISE_PODS)",
        ),
        (
            {"CACHEWISE_PODS": "http://a,http://a/v1"},
            "pods: 'http://a,http://a/v1' has the url 'http://a' twice; allowed: URL[,URL…], or a "
            "list of URL or of url, name, api_key, dp_ranks, kv_events, kv_events_replay (from "
            "CACHEWISE_PODS)",
        ),
        (
            {"CACHEWISE_PODS": '[{"url": "http://a", "kv_events": "tcp://*:5557"}]'},
            "pods.0.kv_events: 'tcp://*:5557' is not an endpoint of ZeroMQ; allowed: "
            "tcp://HOST:PORT (from CACHEWISE_PODS)",
        ),
        (
            {"CACHEWISE_PODS": '[{"url": "http://a", "kv_events_replay": "tcp://a:5558"}]'},
            "pods.0.kv_events_replay: 'tcp://a:5558' is set without kv_events; allowed: "
            "tcp://HOST:PORT, with kv_events (from CACHEWISE_PODS)",
        ),
        (
            {"CACHEWISE_DISCOVERY__KV_EVENTS_REPLAY_PORT": "5558"},
            "discovery.kv_events_replay_port: '5558' is set without discovery.kv_events_port; "
            "allowed: a whole number from 1 to 65535, with kv_events_port (from "
            "CACHEWISE_DISCOVERY__KV_EVENTS_REPLAY_PORT)",
        ),
        (
            {"CACHEWISE_REDIS_URL": "redis:6379"},
            "sharing.redis_url: the value (not shown) is not the address of a Redis; allowed: "
            "redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], rediss://… (TLS) (from "
            "CACHEWISE_SHARING__REDIS_URL)",
        ),
        (
            {"CACHEWISE_SHARING__READ_TIMEOUT_S": "2"},
            "sharing.read_timeout_s: '2' is out of range; allowed: a number > 0 and ≤ 1 (from "
            "CACHEWISE_SHARING__READ_TIMEOUT_S)",
        ),
        (
            {"CACHEWISE_SHARING__PREFIX": "a b"},
            "sharing.prefix: 'a b' is not of that form; allowed: up to 64 letters, digits and "
            ". _ : { } - (from CACHEWISE_SHARING__PREFIX)",
        ),
        (
            {"CACHEWISE_RELAY": "5"},
            "relay: '5' is not a section; allowed: its keys connect_timeout_s, "
            "first_byte_timeout_s, idle_timeout_s, max_attempts, max_body_bytes "
            "(in the environment)",
        ),
        (
            {"CACHEWISE_EMBEDDED__MAX_MODEL_LEN": "800000"},
            "embedded.max_model_len: '800000' is above embedded.kv_capacity_tokens (700000); "
            "allowed: a whole number ≥ 1 (from CACHEWISE_EMBEDDED__MAX_MODEL_LEN)",
        ),
    ],
)
def test_a_bad_value_is_one_line_of_key_value_and_what_is_allowed(
    env: dict[str, str], line: str
) -> None:
    assert error(env=env) == line


@pytest.mark.parametrize(
    ("yaml_text", "start"),
    [
        ("prot: 1", "prot: unknown key; did you mean 'port'? allowed: host, port, "),
        (
            "relay: {idle_timeout: 3}",
            "relay.idle_timeout: unknown key; did you mean 'relay.idle_timeout_s'? allowed: "
            "connect_timeout_s, ",
        ),
        ("idle_timeout_s: 3", "idle_timeout_s: unknown key; did you mean 'relay.idle_timeout_s'? "),
        (
            "pods: [{url: http://a, apikey: 1}]",
            "pods.0.apikey: unknown key; did you mean 'pods.0.api_key'? allowed: url, name, ",
        ),
        ("zzz: 1", "zzz: unknown key; allowed: host, "),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, yaml_text: str, start: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(yaml_text)
    text = error(file=file)
    assert text.startswith(start)
    assert str(file) in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [1", "is not YAML in line 1"),
        (b"- a\n- b", "holds no settings"),
        (b"just text", "holds no settings"),
        (b"\xff\xfe\xff", "is not a text file"),
        (b"a: \x07", "holds a character that YAML does not allow"),
    ],
)
def test_a_file_that_is_no_settings_file_is_named(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_bytes(content)
    text = error(file=file)
    assert text.startswith(str(file))
    assert reason in text


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert error(file=tmp_path / "none.yaml").startswith(f"{tmp_path / 'none.yaml'}: ")
    assert "Is a directory" in error(file=tmp_path)


def test_an_empty_file_and_an_empty_section_mean_defaults(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("")
    assert load_settings({}, file, {}) == Settings()
    file.write_text("relay:\n")
    assert load_settings({}, file, {}) == Settings()


@pytest.mark.parametrize(
    "env",
    [
        {"CACHEWISE_API_KEYS": "acme=hunter2"},
        {"CACHEWISE_API_KEYS": "acme hunter2"},
        {"CACHEWISE_API_KEYS": "acme=sha256:hunter2hunter2"},
        {"CACHEWISE_API_KEYS": '{"acme": "hunter2"'},
        {"CACHEWISE_API_KEYS": "a b?=hunter2hunter2hunter2"},
        {"CACHEWISE_ACCESS": "hunter2"},
        {"CACHEWISE_PODS": '[{"api_key": "hunter2"}]'},
        {"CACHEWISE_PODS": '[{"url": "http://a", "api_key": "hunter2"'},
        {"CACHEWISE_PODS": '[{"url": "http://a", "apikey": "hunter2"}]'},
        {"CACHEWISE_PODS": "http://user:hunter2@pod"},
        {"CACHEWISE_ADMIN_TOKEN": "hunter2"},
        {"CACHEWISE_REDIS_URL": "http://:hunter2@redis"},
        {"CACHEWISE_SHARING": "redis://:hunter2@redis"},
        {"CACHEWISE_REDIS": "redis://:hunter2@redis"},
    ],
)
def test_no_error_line_shows_a_secret(env: dict[str, str]) -> None:
    assert "hunter2" not in error(env=env)


def test_api_keys_are_kept_hashed_from_every_source(tmp_path: Path) -> None:
    key, other, third = (
        "a-key-of-16-characters",
        "another-key-of-some-length",
        "the-third-of-the-keys",
    )
    hashed = config.hash_key(other)
    file = tmp_path / "keys"
    file.write_text(f"# who\nacme: {key}\n\n'umbrella': \"{hashed}\"\n")
    env = {"CACHEWISE_ACCESS__API_KEYS_FILE": str(file), "CACHEWISE_API_KEYS": f"acme={third}"}
    settings = load_settings({}, None, env)
    stored = {t: [k.get_secret_value() for k in ks] for t, ks in settings.access.api_keys.items()}
    assert stored == {"acme": [config.hash_key(key), config.hash_key(third)], "umbrella": [hashed]}
    assert key not in repr(settings)
    again = Settings.model_validate({"access": {"api_keys": settings.access.api_keys}})
    assert again.access.api_keys == settings.access.api_keys


@pytest.mark.parametrize("text", ["", "# nobody yet\n", "\n\n"])
def test_a_keys_file_without_a_key_lets_nobody_in_by_mistake(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"access\.api_keys_file: .* holds no key"):
        load_settings({"access": {"api_keys_file": str(file)}}, None, {})


def test_a_keys_file_says_so_if_it_lets_everyone_in(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("everyone\n")
    assert load_settings({"access": {"api_keys_file": str(file)}}, None, {}).access.api_keys == {}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("a=one-key-of-16-characters,b=one-key-of-16-characters", "one key for two tenants"),
        ("cw-abcdefghijklmnopqrstuv=team-of-16-characters", "a key where a tenant is to be"),
        ("hunter2secret=team", "a key that is too short"),
    ],
)
def test_api_keys_that_cannot_be_meant_are_refused_without_showing_them(
    keys: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        load_settings({}, None, {"CACHEWISE_API_KEYS": keys})
    assert "abcdefgh" not in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_keys_sent_in_headers_lose_their_newline_and_have_to_fit(tmp_path: Path) -> None:
    settings = load_settings({}, None, {"CACHEWISE_ACCESS__POD_API_KEY": "key\n"})
    assert settings.access.pod_api_key is not None
    assert settings.access.pod_api_key.get_secret_value() == "key"
    for bad in ("k\u00e9y", "a\nb", " \n"):
        with pytest.raises(ConfigError, match=r"admin_token: the value \(not shown\) is not of"):
            load_settings({}, None, {"CACHEWISE_ACCESS__ADMIN_TOKEN": bad})


def from_yaml(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return load_settings({}, file, {})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("port: 1\nport: 8081\n", "in line 2 \\(a key stands twice\\)"),
        ("access:\n  api_keys: {}\naccess: {}\n", "in line 3"),
        ("access: {admin_token: *hunter2secret}", "is not YAML in line 1"),
        ("access: {admin_token: !hunter2secret x}", "is not YAML in line 1"),
        ("port: !!int hunter2secret", "is none"),
        ("[" * 3_000, "nested too deeply"),
        ("port: " + "9" * 5_000, "c.yaml"),
    ],
)
def test_yaml_that_cannot_be_meant_is_one_line_without_its_values(
    tmp_path: Path, text: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        from_yaml(tmp_path, text)
    assert "hunter2" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_words_of_yaml_are_what_they_look_like(tmp_path: Path) -> None:
    settings = from_yaml(tmp_path, "admission: {mode: off}\nhints: {enabled: off}\nport: 81\n")
    assert (settings.admission.mode, settings.hints.enabled, settings.port) == ("off", False, 81)


@pytest.mark.parametrize("sign", ["?token=hunter2", "#hunter2", "?API_KEY=hunter2"])
def test_what_hangs_on_an_address_is_not_shown(sign: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings({}, None, {"CACHEWISE_PODS": f"http://pod:8000/{sign}"})
    assert "hunter2" not in str(refused.value)


def test_a_pods_name_is_its_own() -> None:
    pods = [{"url": "http://a:1"}, {"url": "http://b:1", "name": "a:1"}]
    with pytest.raises(ConfigError, match="name 'a:1' twice"):
        load_settings({"pods": pods}, None, {})


def test_pods_given_like_a_service_link_are_no_service_link() -> None:
    with pytest.raises(ConfigError, match="pods"):
        load_settings({}, None, {"CACHEWISE_PODS": "tcp://10.0.0.1:8000"})
    assert load_settings({}, None, {"CACHEWISE_PORT": "tcp://10.0.0.1:80"}).port == 8080


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    certificate = trustme.CA().issue_cert("127.0.0.1")
    cert, key = folder / "tls.crt", folder / "tls.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(key)
    return cert, key


def test_a_tls_pair_that_loads_is_taken(pair: tuple[Path, Path]) -> None:
    settings = load_settings({"tls": {"certfile": pair[0], "keyfile": pair[1]}}, None, {})
    assert (settings.tls.certfile, settings.tls.keyfile) == pair


def test_a_tls_pair_that_cannot_serve_is_one_clear_line(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair[0].parent)  # long paths are cut in messages
    cert, key = (Path(path.name) for path in pair)
    other_key, encrypted = Path("other.key"), Path("encrypted.key")
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(other_key)
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(key.read_bytes(), None)
    encrypted.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    missing = Path("none")
    for tls, start in (
        ({"certfile": missing, "keyfile": key}, f"tls.certfile: '{missing}' cannot be read (No "),
        ({"certfile": cert, "keyfile": missing}, f"tls.keyfile: '{missing}' cannot be read (No "),
        ({"certfile": cert}, "tls.keyfile: is missing; allowed: "),
        ({"keyfile": key}, f"tls.keyfile: '{key}' is set without tls.certfile; "),
        ({"certfile": cert, "keyfile": other_key}, f"tls.keyfile: '{other_key}' does not load "),
        ({"certfile": cert, "keyfile": encrypted}, f"tls.keyfile: '{encrypted}' does not load "),
        ({"certfile": __file__, "keyfile": key}, f"tls.keyfile: '{key}' does not load with "),
    ):
        assert error({"tls": tls}).startswith(start)


def test_loopback_only_is_told_from_the_host() -> None:
    for host, expected in (
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("gateway.example", False),
    ):
        assert Settings(host=host).loopback_only is expected


@pytest.mark.parametrize(
    ("module", "page"),
    [("gateway.config", "configuration.md"), ("gateway.connect", "connect.md")],
)
def test_the_generated_pages_are_in_sync(module: str, page: str) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", module], capture_output=True, check=True, encoding="utf-8"
    )
    assert (DOCS / page).read_text(encoding="utf-8") == printed.stdout


def test_the_reference_explains_every_setting() -> None:
    text = config.reference()
    for path, field in config.leaves():
        assert f"| `{'.'.join(path)}` |" in text
        assert field.description
    assert not re.search(r"\| *\|", text)
