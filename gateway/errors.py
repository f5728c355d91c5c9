"""Errors the gateway itself makes, in the shape the caller's dialect gives to errors.

A pod's own error responses pass through untouched and never come here. Shapes: OpenAI's error
object (the shape vLLM follows too), Anthropic's error object, and in a running stream
vLLM's error chunk and the `error` events of the Responses and Messages streaming APIs.
"""

import math
from typing import Any, Final, Literal, TypeAlias

import orjson

Dialect: TypeAlias = Literal["openai", "anthropic"]
Wire: TypeAlias = Literal["chat", "completions", "responses", "messages"]

#: Claude Code gives up on a longer `retry-after`.
MAX_RETRY_AFTER_S: Final = 60

_OPENAI_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class GatewayError(Exception):
    """An error response of the gateway's own.

    `status` is the HTTP status, `code` a stable word for programs (`model_not_found`), `message`
    one for people, without credentials or bodies. `retry_after_s` says when to come back.
    """

    def __init__(
        self, status: int, code: str, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


def render(error: GatewayError, dialect: Dialect) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, ASGI headers and body of the error response."""
    body = orjson.dumps(_anthropic(error) if dialect == "anthropic" else {"error": _openai(error)})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    if error.retry_after_s is not None:
        seconds = min(max(math.ceil(error.retry_after_s), 1), MAX_RETRY_AFTER_S)
        headers.append((b"retry-after", b"%d" % seconds))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return error.status, headers, body


def shutting_down() -> GatewayError:
    return GatewayError(503, "shutting_down", "The gateway is shutting down.", retry_after_s=1)


def no_pod_ready(model: str) -> GatewayError:
    return GatewayError(
        503,
        "no_pod_ready",
        f"No pod that serves {model[:128]!r} is ready; try again shortly.",
        retry_after_s=2,
    )


def pods_error(status: int, body: bytes) -> GatewayError:
    """An error response of a pod's, to be told within a stream whose headers are out already."""
    try:
        error = orjson.loads(body)["error"]
        message, code = str(error["message"]), str(error.get("code") or error.get("type"))
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
        message, code = f"The pod answered {status}.", "pod_error"
    return GatewayError(status, code, message)


def stream_error(error: GatewayError, wire: Wire) -> bytes:
    """The last bytes of an event stream that cannot be completed.

    The leading newline ends a line that the pod left torn; between events it means nothing.
    """
    match wire:
        case "messages":
            return b"\n" + _event("error", _anthropic(error))
        case "responses":
            # SDKs raise on `error` (the flat fields are the specification's, the `error` object is
            # what they look for); Codex ignores it and reads `response.failed`.
            detail = _openai(error)
            flat = {"code": error.code, "message": error.message, "param": None}
            failed = {
                "object": "response",
                "id": "resp_failed",
                "created_at": 0,
                "model": "",
                "status": "failed",
                "output": [],
                "error": {"code": _response_code(error), "message": error.message},
            }
            return (
                b"\n"
                + _event("error", {"type": "error", **flat, "sequence_number": 0, "error": detail})
                + _event(
                    "response.failed",
                    {"type": "response.failed", "sequence_number": 1, "response": failed},
                )
            )
        case "chat" | "completions":
            return b'\ndata: {"error":%b}\n\ndata: [DONE]\n\n' % orjson.dumps(_openai(error))


def _openai(error: GatewayError) -> dict[str, Any]:
    fallback = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "message": error.message,
        "type": _OPENAI_TYPES.get(error.status, fallback),
        "param": "model" if error.code == "model_not_found" else None,
        "code": error.code,
    }


def _anthropic(error: GatewayError) -> dict[str, Any]:
    fallback = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(error.status, fallback)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _response_code(error: GatewayError) -> str:
    """The code of a failed Response, which is a closed list."""
    return "rate_limit_exceeded" if error.status == 429 else "server_error"


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))
