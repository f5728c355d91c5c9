"""Ask a pod whether it is ready, what it serves, what it can do and how loaded it is."""

import asyncio
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx
import orjson

from gateway.fleet.scrape import PodLoad, parse_load

EMBEDDED_HEADER = "x-cachewise-embedded"
SESSION_ID_SINCE = (0, 32)
"""vLLM's first (major, minor) that carries `X-Session-ID` to its scheduler."""


class Failure(StrEnum):
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    BAD_STATUS = "bad_status"
    NOT_JSON = "not_json"


@dataclass(frozen=True, slots=True)
class ProbeError:
    """Why a pod did not answer as vLLM does; `str()` is one line for the log."""

    failure: Failure
    path: str
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.failure.value} ({self.detail})"


@dataclass(frozen=True, slots=True)
class ServedModel:
    id: str
    max_model_len: int | None
    """Longest prompt plus answer, in tokens."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    session_id: bool = False
    """The engine sees `X-Session-ID`."""
    kv_hints: bool = False
    """The pod takes `POST /v1/kv_hints` and acts on it."""
    embedded: bool = False
    """An embedded pod, not vLLM."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one probe saw. Not ready means `error` is set and nothing else is to be relied on."""

    ready: bool
    models: tuple[ServedModel, ...] = ()
    version: str | None = None
    capabilities: Capabilities = Capabilities()
    load: PodLoad | None = None
    """`None`: unknown, which is not idle."""
    warnings: tuple[str, ...] = ()
    """What the pod lacks although it is usable; equal from probe to probe, so log changes only."""
    error: ProbeError | None = None
    settled: bool = True
    """Whether version and capabilities were answered; if not, the next probe asks again."""


async def probe(
    client: httpx.AsyncClient,
    url: str,
    api_key: str | None,
    timeout_s: float,
    known: ProbeResult | None = None,
    rank: int | None = None,
) -> ProbeResult:
    """Probe the pod at `url` (no path); every request has `timeout_s` and all run at once. The load
    is that of the data-parallel `rank`, or of all of them.

    Ready is `/health` and `/v1/models` both well. A ready and settled result given as `known`
    spares the questions whose answers only a restart can change. Raises nothing but cancellation.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    async def get(path: str) -> httpx.Response | ProbeError:
        return await _get(client, url + path, path, headers, timeout_s)

    new = known is None or not known.ready or not known.settled
    paths = ["/health", "/v1/models", "/metrics"]
    if new:
        paths += ["/version", "/v1/kv_hints/capabilities"]
    answers = dict(zip(paths, await asyncio.gather(*map(get, paths)), strict=True))

    health, listing = answers["/health"], answers["/v1/models"]
    if isinstance(health, ProbeError):
        return ProbeResult(ready=False, error=health)
    models = _served_models(listing)
    if isinstance(models, ProbeError):
        return ProbeResult(ready=False, error=models)

    if new:
        version = _version(answers["/version"])
        capabilities = _capabilities(health, version, answers["/v1/kv_hints/capabilities"])
        settled = not any(_unheard(answers[path]) for path in paths[3:])
    else:
        assert known is not None
        version, capabilities, settled = known.version, known.capabilities, True

    warnings: list[str] = []
    if version is None and not capabilities.embedded:
        warnings.append("/version does not tell vLLM's version: session ids are not sent")
    load, about_load = _load(answers["/metrics"], rank)
    return ProbeResult(
        ready=True,
        models=models,
        version=version,
        capabilities=capabilities,
        load=load,
        warnings=(*warnings, *about_load),
        settled=settled,
    )


async def _get(
    client: httpx.AsyncClient, url: str, path: str, headers: dict[str, str], timeout_s: float
) -> httpx.Response | ProbeError:
    try:
        async with asyncio.timeout(timeout_s):
            response = await client.get(url, headers=headers, timeout=timeout_s)
    except (TimeoutError, httpx.TimeoutException):
        return ProbeError(Failure.TIMEOUT, path, f"no answer in {timeout_s:g} s")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return ProbeError(Failure.UNREACHABLE, path, str(error) or type(error).__name__)
    if response.status_code != httpx.codes.OK:
        return ProbeError(Failure.BAD_STATUS, path, str(response.status_code))
    return response


def _unheard(answer: httpx.Response | ProbeError) -> bool:
    """A pod in a long step may be late with an answer; that is none."""
    return isinstance(answer, ProbeError) and answer.failure in (
        Failure.TIMEOUT,
        Failure.UNREACHABLE,
    )


def _json(answer: httpx.Response | ProbeError, path: str) -> Any | ProbeError:
    if isinstance(answer, ProbeError):
        return answer
    try:
        return orjson.loads(answer.content)
    except orjson.JSONDecodeError as error:
        return ProbeError(Failure.NOT_JSON, path, str(error))


def _served_models(
    answer: httpx.Response | ProbeError,
) -> tuple[ServedModel, ...] | ProbeError:
    listing = _json(answer, "/v1/models")
    if isinstance(listing, ProbeError):
        return listing
    entries = listing.get("data") if isinstance(listing, dict) else None
    models = tuple(
        ServedModel(entry["id"], length if isinstance(length, int) else None)
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        for length in (entry.get("max_model_len"),)
    )
    return models or ProbeError(Failure.NOT_JSON, "/v1/models", "lists no model")


def _version(answer: httpx.Response | ProbeError) -> str | None:
    body = _json(answer, "/version")
    version = body.get("version") if isinstance(body, dict) else None
    return version if isinstance(version, str) else None


def _capabilities(
    health: httpx.Response, version: str | None, kv_hints: httpx.Response | ProbeError
) -> Capabilities:
    embedded = EMBEDDED_HEADER in health.headers
    series = re.match(r"v?(\d+)\.(\d+)", version or "")
    since = series is not None and (int(series[1]), int(series[2])) >= SESSION_ID_SINCE
    hints = _json(kv_hints, "/v1/kv_hints/capabilities")
    active = isinstance(hints, dict) and hints.get("active") is True
    return Capabilities(session_id=embedded or since, kv_hints=active, embedded=embedded)


def _load(
    answer: httpx.Response | ProbeError, rank: int | None
) -> tuple[PodLoad | None, tuple[str, ...]]:
    if isinstance(answer, ProbeError):
        return None, (f"{answer}: load unknown",)
    load = parse_load(answer.text, rank)
    if load.engines == 0:
        return None, ("/metrics has none of vLLM's names: load unknown",)
    warnings = tuple(f"/metrics: {old} stands for {name}" for name, old in load.renamed)
    if load.missing:
        warnings += (f"/metrics lacks {', '.join(load.missing)}",)
    return load, warnings
