"""The schema of the chart's values; the settings in it are the gateway's own model.

python k8s/schema.py writes k8s/chart/values.schema.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from gateway.config import Settings

SCHEMA = Path(__file__).parent / "chart" / "values.schema.json"
Json = dict[str, Any]

SECONDS: Json = {"type": "integer", "minimum": 1, "maximum": 86400}
COUNT: Json = {"type": "integer", "minimum": 1}
BOOL: Json = {"type": "boolean"}
TEXT: Json = {"type": "string"}
NAME: Json = {"type": "string", "minLength": 1}
QUANTITY: Json = {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"}
DNS_LABEL: Json = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$"}
STRINGS: Json = {"type": "object", "additionalProperties": TEXT}
ANY: Json = {"type": "object"}
ENV: Json = {
    "type": "array",
    "items": {"type": "object", "required": ["name"], "properties": {"name": NAME}},
}


def section(**properties: Json) -> Json:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def many(items: Json) -> Json:
    return {"type": "array", "items": items}


def one_of(*values: str) -> Json:
    return {"enum": list(values)}


def image() -> Json:
    return section(repository=NAME, tag=TEXT, pullPolicy=one_of("Always", "IfNotPresent", "Never"))


def resources() -> Json:
    amounts: Json = {
        "type": "object",
        "additionalProperties": {"anyOf": [QUANTITY, {"type": "number", "minimum": 0}]},
    }
    return section(requests=amounts, limits=amounts)


def placement() -> Json:
    return {
        "podAnnotations": STRINGS,
        "podLabels": STRINGS,
        "nodeSelector": STRINGS,
        "tolerations": many(ANY),
        "affinity": ANY,
        "priorityClassName": DNS_LABEL,
        "extraEnv": ENV,
    }


def values() -> Json:
    """The chart's values."""
    api_key: Json = {
        "type": "string",
        "pattern": "^[A-Za-z0-9_.@/-]{1,64}: *(sha256:[0-9a-f]{64}|\\S{16,})$",
    }
    monitor = {"enabled": BOOL, "labels": STRINGS}
    interval: Json = {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"}
    peers = many(ANY)
    return section(
        nameOverride=DNS_LABEL,
        fullnameOverride=DNS_LABEL,
        image=image(),
        imagePullSecrets=many(section(name=NAME)),
        gateway=section(
            replicas=COUNT,
            config={"$ref": "#/$defs/Settings"},
            drainSeconds=SECONDS,
            resources=resources(),
            recording=section(enabled=BOOL, existingClaim=TEXT),
            autoscaling=section(
                enabled=BOOL,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                targetCPUUtilization=COUNT,
                targetInFlightTurns={"anyOf": [COUNT, {"type": "null"}]},
                inFlightMetric=NAME,
            ),
            podDisruptionBudget=section(
                enabled=BOOL,
                maxUnavailable={
                    "anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]{1,3}%$"}],
                },
            ),
            topologySpread=many(NAME),
            service=section(
                type=one_of("ClusterIP", "NodePort", "LoadBalancer"),
                port={"type": "integer", "minimum": 1, "maximum": 65535},
                annotations=STRINGS,
            ),
            serviceAccount=section(create=BOOL, name=TEXT, annotations=STRINGS),
            **placement(),
        ),
        secrets=section(
            existingSecret=TEXT,
            apiKeys=many(api_key),
            adminToken=TEXT,
            podApiKey=TEXT,
            hintsToken=TEXT,
            hubToken=TEXT,
            redisUrl={"type": "string", "pattern": "^(rediss?://.+)?$"},
        ),
        vllm=section(
            enabled=BOOL,
            kind=one_of("StatefulSet", "Deployment"),
            image=image(),
            patch=BOOL,
            model=NAME,
            replicas={"type": "integer", "minimum": 0},
            tensorParallelSize=COUNT,
            dataParallelSize={"type": "integer", "minimum": 1, "maximum": 256},
            extraArgs=many(TEXT),
            gpuResource=TEXT,
            resources=resources(),
            sharedMemory=QUANTITY,
            runtimeClassName=DNS_LABEL,
            startupMinutes=COUNT,
            drainSeconds={"type": "integer", "minimum": 10, "maximum": 86400},
            storage=section(
                enabled=BOOL,
                existingClaim=TEXT,
                size=QUANTITY,
                storageClass=TEXT,
                accessMode=one_of("ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"),
            ),
            aliases=STRINGS,
            kvEvents=BOOL,
            keda=section(
                enabled=BOOL,
                minReplicas={"type": "integer", "minimum": 0},
                maxReplicas=COUNT,
                cooldownSeconds=SECONDS,
                prometheus={"type": "string", "pattern": "^https?://"},
                query=TEXT,
                threshold={"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?$"},
            ),
            **placement(),
        ),
        ingress=section(
            enabled=BOOL,
            className=TEXT,
            host=NAME,
            tlsSecret=TEXT,
            annotations=STRINGS,
        ),
        httpRoute=section(
            enabled=BOOL,
            parentRefs=many({"type": "object", "required": ["name"]}),
            hostnames=many(NAME),
        )
        | {
            "if": {"properties": {"enabled": {"const": True}}},
            "then": {"properties": {"parentRefs": {"minItems": 1}}},
        },
        networkPolicy=section(
            enabled=BOOL,
            gatewayFrom=peers,
            monitoringFrom=peers,
            gatewayExtraEgress=many(ANY),
            vllmHubEgress=BOOL,
        ),
        monitoring=section(
            serviceMonitor=section(**monitor, interval=interval),
            podMonitor=section(**monitor, interval=interval),
            prometheusRule=section(**monitor),
            dashboards=section(**monitor),
        ),
        # Helm's own.
        **{"global": ANY},
    )


def schema() -> Json:
    """The whole schema, with the gateway's settings as `Settings`; no secret is among them, as a
    ConfigMap is no place for one."""
    settings = Settings.model_json_schema()
    defs: Json = settings.pop("$defs")
    defs["Settings"] = settings
    for model in _models(Settings):
        for name, field in model.model_fields.items():
            if _is_secret(field):
                del defs[model.__name__]["properties"][name]
    defs["Settings"]["properties"]["pods"]["items"] = {
        "anyOf": [NAME, {"$ref": "#/$defs/PodSettings"}]
    }
    for model_schema in defs.values():
        _strip(model_schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the CacheWise chart",
        **values(),
        "$defs": defs,
    }


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr is field.annotation or "SecretStr" in repr(field.annotation)


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _models(kind)


def _strip(node: Any) -> None:
    """Defaults, titles and the like are documentation, which stands in docs/configuration.md."""
    if isinstance(node, dict):
        for name, part in list(node.items()):
            if name in ("title", "default", "description", "allowed") and not isinstance(
                part, dict
            ):
                del node[name]
            else:
                _strip(part)
        if isinstance(node.get("default"), dict) and "type" not in node["default"]:
            del node["default"]
    elif isinstance(node, list):
        for part in node:
            _strip(part)


def text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(text())
