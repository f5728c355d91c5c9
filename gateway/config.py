"""Typed settings: command-line flags over `CACHEWISE_*` environment over a YAML file over defaults.

Every setting has one key (`relay.idle_timeout_s`), and the key gives its place in the file and its
variable (`CACHEWISE_RELAY__IDLE_TIMEOUT_S`). A value replaces the whole value below it: lists and
maps are not merged. `python -m gateway.config` prints the reference in `docs/configuration.md`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeAlias, Union, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENV_PREFIX: Final = "CACHEWISE_"
#: Short names of variables, and the full ones.
ENV_SHORT: Final = {
    "CACHEWISE_API_KEYS": "CACHEWISE_ACCESS__API_KEYS",
    "CACHEWISE_REDIS_URL": "CACHEWISE_SHARING__REDIS_URL",
}

Path_: TypeAlias = tuple[str, ...]
Source: TypeAlias = Literal["flag", "env", "file", "default"]


class ConfigError(ValueError):
    """A setting that cannot be used. Its text is one line: the key, the value, what is allowed."""


def _split_pairs(value: object) -> object:
    """`a=b,c=d` (as a variable holds it) or JSON, as a mapping."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    pairs = [item.partition("=") for item in value.split(",") if item.strip()]
    if not all(sep and key.strip() and val.strip() for key, sep, val in pairs):
        raise ValueError("is not a list of A=B")
    return {key.strip(): val.strip() for key, _, val in pairs}


def _split_list(value: object) -> object:
    """`a,b` (as a variable holds it) or JSON, as a list."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [item.strip() for item in value.split(",") if item.strip()]


def _allowed(text: str) -> dict[str, Any]:
    return {"allowed": text}


Seconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Weight: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )


def _for_a_header(value: SecretStr | None) -> SecretStr | None:
    """Without the newline that files of secrets end with."""
    if value is None:
        return None
    plain = value.get_secret_value().strip()
    if not plain.isascii() or not plain.isprintable() or not plain:
        raise ValueError("is not of printable ASCII characters")
    return SecretStr(plain)


HeaderSecret: TypeAlias = Annotated[SecretStr | None, AfterValidator(_for_a_header)]


class PodSettings(_Model):
    url: str = Field(json_schema_extra=_allowed("http://HOST[:PORT] or https://HOST[:PORT]"))
    """Address of the pod's HTTP server; a trailing `/v1` is dropped."""
    name: str | None = None
    """Name in metrics, logs and the inspector; host and port if not given."""
    api_key: HeaderSecret = None
    """Key sent to this pod, instead of `access.pod_api_key`."""
    dp_ranks: Annotated[int, Field(ge=1, le=256)] = 1
    """Data-parallel ranks behind the address: each is a pod of its own, asked for by
    `X-data-parallel-rank`."""
    kv_events: str | None = Field(default=None, json_schema_extra=_allowed("tcp://HOST:PORT"))
    """Where the pod publishes its KV events (`endpoint` of `--kv-events-config`): what its cache
    holds is then known, not believed. Of rank n the port is higher by n."""
    kv_events_replay: str | None = Field(
        default=None, json_schema_extra=_allowed("tcp://HOST:PORT, with kv_events")
    )
    """Where it replays those that were missed (`replay_endpoint`)."""

    @field_validator("kv_events", "kv_events_replay")
    @classmethod
    def _is_tcp(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if info.field_name == "kv_events_replay" and info.data.get("kv_events") is None:
            raise ValueError("is set without kv_events")
        try:
            parts = urlsplit(value.strip())
            usable = parts.scheme == "tcp" and parts.hostname and parts.port
        except ValueError:
            usable = False
        if not usable or parts.path or parts.query or "@" in parts.netloc or "*" in parts.netloc:
            raise ValueError("is not an endpoint of ZeroMQ")
        return value.strip()

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, value: object) -> object:
        return {"url": value} if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _origin_only(cls, value: str) -> str:
        url = value.strip().rstrip("/").removesuffix("/v1").rstrip("/")
        try:
            parts = urlsplit(url)
            usable = parts.hostname is not None and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.scheme not in ("http", "https"):
            raise ValueError("is not the address of an HTTP server")
        if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("holds more than scheme, host and port")
        return url


_DNS_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)\w([\w-]{0,61}\w)?(\.\w([\w-]{0,61}\w)?)*\.?", re.ASCII
)
_SERVICE: Final = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_NAMESPACE: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_KEY: Final = r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?"
_LABEL_VALUE: Final = r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?"
_REQUIREMENT: Final = (
    rf"(!?{_LABEL_KEY}|{_LABEL_KEY}\s*(=|==|!=)\s*{_LABEL_VALUE}"
    rf"|{_LABEL_KEY}\s+(in|notin)\s+\(\s*{_LABEL_VALUE}(\s*,\s*{_LABEL_VALUE})*\s*\))"
)
_SELECTOR: Final = re.compile(rf"\s*{_REQUIREMENT}(\s*,\s*{_REQUIREMENT})*\s*", re.ASCII)


class DiscoverySettings(_Model):
    kind: Literal["static", "dns", "kubernetes"] = "static"
    """Where pods come from besides `pods`: nowhere, the addresses of a DNS name, or the Kubernetes
    API."""
    dns_name: str | None = Field(
        default=None, validate_default=True, json_schema_extra=_allowed("a DNS name, for kind dns")
    )
    """Name whose A, else AAAA records are the pods (a headless Service); of an SRV name,
    `_PORT._tcp.NAME`, its targets and their ports."""
    service: str | None = Field(
        default=None,
        validate_default=True,
        json_schema_extra=_allowed("the name of a Service, for kind kubernetes"),
    )
    """Service whose EndpointSlices are the pods."""
    selector: str | None = Field(
        default=None,
        validate_default=True,
        json_schema_extra=_allowed(
            "a label selector such as app=vllm, for kind kubernetes; this or discovery.service"
        ),
    )
    """Label selector of the pods; with `service` too, of those among its endpoints."""
    namespace: str | None = Field(
        default=None, validate_default=True, json_schema_extra=_allowed("the name of a namespace")
    )
    """Their namespace; the gateway's own if not given."""
    port: Annotated[int | None, Field(ge=1, le=65535)] = Field(
        default=None, json_schema_extra=_allowed("a whole number from 1 to 65535")
    )
    """Their port; if not given, what the EndpointSlices or SRV records say, else 8000."""
    scheme: Literal["http", "https"] = "http"
    """How they are spoken to."""
    dp_ranks: Annotated[int, Field(ge=1, le=256)] = 1
    """Data-parallel ranks behind each address; see `dp_ranks` of a pod."""
    kv_events_port: Annotated[int | None, Field(ge=1, le=65535)] = Field(
        default=None, json_schema_extra=_allowed("a whole number from 1 to 65535")
    )
    """Port at which each of them publishes its KV events; see `kv_events` of a pod."""
    kv_events_replay_port: Annotated[int | None, Field(ge=1, le=65535)] = Field(
        default=None,
        json_schema_extra=_allowed("a whole number from 1 to 65535, with kv_events_port"),
    )
    """Port at which each of them replays those that were missed."""
    interval_s: Seconds = 5.0
    """Time between two DNS look-ups."""

    @field_validator("kv_events_replay_port")
    @classmethod
    def _beside_events(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("kv_events_port") is None:
            raise ValueError("is set without discovery.kv_events_port")
        return value

    @field_validator("dns_name", "service", "selector", "namespace")
    @classmethod
    def _for_its_kind(cls, value: str | None, info: ValidationInfo) -> str | None:
        kind = info.data.get("kind")
        if kind is None:
            return value
        if value is None:
            needed = {"dns": "dns_name", "kubernetes": "selector"}.get(kind)
            named = needed == "selector" and info.data.get("service", "wrong")
            if info.field_name == needed and not named:
                raise ValueError("is missing")
            return value
        if kind != ("dns" if info.field_name == "dns_name" else "kubernetes"):
            raise ValueError(f"is set while discovery.kind is {kind!r}")
        forms = {"dns_name": _DNS_NAME, "service": _SERVICE, "namespace": _NAMESPACE}
        if not forms.get(info.field_name or "", _SELECTOR).fullmatch(value):
            raise ValueError("is not of that form")
        return value


class ModelSettings(_Model):
    aliases: Annotated[dict[str, str], BeforeValidator(_split_pairs)] = Field(
        default={}, json_schema_extra=_allowed("NAME=SERVED[,NAME=SERVED…]")
    )
    """Model names clients use, and the served model each stands for; `*` stands for every name that
    no pod serves."""


class EmbeddedSettings(_Model):
    pods: Annotated[int, Field(ge=1, le=64)] = 2
    """Embedded pods to start when `pods` is empty."""
    model: Annotated[str, Field(min_length=1)] = "embedded"
    """Model name they serve."""
    block_size_tokens: Count = 16
    """Tokens in a KV block."""
    kv_capacity_tokens: Count = 700_000
    """Tokens that a pod's KV cache holds."""
    max_model_len: Count = 262_144
    """Longest prompt and answer together, in tokens."""
    speedup: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Modelled GPU times are divided by this."""
    kv_events: bool = False
    """Let them publish KV events, and follow these."""

    @field_validator("max_model_len")
    @classmethod
    def _fits_the_cache(cls, value: int, info: ValidationInfo) -> int:
        capacity = info.data.get("kv_capacity_tokens", value)
        if value > capacity:
            raise ValueError(f"is above embedded.kv_capacity_tokens ({capacity})")
        return value


class RoutingSettings(_Model):
    policy: Literal["expected_ttft", "least_loaded", "round_robin", "session_hash"] = (
        "expected_ttft"
    )
    """How a pod is chosen: least expected seconds to the first token, or one of three baselines."""


class AdmissionSettings(_Model):
    mode: Literal["enforce", "observe", "off"] = "enforce"
    """`enforce` holds turns that do not fit a pod's KV cache; a pod whose capacity is not known
    holds none. `observe` holds nothing and reports what it would have done. `off` only routes."""
    max_held: Count = 1_000
    """Turns held at once; more are answered 429."""
    max_hold_s: Seconds = 7_200.0
    """Longest hold of a turn that streams. Heartbeats keep its client waiting; a limit within what
    the rules may make a turn wait costs a part of the gain."""
    max_hold_unstreamed_s: Seconds = 120.0
    """Longest hold of a turn that does not stream."""
    heartbeat_s: Seconds = 10.0
    """Time between two heartbeats in a held turn's stream; the first comes after half of it."""
    age_bound_s: Seconds = 60.0
    """A turn may be held this long beyond its fair share of waiting; then it goes before others."""
    tenant_weights: Annotated[dict[str, Weight], BeforeValidator(_split_pairs)] = Field(
        default={}, json_schema_extra=_allowed("TENANT=NUMBER[,TENANT=NUMBER…], a NUMBER > 0")
    )
    """Shares of the pods between tenants whose turns wait; a tenant not named has 1."""


class HintSettings(_Model):
    enabled: bool = True
    """Tell pods that take hints when sessions are expected back."""
    token: HeaderSecret = None
    """Sent to pods as `X-Kv-Hints-Token`."""
    trusted_tenants: Annotated[tuple[str, ...], BeforeValidator(_split_list)] = Field(
        default=(), json_schema_extra=_allowed("TENANT[,TENANT…]")
    )
    """Tenants whose own hints reach the pods; those of all others are taken out."""


class RelaySettings(_Model):
    connect_timeout_s: Seconds = 5.0
    """Longest wait for a connection to a pod."""
    first_byte_timeout_s: Seconds = 600.0
    """Longest wait for the first byte of a pod's response."""
    idle_timeout_s: Seconds = 300.0
    """Longest silence within a pod's response."""
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Pods tried for one turn, while no byte of a response has arrived."""
    max_body_bytes: Count = 67_108_864
    """Largest request body, after decompression."""


class SessionSettings(_Model):
    max_sessions: Count = 20_000
    """Sessions remembered; the least recently used is forgotten first."""
    ttl_s: Seconds = 86_400.0
    """A session not seen for this long is forgotten."""


class SharingSettings(_Model):
    redis_url: SecretStr | None = Field(
        default=None,
        json_schema_extra=_allowed("redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], rediss://… (TLS)"),
    )
    """Redis or Valkey by which replicas of the gateway work as one (docs/replicas.md). Also set by
    `CACHEWISE_REDIS_URL`."""
    prefix: str = Field(
        default="cachewise:",
        json_schema_extra=_allowed("up to 64 letters, digits and . _ : { } -"),
    )
    """Begins every key there; gateways of one fleet have the same, those of another fleet
    another."""
    read_timeout_s: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.02, json_schema_extra=_allowed("a number > 0 and ≤ 1")
    )
    """Longest wait of a turn for what the store knows of a session that this replica does not
    know."""

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value.get_secret_value().strip())
            usable = parts.hostname is not None and parts.port != 0
        except ValueError:
            usable = False
        path = parts.path.strip("/") if usable else ""
        if (
            not usable
            or parts.scheme not in ("redis", "rediss")
            or not (path == "" or (path.isascii() and path.isdecimal()))
        ):
            raise ValueError("is not the address of a Redis")
        return SecretStr(value.get_secret_value().strip())

    @field_validator("prefix")
    @classmethod
    def _short(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.:{}-]{1,64}", value, re.ASCII):
            raise ValueError("is not of that form")
        return value


class ForecastSettings(_Model):
    state_file: Path | None = Field(default=None, json_schema_extra=_allowed("a path, or off"))
    """Where what was learned of gaps is kept. Unset, `cachewise serve` takes
    `$XDG_STATE_HOME/cachewise/forecast.npz` (`~/.local/state` without the variable); `off` keeps
    nothing."""
    save_interval_s: Seconds = 300.0
    """Time between two saves; one more is made at shutdown."""
    max_nodes: Annotated[int, Field(ge=1_000, le=10_000_000)] = 100_000
    """Places in the hierarchy remembered, of about 400 bytes each; the least recently used is
    forgotten first."""

    @property
    def off(self) -> bool:
        return self.state_file == Path("off")


def default_state_file(env: Mapping[str, str]) -> Path:
    """Where `cachewise serve` keeps the forecast's state if nothing else is set."""
    home = env.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "cachewise" / "forecast.npz"


class ProbeSettings(_Model):
    interval_s: Seconds = 2.0
    """Time between two probes of a pod."""
    timeout_s: Seconds = 2.0
    """Longest wait for a probe's answer."""
    unhealthy_after: Count = 3
    """Failed probes in a row after which a pod gets no turns."""


EVERYONE: Final = "everyone"
"""What a file of keys holds that lets every client in."""
KEY_PREFIX: Final = "cw-"
"""How the keys begin that `cachewise keys new` makes."""
TENANT: Final = re.compile(r"[\w.@/-]{1,64}", re.ASCII)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


def hash_key(key: str) -> str:
    """The stored form of an API key: `sha256:` and the hex digest of its UTF-8 bytes.

    A fast hash is right here and a slow one (bcrypt, Argon2) is not: these keys are random, not
    chosen by people, so there is no dictionary to try, and the hash is taken on every request.
    """
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def parse_api_keys(text: str) -> dict[str, list[str]]:
    """Tenants and their keys from `tenant=key` or `tenant: key` items, one a line or separated by
    commas; a key may stand hashed (`sha256:<hex>`), a tenant may stand more than once, lines that
    start with `#` are ignored. A JSON object is read too. The one word `everyone` is no tenant at
    all. Raises `ValueError`, without the text.
    """
    if text.strip() == EVERYONE:
        return {}
    if text.lstrip().startswith("{"):
        try:
            loaded = json.loads(text)
        except ValueError:
            raise ValueError("is not valid JSON") from None
        return {str(k): v if isinstance(v, list) else [v] for k, v in loaded.items()}
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    keys: dict[str, list[str]] = {}
    for number, item in enumerate(",".join(lines).split(","), start=1):
        if not item.strip():
            continue
        match = re.fullmatch(r"\s*([^\s:=]+)\s*[:=]\s*(\S+)\s*", item)
        if match is None:
            raise ValueError(f"holds no 'tenant: key' in item {number}")
        keys.setdefault(match[1].strip("\"'"), []).append(match[2].strip("\"'"))
    return keys


class AccessSettings(_Model):
    api_keys_file: Path | None = Field(
        default=None, json_schema_extra=_allowed("a readable file of lines 'tenant: key'")
    )
    """File of lines `tenant: key` or `tenant: sha256:<hex>`; see `cachewise keys new`. One that
    holds none is refused, unless it is the word `everyone`."""
    api_keys: dict[str, tuple[SecretStr, ...]] = Field(
        default={},
        validate_default=True,
        json_schema_extra=_allowed("TENANT=KEY[,TENANT=KEY…], a KEY at least 16 characters"),
    )
    """Keys that clients may present, by tenant, those of the file included; kept hashed. Without
    any, every client is let in. Also set by `CACHEWISE_API_KEYS`."""
    admin_token: HeaderSecret = None
    """Token that `/v1/cachewise/*` asks for."""
    forward_client_key: bool = False
    """Send the client's own key on to the pod."""
    pod_api_key: HeaderSecret = None
    """Key sent to pods that have none of their own."""

    @field_validator("api_keys_file")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        text = EVERYONE if value is None else _read(value)
        if not parse_api_keys(text) and text.strip() != EVERYONE:
            raise ValueError(f"holds no key, and not the word {EVERYONE!r}")
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _hashed(cls, value: object, info: ValidationInfo) -> object:
        given = parse_api_keys(value) if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise ValueError("is not a map of tenants and keys")  # noqa: TRY004 (pydantic's)
        file = info.data.get("api_keys_file")
        from_file = parse_api_keys(_read(file)) if file else {}
        hashed: dict[str, dict[str, None]] = {}
        owners: dict[str, str] = {}
        for keys in (from_file, given):
            for tenant, secrets in keys.items():
                if str(tenant).startswith(KEY_PREFIX):
                    raise ValueError("holds a key where a tenant is to be")
                if not TENANT.fullmatch(str(tenant)):
                    raise ValueError("holds a tenant that is not of letters, digits and . _ - @ /")
                for secret in [secrets] if isinstance(secrets, str | SecretStr) else secrets:
                    plain = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
                    if not isinstance(plain, str) or len(plain) < 16:
                        raise ValueError("holds a key that is too short")
                    stored = plain.lower() if plain.startswith("sha256:") else hash_key(plain)
                    if not _DIGEST.fullmatch(stored):
                        raise ValueError("holds a hash that is not SHA-256")
                    if owners.setdefault(stored, tenant) != tenant:
                        raise ValueError("holds one key for two tenants")
                    hashed.setdefault(str(tenant), {})[stored] = None
        return {tenant: tuple(digests) for tenant, digests in hashed.items()}


class TlsSettings(_Model):
    certfile: Path | None = Field(
        default=None, json_schema_extra=_allowed("a readable PEM certificate chain")
    )
    """Certificate chain, PEM; HTTPS is served when it and `tls.keyfile` are set."""
    keyfile: Path | None = Field(
        default=None,
        validate_default=True,
        json_schema_extra=_allowed("the readable, unencrypted PEM key of tls.certfile"),
    )
    """Private key, PEM, not encrypted."""

    @field_validator("certfile")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None:
            _read(value)
        return value

    @field_validator("keyfile")
    @classmethod
    def _pair_loads(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "certfile" not in info.data:
            return value
        certfile = info.data["certfile"]
        if (value is None) != (certfile is None):
            raise ValueError("is set without tls.certfile" if value else "is missing")
        if value is not None:
            _read(value)
            try:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certfile, value, password=lambda: "")
            except (ssl.SSLError, OSError, ValueError) as error:
                reason = getattr(error, "reason", None) or "no PEM pair"
                raise ValueError(f"does not load with {str(certfile)!r} ({reason})") from None
        return value


class TracingSettings(_Model):
    endpoint: str | None = Field(
        default=None, json_schema_extra=_allowed("http://HOST[:PORT][/PATH] or https://…")
    )
    """Collector to which spans of turns are sent, by OTLP over HTTP; off if not set. Without a path
    `/v1/traces` is taken. Needs `pip install 'cachewise-gateway[otel]'`."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of turns that are traced, where the client's `traceparent` does not decide it."""

    @field_validator("endpoint")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            usable = parts.hostname is not None and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.scheme not in ("http", "https"):
            raise ValueError("is not the address of an HTTP server")
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("holds more than scheme, host, port and path")
        return value

    @property
    def traces_url(self) -> str:
        """The whole address that spans are posted to."""
        assert self.endpoint is not None
        url = self.endpoint.rstrip("/")
        return url if urlsplit(url).path else f"{url}/v1/traces"


class RecordSettings(_Model):
    directory: Path | None = None
    """Directory into which turns are recorded (docs/recording.md): counts, times and names, no
    text. Off if not set."""
    max_bytes: Annotated[int, Field(ge=1 << 20)] = Field(
        default=1 << 30, json_schema_extra=_allowed("a whole number ≥ 1048576")
    )
    """Disk space that recordings may take there; the oldest are removed."""


class LogSettings(_Model):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level written."""
    format: Literal["plain", "json"] = "plain"
    """Lines for people, or JSON objects."""


class Settings(BaseSettings):
    """Everything that can be set. Built in code it reads nothing but its arguments; the file, the
    environment and the flags come in through `load_settings`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        enable_decoding=False,
    )

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; the default is this machine alone."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port to listen on; 0 takes any free one."""
    shutdown_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """Time that running turns get to finish at shutdown."""
    pods: Annotated[tuple[PodSettings, ...], BeforeValidator(_split_list)] = Field(
        default=(),
        json_schema_extra=_allowed(
            "URL[,URL…], or a list of URL or of url, name, api_key, dp_ranks, kv_events,"
            " kv_events_replay"
        ),
    )
    """The fleet; embedded pods if empty and none are discovered."""
    discovery: DiscoverySettings = DiscoverySettings()
    models: ModelSettings = ModelSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()
    routing: RoutingSettings = RoutingSettings()
    admission: AdmissionSettings = AdmissionSettings()
    hints: HintSettings = HintSettings()
    relay: RelaySettings = RelaySettings()
    sessions: SessionSettings = SessionSettings()
    forecast: ForecastSettings = ForecastSettings()
    sharing: SharingSettings = SharingSettings()
    probe: ProbeSettings = ProbeSettings()
    access: AccessSettings = AccessSettings()
    tls: TlsSettings = TlsSettings()
    tracing: TracingSettings = TracingSettings()
    record: RecordSettings = RecordSettings()
    log: LogSettings = LogSettings()

    @field_validator("pods")
    @classmethod
    def _distinct(cls, value: tuple[PodSettings, ...]) -> tuple[PodSettings, ...]:
        urls, names = [p.url for p in value], [p.name or p.url.partition("://")[2] for p in value]
        for what, seen in (("url", urls), ("name", names)):
            twice = {item for item in seen if seen.count(item) > 1}
            if twice:
                raise ValueError(f"has the {what} {min(twice)!r} twice")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @property
    def loopback_only(self) -> bool:
        """Whether nothing but this machine can reach the gateway."""
        try:
            return ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"


def load_settings(
    flags: Mapping[str, Any], config_file: Path | None, env: Mapping[str, str]
) -> Settings:
    """Settings from flags (nested as in the file; `None` is not given), environment and file.

    Raises `ConfigError`.
    """
    return resolve(flags, config_file, env)[0]


def resolve(
    flags: Mapping[str, Any], config_file: Path | None, env: Mapping[str, str]
) -> tuple[Settings, dict[str, Source]]:
    """As `load_settings`, with the source of every key."""
    layers: list[tuple[Source, dict[Path_, Any]]] = [
        ("file", dict(_flat(_read_yaml(config_file), f" (in {config_file})"))),
        ("env", dict(_flat(_read_env(env), " (in the environment)"))),
        ("flag", {k: v for k, v in _flat(flags, " (on the command line)") if v is not None}),
    ]
    values: dict[Path_, Any] = {}
    sources: dict[Path_, Source] = dict.fromkeys((path for path, _ in leaves()), "default")
    for source, layer in layers:
        values |= layer
        sources |= dict.fromkeys(layer, source)
    nested: dict[str, Any] = {}
    for path, value in values.items():
        section = nested
        for part in path[:-1]:
            section = section.setdefault(part, {})
        section[path[-1]] = value
    try:
        settings = Settings(**nested)
    except ValidationError as error:
        raise ConfigError(_one_line(error, sources, config_file)) from None
    return settings, {".".join(path): source for path, source in sources.items()}


def leaves(
    model: type[BaseModel] = Settings, prefix: Path_ = ()
) -> Iterator[tuple[Path_, FieldInfo]]:
    """Every setting, with its path."""
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is None:
            yield (*prefix, name), field
        else:
            yield from leaves(section, (*prefix, name))


def env_name(path: Path_) -> str:
    return ENV_PREFIX + "__".join(path).upper()


def is_secret(field: FieldInfo) -> bool:
    return "SecretStr" in repr(field.annotation)


def allowed(field: FieldInfo) -> str:
    """What a setting may be, in words."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    kind = _kind(field)
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    limits: dict[str, Any] = {}
    for item in field.metadata:
        limits |= {k: v for k in ("gt", "ge", "le") if (v := getattr(item, k, None)) is not None}
    if "ge" in limits and "le" in limits:
        bounds = f" from {limits['ge']} to {limits['le']}"
    else:
        signs = {"gt": ">", "ge": "≥", "le": "≤"}
        bounds = "".join(f" {signs[name]} {limit:g}" for name, limit in limits.items())
    return _NAMES[kind] + bounds


def shown(value: Any, field: FieldInfo) -> str:
    """A value as `cachewise config show` and the reference write it; secrets are masked."""
    if isinstance(value, tuple | dict) and value and not is_secret(field):
        if isinstance(value, dict):
            return ",".join(f"{key}={item}" for key, item in value.items())
        return ",".join(item.url if isinstance(item, PodSettings) else item for item in value)
    if value is None or value == () or value == {}:
        return "-"
    if is_secret(field):
        return ",".join(value) + " (hidden)" if isinstance(value, dict) else "(hidden)"
    return str(value).lower() if isinstance(value, bool) else str(value)


_NAMES: Final[dict[Any, str]] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    SecretStr: "a text",
    Path: "a path",
}


def _kind(field: FieldInfo) -> Any:
    """The annotation without `None`."""
    if get_origin(field.annotation) in (Union, UnionType):
        return next(arg for arg in get_args(field.annotation) if arg is not type(None))
    return field.annotation


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError("is not a text file") from None


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 without what surprises: ``off`` is a word, a date is text, a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, "a key stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith((":bool", ":timestamp"))]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF")
)


def _read_yaml(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        text = _read(path)
    except ValueError as error:
        raise ConfigError(
            f"{path}: the configuration file {error}; allowed: a readable YAML file"
        ) from None
    try:
        loaded = yaml.load(text, _Yaml)  # noqa: S506 (a safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}" if mark else ""
        problem = re.sub(r"'[^']*'", "…", error.problem or "")  # which may be a secret
        message = f"{path}: is not YAML{where} ({problem})"
    except yaml.YAMLError:
        message = f"{path}: is not YAML (it holds a character that YAML does not allow)"
    except RecursionError:
        message = f"{path}: is nested too deeply"
    except ValueError:
        message = f"{path}: holds a number or another value that is none"
    else:
        if loaded is None or isinstance(loaded, dict):
            return loaded or {}
        message = f"{path}: holds no settings; allowed: YAML of the form 'key: value'"
    raise ConfigError(message)


class _Environment(EnvSettingsSource):
    """pydantic-settings' reader of variables, on a given mapping."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._env.items()}


#: What Kubernetes puts into every container for a Service called `cachewise…`.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP|SCTP)")


def _read_env(env: Mapping[str, str]) -> Mapping[str, Any]:
    ours = {
        ENV_SHORT.get(name.upper(), name.upper()): value
        for name, value in env.items()
        if name.upper().startswith(ENV_PREFIX)
        and value != ""
        and not _SERVICE_LINK.search(name.upper())
        and not (name.upper().endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", value))
    }
    names = {name: name.removeprefix(ENV_PREFIX).lower() for name in ours}
    unknown = {
        key: ours[name] for name, key in names.items() if key.split("__")[0] not in _top_keys()
    }
    return {**_Environment(ours)(), **unknown}


def _top_keys() -> set[str]:
    return set(Settings.model_fields)


def _flat(
    values: Mapping[Any, Any], where: str, model: type[BaseModel] = Settings, prefix: Path_ = ()
) -> Iterator[tuple[Path_, Any]]:
    for name, value in values.items():
        path = (*prefix, str(name))
        field = model.model_fields.get(str(name))
        if field is None:
            raise ConfigError(_unknown(path, model) + where)
        section = _section(field)
        if section is None:
            yield path, value
        elif isinstance(value, Mapping):
            yield from _flat(value, where, section, path)
        elif value is not None:
            shown = (
                _HIDDEN if any(is_secret(leaf) for _, leaf in leaves(section)) else _shown(value)
            )
            keys = ", ".join(section.model_fields)
            raise ConfigError(
                f"{'.'.join(path)}: {shown} is not a section; allowed: its keys {keys}{where}"
            )


def _unknown(path: Path_, model: type[BaseModel]) -> str:
    key = ".".join(path)
    siblings = {".".join((*path[:-1], name)): None for name in model.model_fields}
    everywhere = [".".join(leaf) for leaf, _ in leaves()]
    near = difflib.get_close_matches(key, [*siblings, *everywhere], n=1, cutoff=0.6)
    if not near:
        near = [k for k in everywhere if k.rpartition(".")[2] == path[-1]][:1]
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{key}: unknown key; {hint}allowed: {', '.join(model.model_fields)}"


_HIDDEN: Final = "the value (not shown)"


def _shown(value: object) -> str:
    if isinstance(value, Mapping | list | tuple):
        return "a map" if isinstance(value, Mapping) else "a list"
    text = repr(str(value)) if isinstance(value, Path) else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _one_line(
    error: ValidationError, sources: Mapping[Path_, Source], config_file: Path | None
) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    model: type[BaseModel] = Settings
    field: FieldInfo | None = None
    for part in first["loc"]:
        nested = model.model_fields.get(str(part))
        if nested is not None:
            field = nested
            model = (
                PodSettings if part == "pods" and model is Settings else _section(nested) or model
            )
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        text = _unknown(tuple(map(str, first["loc"])), model)
    else:
        assert field is not None
        given = first.get("input")
        in_url = first["loc"][0] in ("pods", "tracing") and any(
            sign in str(given).lower() for sign in ("@", "?", "#", "key")
        )
        secret = is_secret(field) or in_url
        value = _HIDDEN if secret else _shown(given)
        problem = _problem(first, field)
        subject = problem if problem == "is missing" else f"{value} {problem}"
        text = f"{key}: {subject}; allowed: {allowed(field)}"
    leaf = next((p for p in sources if p == tuple(map(str, first["loc"]))[: len(p)]), None)
    source = sources[leaf] if leaf else "default"
    if leaf and source != "default":
        names = {"env": env_name(leaf), "file": str(config_file), "flag": "the command line"}
        text += f" (from {names[source]})"
    if len(problems) > 1:
        text += f" (and {len(problems) - 1} more)"
    return " ".join(text.split())


def _problem(error: Mapping[str, Any], field: FieldInfo) -> str:
    match error["type"]:
        case "value_error":
            cause = error["ctx"]["error"]
            return "is not valid JSON" if isinstance(cause, json.JSONDecodeError) else str(cause)
        case "missing":
            return "is missing"
        case "greater_than" | "greater_than_equal" | "less_than_equal" | "finite_number":
            return "is out of range"
        case "literal_error":
            return "is not one of the choices"
        case "string_too_short":
            return "is empty"
    return f"is not {_NAMES.get(_kind(field), 'of this form')}"


def reference() -> str:
    """The page of all settings, Markdown."""
    lines = [
        "# Configuration",
        "",
        "Settings come from flags, over the environment, over a YAML file (`--config FILE`), over",
        "defaults. A value replaces the whole value below it: lists and maps are not merged. An",
        "empty variable counts as not set. `cachewise config check FILE` checks a file,",
        "`cachewise config show` prints what is in effect and where it comes from.",
        "",
        "```yaml",
        "pods:",
        "  - http://pod-a:8000",
        "  - {url: http://pod-b:8000, name: b}",
        "models:",
        '  aliases: {"*": Qwen/Qwen3-Coder-30B-A3B-Instruct}',
        "log: {format: json}",
        "```",
        "",
        "The key gives the variable: `relay.idle_timeout_s` is `CACHEWISE_RELAY__IDLE_TIMEOUT_S`.",
        "`CACHEWISE_API_KEYS` is short for `CACHEWISE_ACCESS__API_KEYS`, `CACHEWISE_REDIS_URL` for",
        "`CACHEWISE_SHARING__REDIS_URL`. Variables that Kubernetes sets for a Service named",
        "`cachewise` are ignored.",
        "",
    ]
    section: Path_ | None = None
    for path, field in leaves():
        if path[:-1] != section:
            section = path[:-1]
            title = ".".join(section) or "Top level"
            lines += [
                "",
                f"## {title}",
                "",
                "| key | default | allowed | meaning |",
                "|---|---|---|---|",
            ]
        default = shown(field.get_default(), field)
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{'.'.join(path)}` | `{default}` | {allowed(field)} | {meaning} |")
    lines += ["", "## A pod", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
    for name, field in PodSettings.model_fields.items():
        default = "required" if field.is_required() else f"`{shown(field.default, field)}`"
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{name}` | {default} | {allowed(field)} | {meaning} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    print(reference(), end="")
