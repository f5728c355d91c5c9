import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from gateway.fleet.probe import Failure, ProbeResult, ServedModel, probe
from gateway.fleet.scrape import parse_load

DATA = Path(__file__).parent / "data"
METRICS = (DATA / "vllm-0.32-metrics.txt").read_text()
MODELS = (DATA / "vllm-0.32" / "models.json").read_bytes()
VLLM: Mapping[str, Response] = {
    "/health": Response(),
    "/v1/models": Response(MODELS, media_type="application/json"),
    "/version": Response((DATA / "vllm-0.32" / "version.json").read_bytes()),
    "/metrics": PlainTextResponse(METRICS),
}


class Pod:
    """Answers what real vLLM answered, but for the `changed` paths; `hang` never answers."""

    def __init__(self, changed: Mapping[str, Response] | None = None, hang: str = "") -> None:
        self.answers = {**VLLM, **(changed or {})}
        self.hang = hang
        self.seen: list[Request] = []
        self.hanging = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        self.seen.append(request)
        if request.url.path == self.hang:
            self.hanging.set()
            await asyncio.Event().wait()
        answer = self.answers.get(request.url.path, Response(status_code=404))
        await answer(scope, receive, send)

    async def probed(
        self, api_key: str | None = None, known: ProbeResult | None = None, timeout_s: float = 5
    ) -> ProbeResult:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self)) as client:
            return await probe(client, "http://pod:8000", api_key, timeout_s, known)


async def test_a_vllm_pod_is_ready_with_models_version_and_load() -> None:
    result = await Pod().probed()
    assert result.ready
    assert result.error is None
    assert result.warnings == ()
    assert [model.id for model in result.models] == ["tiny"]
    assert result.models[0].max_model_len
    assert result.version == "0.32.0"
    assert result.load == parse_load(METRICS)
    capabilities = result.capabilities
    assert capabilities.session_id
    assert not capabilities.kv_hints
    assert not capabilities.embedded


async def test_the_key_goes_with_every_request() -> None:
    pod = Pod()
    await pod.probed(api_key="secret")
    assert len(pod.seen) == 5
    assert {request.headers["authorization"] for request in pod.seen} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("version", "session_id"),
    [
        ("0.31.1", False),
        ("0.9.2", False),
        ("0.32.0rc1", True),
        ("0.33.0+cu129", True),
        ("1.0", True),
        ("dev", False),
    ],
)
async def test_session_ids_are_sent_from_vllm_0_32_on(version: str, session_id: bool) -> None:
    result = await Pod({"/version": JSONResponse({"version": version})}).probed()
    assert result.version == version
    assert result.capabilities.session_id is session_id


async def test_a_pod_with_the_patch_takes_hints() -> None:
    patched = {"/v1/kv_hints/capabilities": JSONResponse({"active": True})}
    assert (await Pod(patched).probed()).capabilities.kv_hints


@pytest.mark.parametrize(
    "body", [b'{"active": false}', b'{"active": 1}', b'{"detail": "no"}', b"[]", b"true", b"<html>"]
)
async def test_a_pod_that_does_not_say_that_its_patch_is_active_takes_no_hints(
    body: bytes,
) -> None:
    answer = {"/v1/kv_hints/capabilities": Response(body)}
    assert not (await Pod(answer).probed()).capabilities.kv_hints


async def test_a_pod_late_to_tell_its_capabilities_is_asked_again() -> None:
    patched = {"/v1/kv_hints/capabilities": JSONResponse({"active": True})}
    busy = Pod(patched, hang="/v1/kv_hints/capabilities")
    first = await busy.probed(timeout_s=0.2)
    assert first.ready
    assert not first.settled
    assert not first.capabilities.kv_hints
    second = await Pod(patched).probed(known=first)
    assert second.settled
    assert second.capabilities.kv_hints
    third = Pod(patched)
    assert (await third.probed(known=second)).capabilities == second.capabilities
    assert len(third.seen) == 3


async def test_an_embedded_pod_says_so_and_needs_no_version() -> None:
    embedded = {
        "/health": Response(headers={"x-cachewise-embedded": "1"}),
        "/version": Response(status_code=404),
    }
    result = await Pod(embedded).probed()
    assert result.capabilities.embedded
    assert result.capabilities.session_id
    assert result.warnings == ()


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
@pytest.mark.parametrize("status", [401, 500, 503])
async def test_a_bad_status_is_not_ready_and_names_path_and_status(path: str, status: int) -> None:
    result = await Pod({path: Response(status_code=status)}).probed()
    assert not result.ready
    assert result.error is not None
    assert result.error.failure is Failure.BAD_STATUS
    assert str(result.error) == f"{path}: bad_status ({status})"


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b'{"data": []}', b'{"data": 3}', b'{"data": [{"id": 3}]}']
)
async def test_a_model_list_that_lists_none_is_not_ready(body: bytes) -> None:
    result = await Pod({"/v1/models": Response(body)}).probed()
    assert not result.ready
    assert result.error is not None
    assert result.error.failure is Failure.NOT_JSON


async def test_a_model_without_a_length_is_served_with_length_unknown() -> None:
    listing = {"/v1/models": JSONResponse({"data": [{"id": "m"}]})}
    assert (await Pod(listing).probed()).models == (ServedModel("m", None),)


async def test_a_closed_port_is_unreachable(unused_tcp_port: int) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        result = await probe(client, f"http://127.0.0.1:{unused_tcp_port}", None, 5)
    assert not result.ready
    assert result.error is not None
    assert result.error.failure is Failure.UNREACHABLE


async def test_a_pod_that_hangs_is_a_timeout() -> None:
    result = await Pod(hang="/health").probed(timeout_s=0.05)
    assert not result.ready
    assert result.error is not None
    assert result.error.failure is Failure.TIMEOUT


@pytest.mark.parametrize(
    "pod",
    [
        Pod({"/metrics": Response(status_code=404)}),
        Pod({"/metrics": PlainTextResponse("up 1\n")}),
        Pod(hang="/metrics"),
    ],
    ids=["absent", "other names", "hangs"],
)
async def test_without_metrics_a_pod_is_usable_and_its_load_unknown(pod: Pod) -> None:
    result = await pod.probed(timeout_s=0.3)
    assert result.ready
    assert result.load is None
    assert len(result.warnings) == 1
    assert "load unknown" in result.warnings[0]


async def test_a_metric_that_is_gone_or_renamed_is_told_and_the_rest_kept() -> None:
    page = METRICS.replace("vllm:num_requests_waiting", "vllm:queued").replace(
        "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"
    )
    result = await Pod({"/metrics": PlainTextResponse(page)}).probed()
    assert result.ready
    assert result.load is not None
    assert result.load.waiting_requests is None
    assert result.load.kv_usage_ratio is not None
    assert result.warnings == (
        "/metrics: vllm:gpu_cache_usage_perc stands for vllm:kv_cache_usage_perc",
        "/metrics lacks vllm:num_requests_waiting",
    )


async def test_what_only_a_restart_changes_is_asked_once_while_the_pod_stays_ready() -> None:
    pod = Pod()
    first = await pod.probed()
    pod.seen.clear()
    assert await pod.probed(known=first) == first
    assert {request.url.path for request in pod.seen} == {"/health", "/v1/models", "/metrics"}
    pod.seen.clear()
    assert await pod.probed(known=replace(first, ready=False)) == first
    assert "/version" in {request.url.path for request in pod.seen}


async def test_an_unknown_version_is_told_at_every_probe() -> None:
    pod = Pod({"/version": Response(status_code=404)})
    first = await pod.probed()
    assert first.version is None
    assert len(first.warnings) == 1
    assert (await pod.probed(known=first)).warnings == first.warnings


async def test_a_cancelled_probe_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    pod = Pod(hang="/v1/models")
    task = asyncio.create_task(pod.probed())
    await pod.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
