"""Compressed request bodies: gzip, deflate, br, zstd, bounded by the body limit as they unfold."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable

import brotli
import zstandard

from gateway.errors import GatewayError
from gateway.relay import too_large

CODINGS = "gzip, deflate, br, zstd"
_STEP_BYTES = 1 << 16


def decompress(body: bytes, coding: str, limit_bytes: int) -> bytes:
    """``body`` without its content codings (several are undone last first, RFC 9110 §8.4). Raises
    `GatewayError` 415 for a coding not known, 400 for broken data, 413 above the limit."""
    for name in reversed([part.strip().lower() for part in coding.split(",")]):
        if name in ("", "identity"):
            continue
        undo = _DECODERS.get(name)
        if undo is None:
            raise GatewayError(
                415,
                "unsupported_encoding",
                f"Content-Encoding {name[:40]!r} is not supported; send one of: {CODINGS}.",
            )
        try:
            body = undo(body, limit_bytes)
        except (gzip.BadGzipFile, zlib.error, brotli.error, zstandard.ZstdError, EOFError) as error:
            raise GatewayError(
                400, "invalid_encoding", f"The request body is not valid {name}: {error}"
            ) from None
    return body


def _gzip(body: bytes, limit_bytes: int) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(body)) as members:
        out = members.read(limit_bytes + 1)
    if len(out) > limit_bytes:
        raise too_large(limit_bytes)
    return out


def _zlib(window_bits: int) -> Callable[[bytes, int], bytes]:
    def undo(body: bytes, limit_bytes: int) -> bytes:
        decoder = zlib.decompressobj(window_bits)
        out = decoder.decompress(body, limit_bytes + 1)
        if len(out) > limit_bytes:
            raise too_large(limit_bytes)
        if not decoder.eof:
            raise EOFError("it ends too early")
        return out

    return undo


def _deflate(body: bytes, limit_bytes: int) -> bytes:
    try:
        return _zlib(zlib.MAX_WBITS)(body, limit_bytes)
    except zlib.error:
        return _zlib(-zlib.MAX_WBITS)(body, limit_bytes)  # some clients leave out the zlib header


def _brotli(body: bytes, limit_bytes: int) -> bytes:
    decoder = brotli.Decompressor()
    out: list[bytes] = []
    size = 0
    for at in range(0, len(body), _STEP_BYTES):
        piece = decoder.process(body[at : at + _STEP_BYTES], output_buffer_limit=_STEP_BYTES)
        while piece:
            out.append(piece)
            if (size := size + len(piece)) > limit_bytes:
                raise too_large(limit_bytes)
            piece = decoder.process(b"", output_buffer_limit=_STEP_BYTES)
    if not decoder.is_finished():
        raise EOFError("it ends too early")
    return b"".join(out)


def _zstd(body: bytes, limit_bytes: int) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True) as reader:
        out = reader.read(limit_bytes + 1)
    if len(out) > limit_bytes:
        raise too_large(limit_bytes)
    return out


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}
