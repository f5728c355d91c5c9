"""How to point agents and SDKs at the gateway: the text of `cachewise connect`, of what
`cachewise serve` prints, and of `docs/connect.md` (`python -m gateway.connect` prints that page).
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Client:
    """One client. `setup` is a format text of `url`, `model` and `key`; `notes` is Markdown."""

    name: str
    language: str
    setup: str
    notes: str = ""


CLIENTS: Final = (
    Client(
        "Claude Code",
        "sh",
        """\
export ANTHROPIC_BASE_URL={url}
export ANTHROPIC_AUTH_TOKEN={key}
export ANTHROPIC_DEFAULT_HAIKU_MODEL={model}
export CLAUDE_CODE_GATEWAY_HINT_HEADERS=1
export CLAUDE_CODE_ATTRIBUTION_HEADER=0
claude --model {model}""",
        "The address has no `/v1`. The last two variables are optional and worth setting: Claude "
        "Code then tells the gateway how long its tools ran, and leaves out a line that keeps "
        "conversations from sharing the KV of the system prompt. Without the model for small "
        "tasks, alias the names it asks for: `--model-alias '*={model}'`.",
    ),
    Client(
        "Codex",
        "toml",
        """\
# ~/.codex/config.toml; then: CACHEWISE_KEY={key} codex
model = "{model}"
model_provider = "cachewise"

[model_providers.cachewise]
name = "CacheWise"
base_url = "{url}/v1"
env_key = "CACHEWISE_KEY"
wire_api = "responses\"""",
    ),
    Client(
        "OpenCode",
        "json",
        """\
{{
  "$schema": "https://opencode.ai/config.json",
  "model": "cachewise/{model}",
  "small_model": "cachewise/{model}",
  "provider": {{
    "cachewise": {{
      "npm": "@ai-sdk/openai-compatible",
      "options": {{"baseURL": "{url}/v1", "apiKey": "{key}"}},
      "models": {{"{model}": {{}}}}
    }}
  }}
}}""",
        "This is `opencode.json` in the project.",
    ),
    Client(
        "mini-swe-agent",
        "sh",
        """\
export OPENAI_API_BASE={url}/v1 OPENAI_API_KEY={key}
export MSWEA_COST_TRACKING=ignore_errors
mini -m openai/{model}""",
    ),
    Client(
        "OpenAI SDK",
        "python",
        """\
from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="{key}")
client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "hi"}}],
)""",
        "`client.responses` and `client.completions` work too.",
    ),
    Client(
        "Anthropic SDK",
        "python",
        """\
from anthropic import Anthropic

client = Anthropic(base_url="{url}", api_key="{key}")
client.messages.create(
    model="{model}",
    max_tokens=256,
    messages=[{{"role": "user", "content": "hi"}}],
)""",
    ),
    Client(
        "Qwen Code",
        "sh",
        "OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key} OPENAI_MODEL={model} qwen",
    ),
    Client(
        "Cline",
        "sh",
        "cline auth --provider openai --baseurl {url}/v1 --apikey {key} --modelid {model}",
        "In VS Code choose the provider “OpenAI Compatible”.",
    ),
    Client(
        "Continue",
        "yaml",
        """\
models:
  - name: {model}
    provider: openai
    model: {model}
    apiBase: {url}/v1
    apiKey: {key}""",
        "This is a part of `config.yaml`.",
    ),
    Client(
        "aider",
        "sh",
        "OPENAI_API_BASE={url}/v1 OPENAI_API_KEY={key} aider --model openai/{model}",
    ),
    Client(
        "OpenHands",
        "sh",
        "export LLM_BASE_URL={url}/v1 LLM_API_KEY={key} LLM_MODEL=openai/{model}",
    ),
)


def guide(url: str, model: str, key: str) -> str:
    """The whole text, Markdown."""
    parts = [
        "# Connecting agents",
        f"The gateway at `{url}` speaks the OpenAI and Anthropic APIs; agents need no change. "
        f"`{model}` stands for a model the gateway serves (`GET {url}/v1/models` lists them), "
        f"`{key}` for your key; where the gateway asks for none, any text will do.",
    ]
    for client in CLIENTS:
        filled = client.setup.format(url=url, model=model, key=key)
        parts += [f"## {client.name}", f"```{client.language}\n{filled}\n```"]
        if client.notes:
            parts.append(client.notes.format(model=model))
    parts += [
        "## Naming sessions",
        "Agents that send a session id of their own are recognised by it: Claude Code, Codex, "
        "OpenCode, OpenHands and others. The rest are recognised by the tool calls and the "
        "history they send. A client of your own can name its session in the header "
        "`X-Session-ID`.",
    ]
    return "\n\n".join(parts) + "\n"


def brief(url: str, model: str, key: str) -> str:
    """A few lines for the main clients, for a terminal."""
    v1 = f"{url}/v1"
    return "\n".join(
        [
            f"  Claude Code     ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key} \\",
            f"                  ANTHROPIC_DEFAULT_HAIKU_MODEL={model} claude --model {model}",
            f"  mini-swe-agent  OPENAI_API_BASE={v1} OPENAI_API_KEY={key} \\",
            f"                  MSWEA_COST_TRACKING=ignore_errors mini -m openai/{model}",
            f'  OpenAI SDK      OpenAI(base_url="{v1}", api_key="{key}")',
            f'  Anthropic SDK   Anthropic(base_url="{url}", api_key="{key}")',
            f'  Codex           ~/.codex/config.toml: base_url = "{v1}", wire_api = "responses"',
            f'  OpenCode        opencode.json: "baseURL": "{v1}", @ai-sdk/openai-compatible',
            "",
            f"Whole files and other agents: cachewise connect --url {url} --model {model}",
        ]
    )


if __name__ == "__main__":
    print(guide("http://127.0.0.1:8080", "MODEL", "KEY"), end="")
