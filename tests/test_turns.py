"""Turns on their way in, over real sockets: bodies, models, keys, what is told of a turn, and what
becomes of it when the clever part fails."""

import asyncio
import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import brotli
import pytest
import zstandard
from prometheus_client.parser import text_string_to_metric_families

from gateway.config import LogSettings
from gateway.dialects.chat import ChatJson, ChatStream
from gateway.logs import logging_to
from gateway.sessions import SessionStore
from tests.served import (
    EVENTS,
    PATHS,
    WIRES,
    Exchange,
    Pod,
    Reply,
    Running,
    body_of,
    gateway_over,
    logged,
)

COUNT = "/v1/messages/count_tokens"
LIMIT_BYTES = 4096


def raw_deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


CODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
}


def encoded(coding: str) -> dict[str, str]:
    return {"content-encoding": coding}


async def post_pieces(gateway: Running, wire: str, data: bytes) -> Reply:
    """A turn whose length is not told: its body comes in chunks."""

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 1000):
            yield data[at : at + 1000]

    url = gateway.url + PATHS.get(wire, wire)
    async with gateway.client.post(url, data=pieces()) as response:
        return await Reply.read(response)


async def of_itself(exchange: Exchange) -> None:
    """Answers 404 as vLLM does to a count, or whatever else it is asked."""
    exchange.whole(b'{"object":"error","message":"the pod\'s own","code":404}', 404)


# -- compressed bodies ---------------------------------------------------------------------------


async def test_a_compressed_body_reaches_the_pod_unfolded() -> None:
    body = json.dumps(body_of("chat", user="x" * 2000)).encode()
    cases = [(coding, coder(body)) for coding, coder in CODERS.items()]
    cases += [
        ("GZIP", gzip.compress(body)),
        ("identity", body),
        ("deflate", raw_deflate(body)),
        ("gzip, br", brotli.compress(gzip.compress(body))),
        ("zstd,identity,deflate", zlib.compress(zstandard.compress(body))),
        ("gzip", gzip.compress(body[:100]) + gzip.compress(body[100:])),
        ("zstd", zstandard.compress(body[:100]) + zstandard.compress(body[100:])),
    ]
    async with Pod() as pod, gateway_over(pod) as gateway:
        for coding, data in cases:
            reply = await gateway.post("chat", data, headers=encoded(coding))
            assert reply.status == 200, (coding, reply.text)
            assert pod.turns[-1].body == body, coding
            assert pod.turns[-1].header(b"content-encoding") == []
            assert pod.turns[-1].header(b"content-length") == [b"%d" % len(body)]


async def test_a_large_compressed_body_reaches_the_pod_unfolded() -> None:
    body = json.dumps(body_of("chat", user=bytes(range(256)).decode("latin-1") * 700)).encode()
    stored = gzip.compress(body, compresslevel=0)
    async with Pod() as pod, gateway_over(pod) as gateway:
        assert (await gateway.post("chat", stored, headers=encoded("gzip"))).status == 200
        assert pod.turns[-1].body == body


@pytest.mark.parametrize("wire", ["chat", "messages", COUNT])
async def test_a_body_that_unfolds_beyond_the_limit_is_a_413(wire: str) -> None:
    bomb = b"[" * (64 * LIMIT_BYTES)
    exact = json.dumps(body_of("messages")).encode().ljust(LIMIT_BYTES)
    relay = {"max_body_bytes": LIMIT_BYTES}
    async with Pod() as pod, gateway_over(pod, relay=relay) as gateway:
        for coding, coder in CODERS.items():
            for data in (coder(bomb), coder(exact + b" ")):
                reply = await gateway.post(wire, data, headers=encoded(coding))
                assert reply.status == 413, coding
                assert str(LIMIT_BYTES) in reply.error(wire)["message"]
            reply = await gateway.post(wire, coder(exact), headers=encoded(coding))
            assert reply.status == 200, coding
        nested = gzip.compress(gzip.compress(bomb))
        assert (await gateway.post(wire, nested, headers=encoded("gzip,gzip"))).status == 413
        assert len(pod.turns) == len(CODERS)


@pytest.mark.parametrize("wire", ["chat", "messages", COUNT])
async def test_a_body_that_is_not_of_its_coding_is_a_400(wire: str) -> None:
    body = json.dumps(body_of("messages", metadata={"x": "yz" * 500})).encode()
    async with Pod() as pod, gateway_over(pod) as gateway:
        for coding, coder in CODERS.items():
            whole = coder(body)
            for data in (b"garbage" * 9, whole[: len(whole) // 2], whole[:-1]):
                reply = await gateway.post(wire, data, headers=encoded(coding))
                assert reply.status == 400, (coding, data)
                assert reply.error(wire)["type"] == "invalid_request_error"
        assert pod.turns == []


@pytest.mark.parametrize("wire", ["chat", "messages", COUNT])
async def test_a_coding_that_is_not_known_is_a_415_that_names_those_that_are(wire: str) -> None:
    async with Pod() as pod, gateway_over(pod) as gateway:
        for coding in ("compress", "gzip, snappy"):
            reply = await gateway.post(wire, headers=encoded(coding))
            assert reply.status == 415
            assert "gzip, deflate, br, zstd" in reply.error(wire)["message"]
        assert pod.turns == []


# -- size and form of bodies ---------------------------------------------------------------------


@pytest.mark.parametrize("wire", [*WIRES, COUNT])
async def test_a_body_above_the_limit_is_a_413_with_its_length_told_or_not(wire: str) -> None:
    body = json.dumps(body_of("messages" if wire == COUNT else wire)).encode()
    relay = {"max_body_bytes": LIMIT_BYTES}

    async with Pod() as pod, gateway_over(pod, relay=relay) as gateway:
        for size in (LIMIT_BYTES + 1, 200 * LIMIT_BYTES):
            reply = await gateway.post(wire, body.ljust(size))
            assert (reply.status, bool(reply.error(wire))) == (413, True)
            reply = await post_pieces(gateway, wire, (body.ljust(size)))
            assert (reply.status, bool(reply.error(wire))) == (413, True)
        assert pod.turns == []
        assert (await gateway.post(wire, body.ljust(LIMIT_BYTES))).status == 200
        assert (await post_pieces(gateway, wire, (body.ljust(LIMIT_BYTES)))).status == 200
        assert [len(turn.body) for turn in pod.turns] == [LIMIT_BYTES] * 2
        assert gateway.settled()


@pytest.mark.parametrize("wire", [*WIRES, COUNT])
async def test_a_malformed_body_is_a_400_in_the_dialects_shape(wire: str) -> None:
    bad = [b" ", b"{", b"[]", b"null", b"{}", b'{"model": 1}', b'{"model": "m"', b"\xff\xfe", b"no"]
    async with Pod() as pod, gateway_over(pod) as gateway:
        for data in bad:
            reply = await gateway.post(wire, data)
            assert reply.status == 400, data
            assert reply.error(wire)["type"] == "invalid_request_error"
        assert pod.turns == []
        assert list(gateway.gateway.sessions) == []
        assert await gateway.metric('cachewise_gateway_errors_total{status="400"}') == len(bad)
