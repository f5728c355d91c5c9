"""The Helm chart, rendered by Helm's own engine."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine_patch.command import launch_command
from gateway import config
from gateway.config import Settings
from tests.kubernetes_api import ApiServer, endpoint, pod, slice_of
from tests.served import Pod, gateway_over, until

helm = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this platform")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

K8S = Path(__file__).resolve().parents[1] / "k8s"
CHART = K8S / "chart"
KEY = "team: sha256:" + "0" * 64
NOT_KUBERNETES = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute"}
OLDEST, NEWEST = "1.27", "1.37"

Json = dict[str, Any]


def example(name: str) -> Json:
    loaded: Json = yaml.safe_load((K8S / "examples" / f"{name}.yaml").read_text())
    return loaded


SECRETS = {
    "apiKeys": [KEY],
    "adminToken": "an-admin-token",
    "podApiKey": "a-key-of-pods",
    "hintsToken": "a-hints-token",
    "hubToken": "a-hub-token",
    "redisUrl": "redis://:a-redis-password@redis:6379/0",
}
CASES: dict[str, Json] = {
    "defaults": {},
    **{file.stem: example(file.stem) for file in sorted((K8S / "examples").glob("*.yaml"))},
    "secrets": {"secrets": SECRETS},
    "deployment": {"vllm": {"kind": "Deployment", "storage": {"accessMode": "ReadWriteMany"}}},
    "no storage, no GPU, stock vLLM": {
        "vllm": {"storage": {"enabled": False}, "gpuResource": "", "patch": False}
    },
    "shared claim": {"vllm": {"storage": {"existingClaim": "models"}}},
    "ranks": {"vllm": {"tensorParallelSize": 2, "dataParallelSize": 4}},
    "KV events": {"vllm": {"dataParallelSize": 4, "kvEvents": True}},
    "keda": {"vllm": {"keda": {"enabled": True}}},
    "routes": {
        "ingress": {"enabled": True, "tlsSecret": "tls"},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["h.example"]},
    },
    "monitoring": {
        "monitoring": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True},
            "prometheusRule": {"enabled": True},
            "dashboards": {"enabled": True},
        }
    },
    "placement": {
        part: {
            "podAnnotations": {"a": "b"},
            "podLabels": {"team": "x"},
            "nodeSelector": {"pool": "p"},
            "tolerations": [{"key": "k", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "high",
            "extraEnv": [{"name": "X", "value": "1"}],
        }
        for part in ("gateway", "vllm")
    }
    | {"imagePullSecrets": [{"name": "pull"}], "nameOverride": "router"},
    "plain gateway": {
        "gateway": {
            "autoscaling": {"enabled": False},
            "podDisruptionBudget": {"enabled": False},
            "serviceAccount": {"create": False, "name": "mine"},
            "topologySpread": [],
            "config": {"log": {"level": "debug"}},
        },
        "networkPolicy": {"enabled": False},
    },
    "static pods": {
        "vllm": {"enabled": False},
        "gateway": {"config": {"pods": ["http://a:8000", {"url": "http://b:8000", "name": "b"}]}},
        "networkPolicy": {"gatewayFrom": [{"podSelector": {}}]},
    },
    "recording": {"gateway": {"recording": {"enabled": True}}},
    "recording into a claim": {
        "gateway": {
            "recording": {"enabled": True, "existingClaim": "turns"},
            "config": {"record": {"max_bytes": 1 << 40}},
        }
    },
    "DNS": {
        "vllm": {"enabled": False},
        "gateway": {"config": {"discovery": {"kind": "dns", "dns_name": "vllm.other.svc"}}},
    },
}


@functools.cache
def chart() -> Any:
    return helm.Chart.load(CHART)


@functools.cache
def rendered(case: str) -> dict[str, str]:
    files: dict[str, str] = chart().render(CASES[case], name="cachewise", namespace="fleet")
    return files


def objects_of(files: dict[str, str]) -> dict[tuple[str, str], Json]:
    """Kind and name → object. A name that is used twice fails."""
    found: dict[tuple[str, str], Json] = {}
    for path, text in files.items():
        if not path.endswith(".txt"):
            for item in filter(None, yaml.safe_load_all(text)):
                key = item["kind"], item["metadata"]["name"]
                assert key not in found
                found[key] = item
    return found


def objects(case: str) -> dict[tuple[str, str], Json]:
    return objects_of(rendered(case))


def container(item: Json) -> Json:
    only: Json = item["spec"]["template"]["spec"]["containers"][0]
    return only


def workload(case: str) -> Json:
    return next(
        item
        for (kind, name), item in objects(case).items()
        if name.endswith("-vllm") and kind in ("StatefulSet", "Deployment")
    )


@pytest.fixture(autouse=True)
def _schemas_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes_validate.utils.schema_contents", _schema)


_schema = functools.cache(sys.modules["kubernetes_validate.utils"].schema_contents)


def environment_of(item: Json, made: dict[tuple[str, str], Json]) -> dict[str, str]:
    """The variables of a workload's container, those from the chart's Secret too."""
    env = {}
    for variable in container(item).get("env", ()):
        source = variable.get("valueFrom", {}).get("secretKeyRef")
        if source is None:
            env[variable["name"]] = variable["value"]
        elif ("Secret", source["name"]) in made:
            env[variable["name"]] = made["Secret", source["name"]]["stringData"][source["key"]]
    return env


def settings_from(made: dict[tuple[str, str], Json], folder: Path) -> Settings:
    """The gateway's settings as its container would find them."""
    gateway = made["Deployment", next(n for k, n in made if k == "ConfigMap")]
    name = gateway["metadata"]["name"]
    text = made["ConfigMap", name]["data"]["cachewise.yaml"]
    secret = made.get(("Secret", name), {}).get("stringData", {})
    (folder / "api-keys").write_text(secret.get("api-keys", KEY))
    file = folder / "cachewise.yaml"
    file.write_text(text.replace("/etc/cachewise/secret", str(folder)))
    env = environment_of(gateway, made)
    return config.load_settings({}, file, env)


def settings_of(case: str, folder: Path) -> Settings:
    return settings_from(objects(case), folder)


@pytest.mark.parametrize("case", CASES)
def test_every_object_is_valid_kubernetes(case: str) -> None:
    for (kind, name), item in objects(case).items():
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name)
        if kind not in NOT_KUBERNETES:
            for version in (OLDEST, NEWEST):
                kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_helm_has_no_complaint(case: str) -> None:
    report = helm.lint(CHART, CASES[case], strict=True, namespace="fleet")
    assert not report["errors"]
    assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("case", CASES)
def test_recordings_lie_where_the_gateway_can_write(case: str, tmp_path: Path) -> None:
    settings = settings_of(case, tmp_path)
    gateway = next(item for (kind, _), item in objects(case).items() if kind == "Deployment")
    recording = CASES[case].get("gateway", {}).get("recording", {})
    assert (settings.record.directory is not None) == recording.get("enabled", False)
    if settings.record.directory is None:
        return
    mounts = {
        Path(m["mountPath"]): m["name"]
        for m in container(gateway)["volumeMounts"]
        if not m.get("readOnly")
    }
    places = [settings.record.directory, *settings.record.directory.parents]
    name = next(mounts[place] for place in places if place in mounts)
    (volume,) = (v for v in gateway["spec"]["template"]["spec"]["volumes"] if v["name"] == name)
    claim = recording.get("existingClaim")
    assert volume.get("persistentVolumeClaim", {}).get("claimName") == claim
    if claim:
        assert settings.record.max_bytes == 1 << 40


@pytest.mark.parametrize("case", CASES)
def test_the_gateway_takes_the_settings_of_the_chart(case: str, tmp_path: Path) -> None:
    settings = settings_of(case, tmp_path)
    gateway = next(item for (kind, _), item in objects(case).items() if kind == "Deployment")
    spec = gateway["spec"]["template"]["spec"]
    assert settings.host == "0.0.0.0"
    assert container(gateway)["ports"][0]["containerPort"] == settings.port
    pause_s = int(container(gateway)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > pause_s + settings.shutdown_grace_s
    assert bool(settings.pods) != (settings.discovery.kind != "static")
    watches = settings.discovery.kind == "kubernetes"
    assert spec["automountServiceAccountToken"] is watches
    assert any(kind == "Role" for kind, _ in objects(case)) is watches


@pytest.mark.parametrize("case", CASES)
def test_what_selects_pods_selects_those_of_the_chart(case: str) -> None:
    made = objects(case)
    templates = [
        i["spec"]["template"]["metadata"]["labels"]
        for i in made.values()
        if i["kind"] in ("Deployment", "StatefulSet")
    ]
    for (kind, name), item in made.items():
        spec = item.get("spec", {})
        wanted = {
            "Service": lambda s: s["selector"],
            "PodDisruptionBudget": lambda s: s["selector"]["matchLabels"],
            "NetworkPolicy": lambda s: s["podSelector"]["matchLabels"],
            "PodMonitor": lambda s: s["selector"]["matchLabels"],
        }.get(kind)
        if wanted is not None:
            hits = sum(wanted(spec).items() <= labels.items() for labels in templates)
            assert hits == 1, f"{kind} {name} selects {hits} workloads"
        if kind in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = spec["scaleTargetRef"]
            assert "replicas" not in made[target["kind"], target["name"]]["spec"]


@pytest.mark.parametrize("case", CASES)
def test_containers_of_the_gateway_run_without_privileges(case: str) -> None:
    for (kind, name), item in objects(case).items():
        if kind not in ("Deployment", "Pod") or name.endswith("-vllm"):
            continue
        spec = item["spec"] if kind == "Pod" else item["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        for one in spec["containers"]:
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert one["resources"]["limits"]["memory"]


def test_it_may_list_and_watch_and_nothing_else() -> None:
    role = objects("defaults")["Role", "cachewise"]
    assert role["rules"] == [
        {"apiGroups": [group], "resources": [plural], "verbs": ["list", "watch"]}
        for group, plural in (("discovery.k8s.io", "endpointslices"), ("", "pods"))
    ]
    only = objects("bring-your-own-vllm")["Role", "cachewise"]["rules"]
    assert [rule["resources"] for rule in only] == [["endpointslices"]]


@pytest.mark.parametrize(
    ("case", "extra"),
    [
        ("defaults", []),
        ("small", CASES["small"]["vllm"]["extraArgs"]),
        ("ranks", ["--tensor-parallel-size", "2", "--data-parallel-size", "4"]),
    ],
)
def test_vllm_is_started_by_the_patchs_launch_line(case: str, extra: list[str]) -> None:
    model = CASES[case].get("vllm", {}).get("model", chart().values["vllm"]["model"])
    assert container(workload(case))["command"] == launch_command(model, extra=extra)


def test_a_stock_vllm_gets_no_flag_of_the_patch() -> None:
    command = container(workload("no storage, no GPU, stock vLLM"))["command"]
    assert not any("engine_patch" in part for part in command)


def test_gpus_are_those_of_all_ranks_and_each_rank_is_a_pod(tmp_path: Path) -> None:
    for which in ("limits", "requests"):
        assert container(workload("ranks"))["resources"][which]["nvidia.com/gpu"] == 8
    assert "nvidia.com/gpu" not in str(
        workload("no storage, no GPU, stock vLLM")["spec"]["template"]["spec"]["containers"]
    )
    assert settings_of("ranks", tmp_path).discovery.dp_ranks == 4


def test_the_startup_probe_gives_the_weights_their_time() -> None:
    probe = container(workload("large"))["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 120 * 60


@pytest.mark.parametrize(
    ("case", "claim", "templates"),
    [
        ("defaults", None, 1),
        ("deployment", "cachewise-vllm-models", 0),
        ("shared claim", "models", 0),
        ("no storage, no GPU, stock vLLM", None, 0),
    ],
)
def test_weights_are_kept_where_the_values_say(
    case: str, claim: str | None, templates: int
) -> None:
    spec = workload(case)["spec"]
    assert len(spec.get("volumeClaimTemplates", ())) == templates
    volumes = {v["name"]: v for v in spec["template"]["spec"]["volumes"]}
    models = volumes.get("models", {})
    assert models.get("persistentVolumeClaim", {}).get("claimName") == claim
    assert (("PersistentVolumeClaim", claim) in objects(case)) is (case == "deployment")


def test_secrets_reach_their_containers_and_no_other_object(tmp_path: Path) -> None:
    made = objects("secrets")
    for key, item in made.items():
        if key[0] != "Secret":
            for secret in (*list(SECRETS.values())[1:], "0" * 64):
                assert str(secret) not in json.dumps(item)
    settings = settings_of("secrets", tmp_path)
    assert settings.access.admin_token is not None
    assert settings.access.admin_token.get_secret_value() == "an-admin-token"
    assert settings.access.pod_api_key is not None
    assert settings.hints.token is not None
    assert set(settings.access.api_keys) == {"team"}
    assert settings.sharing.redis_url is not None
    assert settings.sharing.redis_url.get_secret_value() == SECRETS["redisUrl"]
    env = {
        v["name"]: v.get("valueFrom", {}).get("secretKeyRef", {}).get("key")
        for v in container(workload("secrets"))["env"]
    }
    assert env == {
        "HF_HOME": None,
        "VLLM_API_KEY": "pod-api-key",
        "CACHEWISE_HINTS_TOKEN": "hints-token",
        "HF_TOKEN": "hub-token",
    }
    assert not any(kind == "Secret" for kind, _ in objects("medium"))


def test_a_change_of_settings_or_keys_rolls_the_gateway() -> None:
    def sums(values: Json) -> dict[str, str]:
        made = objects_of(chart().render(values, name="cachewise", namespace="fleet"))
        found: dict[str, str] = made["Deployment", "cachewise"]["spec"]["template"]["metadata"]
        return found["annotations"]  # type: ignore[return-value]

    first = sums({})
    assert sums({"gateway": {"config": {"log": {"level": "debug"}}}}) != first
    assert sums({"secrets": {"adminToken": "other"}}) != first
    assert sums({"gateway": {"replicas": 5}}) == first


def test_streams_are_neither_buffered_nor_cut_on_their_way() -> None:
    made = objects("routes")
    annotations = made["Ingress", "cachewise"]["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io/"
    assert annotations[prefix + "proxy-buffering"] == "off"
    assert int(annotations[prefix + "proxy-read-timeout"]) > Settings().relay.first_byte_timeout_s
    assert made["HTTPRoute", "cachewise"]["spec"]["rules"][0]["timeouts"] == {
        "request": "0s",
        "backendRequest": "0s",
    }


def test_the_autoscaler_counts_turns_where_the_cluster_serves_them() -> None:
    metrics = objects("large")["HorizontalPodAutoscaler", "cachewise"]["spec"]["metrics"]
    assert [metric["type"] for metric in metrics] == ["Resource", "Pods"]
    metrics = objects("defaults")["HorizontalPodAutoscaler", "cachewise"]["spec"]["metrics"]
    assert [metric["type"] for metric in metrics] == ["Resource"]


def test_only_the_gateway_and_monitoring_reach_vllm() -> None:
    rule = objects("defaults")["NetworkPolicy", "cachewise-vllm"]["spec"]["ingress"]
    assert len(rule) == 1
    peers = rule[0]["from"]
    assert peers[0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    assert len(peers) == 2


def test_pods_publish_kv_events_where_the_gateway_looks_for_them(tmp_path: Path) -> None:
    command = container(workload("KV events"))["command"]
    config = json.loads(command[command.index("--kv-events-config") + 1])
    discovery = settings_of("KV events", tmp_path).discovery
    assert config == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{discovery.kv_events_port}",
        "replay_endpoint": f"tcp://*:{discovery.kv_events_replay_port}",
    }
    open_ports = [
        {"port": 5557, "endPort": 5560},
        {"port": 6557, "endPort": 6560},
    ]
    made = objects("KV events")
    rules = made["NetworkPolicy", "cachewise-vllm"]["spec"]["ingress"]
    assert [rule["ports"] for rule in rules] == [[{"port": "http"}], open_ports]
    assert len(rules[1]["from"]) == 1
    egress = made["NetworkPolicy", "cachewise"]["spec"]["egress"]
    assert [{"port": 8000}, *open_ports] in [rule["ports"] for rule in egress]
    assert "--kv-events-config" not in container(workload("defaults"))["command"]
    assert settings_of("defaults", tmp_path).discovery.kv_events_port is None


def test_dashboards_and_rules_are_taken_from_files(tmp_path: Path) -> None:
    copy = tmp_path / "chart"
    shutil.copytree(CHART, copy, symlinks=False)
    for folder in ("dashboards", "rules"):
        shutil.rmtree(copy / folder, ignore_errors=True)
        (copy / folder).mkdir()
    board = {"title": "Fleet {{ pod }}", "panels": []}
    (copy / "dashboards" / "Fleet_overview.json").write_text(json.dumps(board))
    groups = [
        {
            "name": "g",
            "rules": [
                {"alert": "A", "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }}"}}
            ],
        }
    ]
    (copy / "rules" / "alerts.yaml").write_text(yaml.safe_dump({"groups": groups}))
    files = helm.Chart.load(copy).render(CASES["monitoring"], name="cachewise", namespace="fleet")
    made = objects_of(files)
    config_map = made["ConfigMap", "cachewise-fleet-overview"]
    assert json.loads(config_map["data"]["Fleet_overview.json"]) == board
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert made["PrometheusRule", "cachewise"]["spec"]["groups"] == groups


def test_the_chart_packs_the_boards_and_the_rules() -> None:
    made = objects("monitoring")
    for name in ("fleet-overview", "sessions-and-tools", "kv-and-hints", "gateway"):
        data = made["ConfigMap", f"cachewise-{name}"]["data"]
        file = CHART / "dashboards" / f"{name}.json"
        assert json.loads(data[f"{name}.json"]) == json.loads(file.read_text())
        assert len(data[f"{name}.json"]) < 262_144, "more than `kubectl apply` annotates"
    rules = yaml.safe_load((CHART / "rules" / "cachewise.yaml").read_text())
    assert made["PrometheusRule", "cachewise"]["spec"] == rules
    assert not any(kind == "PrometheusRule" for kind, _ in objects("defaults"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gatway": {}}, r"additional properties 'gatway' not allowed"),
        (
            {"vllm": {"kind": "DaemonSet"}},
            r"/vllm/kind.*must be one of 'StatefulSet', 'Deployment'",
        ),
        ({"vllm": {"replicas": -1}}, r"/vllm/replicas.*minimum: got -1, want 0"),
        ({"vllm": {"model": ""}}, r"/vllm/model.*minLength: got 0, want 1"),
        ({"vllm": {"storage": {"size": "200 GB"}}}, r"/vllm/storage/size.*does not match pattern"),
        ({"vllm": {"extraArgs": "--x 1"}}, r"/vllm/extraArgs.*got string, want array"),
        ({"gateway": {"drainSeconds": 0}}, r"/gateway/drainSeconds.*minimum: got 0, want 1"),
        ({"gateway": {"service": {"port": 99999}}}, r"/gateway/service/port.*maximum"),
        (
            {"gateway": {"config": {"routing": {"policy": "random"}}}},
            r"/gateway/config/routing/policy.*must be one of 'expected_ttft'",
        ),
        (
            {"gateway": {"config": {"relay": {"max_attempts": 99}}}},
            r"/gateway/config/relay/max_attempts.*maximum: got 99, want 10",
        ),
        (
            {"gateway": {"config": {"relay": {"retries": 1}}}},
            r"/gateway/config/relay.*additional properties 'retries' not allowed",
        ),
        (
            {"gateway": {"config": {"access": {"admin_token": "x"}}}},
            r"/gateway/config/access.*additional properties 'admin_token' not allowed",
        ),
        ({"secrets": {"redisUrl": "redis:6379"}}, r"/secrets/redisUrl.*does not match pattern"),
        ({"secrets": {"apiKeys": ["no key"]}}, r"/secrets/apiKeys/0.*does not match pattern"),
        ({"httpRoute": {"enabled": True}}, r"/httpRoute/parentRefs.*minItems: got 0, want 1"),
        ({"vllm": {"enabled": False}}, r"no vLLM is named; set gateway.config.pods, or"),
        (
            {"secrets": {"existingSecret": "mine", "adminToken": "a-token"}},
            r"secrets.existingSecret takes the place of all other secrets",
        ),
    ],
)
def test_bad_values_fail_and_say_why(values: Json, message: str) -> None:
    with pytest.raises(helm.HelmError) as caught:
        chart().render(values, name="cachewise", namespace="fleet")
    assert re.search(message, str(caught.value)), str(caught.value)


def test_kubernetes_waits_as_long_as_the_gateway_is_set_to() -> None:
    values = {"gateway": {"config": {"shutdown_grace_s": 3600.5}}}
    files = chart().render(values, name="cachewise", namespace="fleet")
    item = objects_of(files)["Deployment", "cachewise"]
    assert item["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 3621


def test_the_schema_is_that_of_the_settings() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import runpy; print(runpy.run_path('k8s/schema.py')['text']())"],
        cwd=K8S.parent,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    written = (CHART / "values.schema.json").read_text()
    assert json.loads(made) == json.loads(written), "run `python k8s/schema.py`"


def test_the_chart_is_of_the_gateways_version() -> None:
    from gateway import __version__

    assert chart().metadata["appVersion"] == __version__


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("defaults", ["port-forward service/cachewise 8080:80", "AUTH_TOKEN=any", "No API key"]),
        ("medium", ["https://llm.example.com/v1 OPENAI_API_KEY=YOUR_KEY", "claude --model Qwen"]),
        ("bring-your-own-vllm", ["your own vLLM pods", "--model MODEL"]),
        ("large", ["https://llm.example.com"]),
    ],
)
def test_the_notes_tell_how_to_point_an_agent_at_it(case: str, said: list[str]) -> None:
    notes = rendered(case)["cachewise/templates/NOTES.txt"]
    for text in said:
        assert text in notes


async def test_from_the_manifests_alone_a_gateway_finds_the_fleet_and_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of("defaults", tmp_path)
    labels = workload("defaults")["spec"]["template"]["metadata"]["labels"]
    model = container(workload("defaults"))["command"][2]
    service = objects("defaults")["Service", "cachewise-vllm"]
    async with ApiServer().serving() as api, Pod() as engine:
        engine.models = (model,)
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
        port = {"name": service["spec"]["ports"][0]["name"], "port": int(engine.url.split(":")[2])}
        api.put("pods", pod("cachewise-vllm-0", "127.0.0.1", labels=labels), uid="u")
        api.put("pods", pod("stranger", "127.0.0.1"), uid="s")
        ends = [
            endpoint("127.0.0.1", "cachewise-vllm-0", "u"),
            endpoint("127.0.0.1", "stranger", "s"),
        ]
        name = service["metadata"]["name"]
        api.put("endpointslices", slice_of("x", *ends, service=name, ports=[port]))
        given = settings.model_dump() | {"log": {"level": "error"}}
        async with gateway_over(**given) as running:
            await until(lambda: bool(running.gateway.fleet.able(model)))
            assert (await running.get("/ready")).json["pods"] == {"cachewise-vllm-0": True}
            reply = await running.post(
                "chat", {"model": "any-name", "messages": [{"role": "user", "content": "hi"}]}
            )
            assert reply.status == 200
            assert json.loads(engine.turns[0].body)["model"] == model


def test_vllm_is_stopped_when_its_last_request_has_ended() -> None:
    *_, script, drain_s = container(workload("defaults"))["lifecycle"]["preStop"]["exec"]["command"]
    grace_s = workload("defaults")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > float(drain_s)
    left = [3, 1, 0, 7]

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = (
                f'vllm:num_requests_running{{engine="0"}} {float(left.pop(0))}\n'
                'vllm:num_requests_waiting{engine="0"} 0.0\n'
            )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = script.replace(":8000/", f":{server.server_port}/").replace(
            "sleep(", "sleep(0.01*"
        )
        subprocess.run([sys.executable, "-c", script, drain_s], check=True, timeout=20)
        assert left == [7]
        server.shutdown()
    subprocess.run(
        [sys.executable, "-c", script, drain_s], check=True, timeout=20
    )  # vLLM is gone already
