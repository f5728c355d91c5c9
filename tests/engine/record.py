"""Record what vLLM answers, byte for byte, into `tests/data/`: `python -m tests.engine.record URL`.

Each request is sent twice and the second answer is kept, so that cached tokens show.
"""

import sys
from pathlib import Path
from typing import Any

import httpx

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


def record(base_url: str, directory: Path) -> None:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        version = client.get("/version").json()["version"]
        served = client.get("/v1/models").json()["data"][0]
        series = ".".join(version.split("+")[0].split(".")[:2])
        out = directory / f"vllm-{series}"
        out.mkdir(parents=True, exist_ok=True)

        def save(name: str, method: str, path: str, body: dict[str, Any] | None = None) -> None:
            for _ in range(2 if body else 1):
                response = client.request(method, path, json=body)
                if response.is_server_error:
                    raise SystemExit(f"{name}: {response.status_code} {response.text}")
            (out / name).write_bytes(response.content)
            print(f"{response.status_code} {name} {response.headers.get('content-type')}")

        for name, (path, body) in requests(served["id"], served["max_model_len"]).items():
            save(f"{name}.json", "POST", path, body)
            if "error" in name or path in ("/tokenize", "/v1/messages/count_tokens"):
                continue
            save(f"{name}.sse", "POST", path, body | {"stream": True})
            if path in ("/v1/chat/completions", "/v1/completions"):
                with_usage = {"stream": True, "stream_options": {"include_usage": True}}
                save(f"{name}-usage.sse", "POST", path, body | with_usage)
        for name in ("version", "v1/models"):
            save(f"{name.removeprefix('v1/')}.json", "GET", f"/{name}")
        metrics = client.get("/metrics").content
        (directory / f"vllm-{series}-metrics.txt").write_bytes(metrics)


if __name__ == "__main__":
    record(sys.argv[1], DATA)
