"""`/v1/completions`."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import Any

from gateway.embedded.answer import Delta, FinishReason
from gateway.embedded.dialects.base import (
    DONE,
    JSON,
    SYSTEM_FINGERPRINT,
    RequestError,
    Usage,
    event,
    openai_error,
    openai_usage,
    token_limit,
)
from gateway.embedded.prompt import Conversation, Message


class CompletionExchange:
    def __init__(self, body: JSON, model: str, request_id: str) -> None:
        text, raw = _prompt(body.get("prompt"))
        self.conversation = Conversation([Message("user", text)], raw=raw)
        self.max_tokens: int | None = (
            token_limit(body, "max_tokens") or 16
        )  # OpenAI's default, and vLLM's
        self._include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self._base: JSON = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def opening(self, usage: Usage) -> bytes:
        return b""

    def delta(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        texts = [delta.text for delta in deltas if delta.kind == "text"]
        return event(self._chunk("".join(texts), None)) if texts else b""

    def closing(self, finish_reason: FinishReason, usage: Usage) -> bytes:
        last = self._chunk("", "length" if finish_reason == "length" else "stop")
        if not self._include_usage:
            last["system_fingerprint"] = SYSTEM_FINGERPRINT
            return event(last) + DONE
        total = self._base | {
            "choices": [],
            "usage": openai_usage(usage, sparse=True),
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        return event(last) + event(total) + DONE

    def whole(self, message: Message, finish_reason: FinishReason, usage: Usage) -> JSON:
        choice = {
            "index": 0,
            "text": message.text,
            "logprobs": None,
            "finish_reason": "length" if finish_reason == "length" else "stop",
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
        return self._base | {
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": SYSTEM_FINGERPRINT,
            "usage": openai_usage(usage),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def failure(self, error: RequestError) -> bytes:
        return event(openai_error(error)) + DONE

    def _chunk(self, text: str, finish_reason: str | None) -> JSON:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
            "prompt_token_ids": None,
            "token_ids": None,
        }
        return self._base | {"choices": [choice]}


def _prompt(prompt: Any) -> tuple[str, bytes]:
    """The one prompt of the request as text and as bytes; token ids are four bytes each."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt, prompt.encode(errors="replace")
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        try:
            return "", struct.pack(f"<{len(prompt)}I", *prompt)
        except struct.error:
            pass
    raise RequestError(
        "prompt: the embedded pod takes one text or one list of token ids", param="prompt"
    )
