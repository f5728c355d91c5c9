"""The HTTP endpoints for hints, the same on a vLLM pod and on the embedded one.

POST /v1/kv_hints                 an envelope; an answer for each action
GET  /v1/kv_hints/capabilities    dialect versions, block size, capacity
GET  /v1/kv_hints/sessions        resident blocks and expected reuse of each session
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable
from itertools import zip_longest
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine_patch.hints import MAX_BODY_BYTES, HintError, parse

PATH = "/v1/kv_hints"
TOKEN_HEADER = "x-kv-hints-token"  # noqa: S105

Call = Callable[[str, str], Awaitable[list[dict[str, Any]]]]
"""Asks every engine core behind the API server one operation of `Reuse.call`."""


class HintEndpoints:
    """Reads hints and passes them on.

    Args:
        engines: what to call for a request.
        token: what `X-Kv-Hints-Token` must say; None asks for nothing.
    """

    def __init__(self, engines: Callable[[Request], Call], token: str | None = None) -> None:
        self._engines = engines
        self._token = token

    def routes(self) -> list[Route]:
        """The three endpoints."""
        return [
            Route(PATH, self.post_hints, methods=["POST"]),
            Route(f"{PATH}/capabilities", self.get_capabilities, methods=["GET"]),
            Route(f"{PATH}/sessions", self.get_sessions, methods=["GET"]),
        ]

    def may_hint(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether the request knows the token."""
        if self._token is None:
            return True
        given = next((v for k, v in headers if k.lower() == TOKEN_HEADER.encode()), b"")
        return hmac.compare_digest(given, self._token.encode())

    async def post_hints(self, request: Request) -> Response:
        """Apply an envelope on every engine core."""
        if not self.may_hint(request.scope["headers"]):
            return error_answer(403, f"{TOKEN_HEADER} is missing or wrong")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    return error_answer(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        except ClientDisconnect:
            return error_answer(400, "the body is not complete")  # nobody hears it
        try:
            envelope, _ = parse(bytes(body))
        except HintError as error:
            return malformed(error)
        answers = await self._engines(request)("hints", body.decode())
        active = [a["results"] for a in answers if "results" in a]
        if not active:
            return error_answer(501, "the engine runs without the reuse-aware scheduler")
        return JSONResponse(
            {
                "protocol_version": envelope.protocol_version,
                "message_id": envelope.message_id,
                "results": [_best(ranks) for ranks in zip_longest(*active)],
            }
        )

    async def get_capabilities(self, request: Request) -> Response:
        """What the pod understands; `engines` has one entry a data-parallel rank."""
        engines = await self._engines(request)("capabilities", "")
        return JSONResponse(engines[0] | {"engines": engines})

    async def get_sessions(self, request: Request) -> Response:
        """The sessions of every engine core."""
        if not self.may_hint(request.scope["headers"]):
            return error_answer(403, f"{TOKEN_HEADER} is missing or wrong")
        engines = await self._engines(request)("sessions", "")
        rows = [row | {"engine": i} for i, e in enumerate(engines) for row in e.get("sessions", ())]
        return JSONResponse({"sessions": rows})


_ORDER = ("applied", "clipped", "rejected", "unsupported")


def _best(ranks: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """A session lives on one data-parallel rank; the best answer is its answer.

    A rank that saw the `message_id` in a request's body may have answered another number of
    actions.
    """
    answers = (answer for answer in ranks if answer is not None)
    return min(answers, key=lambda answer: _ORDER.index(answer["status"]))


def malformed(error: HintError) -> JSONResponse:
    """The refusal of a malformed envelope, naming the field."""
    return error_answer(400, error.reason, error.field)


def error_answer(status: int, message: str, field: str | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", "param": field}}, status
    )
