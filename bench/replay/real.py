"""Replay scaled-down sessions through real vLLM on the CPU, behind the real gateway, in real time.

Two servers of a random-weight model, `cachewise serve` in front of them, and closed-loop clients
that speak Chat Completions: each sends its next turn its gap after the last answer. Every policy
gets servers and a gateway of its own, all caches empty.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from bench.replay.report import Row
from bench.replay.scaled import ScaledSession, ScaledTurn, filler, final_tokens, one_token_words
from engine_patch.command import launch_command
from tests.engine import pods as vllm
from tests.engine import tiny_model

SHAPE = tiny_model.Shape(hidden=384, layers=6, heads=6, kv_heads=2, intermediate=1024)
"""Of the model: a prompt of 2,500 tokens takes one core some seconds, an answer some tenths."""
STEP_TOKENS = 512
"""vLLM's ``max_num_batched_tokens``: the replay's 2,048, scaled less than the prompts are."""
ANSWER_LIMIT_TOKENS = 64
TEXT_TOKENS = 24
START_SPREAD_S = 0.05
TURN_TIMEOUT_S = 900.0
SETTLE_TIMEOUT_S = 30.0
TOOL = "bash"
TOOL_CALL = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
TOOL_CHOICE: Any = {"type": "function", "function": {"name": TOOL}}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "Run a command",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string", "enum": ["ls"]}},
                "required": ["command"],
                "additionalProperties": False,
            },
        },
    }
]


@dataclass(frozen=True)
class Contender:
    """How the gateway is set, and whether vLLM has the patch."""

    routing: str
    admission: str
    patched: bool


CONTENDERS = {
    "stock": Contender("round_robin", "off", patched=False),
    "affinity": Contender("session_hash", "off", patched=False),
    "unpatched": Contender("expected_ttft", "enforce", patched=False),
    "cachewise": Contender("expected_ttft", "enforce", patched=True),
}


@dataclass(frozen=True)
class Language:
    """What clients know of the model's tokens."""

    words: list[str]
    """Each one token long after a blank."""
    tool_call_bias: dict[str, int]
    """Logit biases that make a random model write a tool call in few tokens, under the grammar that
    the tool choice puts on it: the longest piece that may come next, and no blanks at will."""

    @classmethod
    def of(cls, vocabulary: dict[str, int]) -> Language:
        bias: dict[str, int] = {str(vocabulary["<|im_end|>"]): 90}
        for token, number in vocabulary.items():
            # As byte-level BPE writes blank, line feed, carriage return and tab.
            if not token.strip("ĠĊčĉ"):
                bias[str(number)] = -100
            elif token.replace("Ġ", " ").replace("Ċ", "\n") in TOOL_CALL:
                bias[str(number)] = min(80, 5 * len(token))
        return cls(one_token_words(vocabulary), bias)


@dataclass(frozen=True)
class Load:
    """What all contenders are given."""

    sessions: Sequence[ScaledSession]
    pods: int
    kv_tokens: int
    """Of each pod's cache."""


@dataclass(frozen=True)
class TurnSeen:
    """One turn as its client saw it."""

    session: int
    latency_s: float
    first_token_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    called_tool: bool


def run(load: Load, name: str, advance: Callable[[], None], say: Callable[[str], None]) -> Row:
    """Run one contender; its figures.

    Raises:
        RuntimeError: a server did not start, or a turn was not answered as it must be.
    """
    contender = CONTENDERS[name]
    with tempfile.TemporaryDirectory(prefix="cachewise-replay-") as directory:
        model = Path(directory) / "random-qwen2"
        language = Language.of(tiny_model.write_unweighted(model, SHAPE))
        say(f"{name}: starting {load.pods} x vLLM")
        launch = vllm.Launch(_pod_flags(load.kv_tokens, contender.patched))
        with vllm.running_each(model, [launch] * load.pods) as started:
            for pod in started:
                asyncio.run(_warm_up(pod.url, language))
            with _gateway(started, Path(directory) / "gateway.log", contender) as url:
                say(name)
                load_before = os.getloadavg()
                began = time.monotonic()
                turns = asyncio.run(_clients(url, load.sessions, language, advance))
                makespan_s = time.monotonic() - began
                holds = _holds(httpx.get(f"{url}/metrics", trust_env=False).text)
    return (
        {"policy": name, "routing": contender.routing, "admission": contender.admission}
        | {"patched": contender.patched}
        | figures(turns)
        | {"makespan_s": makespan_s, "holds": holds[0], "held_s": holds[1]}
        | {"machine_load_before": load_before, "machine_load_after": os.getloadavg()}
    )


def _pod_flags(kv_tokens: int, patched: bool) -> list[str]:
    command = launch_command("model")
    patch = [part for f in ("--scheduler-cls", "--middleware") for part in (f, _after(command, f))]
    return [
        *("--load-format", "dummy"),
        *("--num-gpu-blocks-override", str(kv_tokens // vllm.BLOCK_SIZE_TOKENS)),
        # vLLM keeps one block to itself.
        *("--max-model-len", str(kv_tokens - vllm.BLOCK_SIZE_TOKENS)),
        *("--max-num-batched-tokens", str(STEP_TOKENS)),
        *(patch if patched else ()),
    ]


def _after(command: Sequence[str], flag: str) -> str:
    return command[command.index(flag) + 1]


@contextmanager
def _gateway(started: Sequence[vllm.VllmPod], log: Path, contender: Contender) -> Iterator[str]:
    settings = {
        "CACHEWISE_ROUTING__POLICY": contender.routing,
        "CACHEWISE_ADMISSION__MODE": contender.admission,
        "CACHEWISE_FORECAST__STATE_FILE": "off",
    }
    with vllm.gateway(started, log, settings) as url:
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline:
            known = httpx.get(f"{url}/v1/cachewise/pods", trust_env=False).json()["data"]
            if [bool(pod["kv_capacity_tokens"]) for pod in known] == [True] * len(started):
                yield url
                return
            time.sleep(0.5)
        raise RuntimeError(f"the gateway does not know its pods' capacity:\n{log.read_text()}")


def _client(url: str) -> openai.AsyncOpenAI:
    # Not through a proxy that the environment names.
    http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=TURN_TIMEOUT_S)
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=TURN_TIMEOUT_S, http_client=http
    )


async def _warm_up(url: str, language: Language) -> None:
    """One turn of each kind, so that nobody's first turn pays for what is compiled once."""
    async with _client(url) as client:
        for turn in (ScaledTurn(STEP_TOKENS, 0.0, True), ScaledTurn(STEP_TOKENS, 0.0, False)):
            text = filler(language.words, turn.added_tokens, f"warm-up {turn.calls_tool}")
            await _ask(client, -1, [{"role": "user", "content": text}], turn, language)


async def _clients(
    url: str, sessions: Sequence[ScaledSession], language: Language, advance: Callable[[], None]
) -> list[TurnSeen]:
    seen: list[TurnSeen] = []
    async with _client(url) as client, asyncio.TaskGroup() as tasks:
        for number, session in enumerate(sessions):
            tasks.create_task(_session(client, number, session, language, seen, advance))
    return seen


async def _session(
    client: openai.AsyncOpenAI,
    number: int,
    session: ScaledSession,
    language: Language,
    seen: list[TurnSeen],
    advance: Callable[[], None],
) -> None:
    """One agent: each prompt is the one before, its answer, and something new."""
    await asyncio.sleep(number * START_SPREAD_S)
    messages: list[Any] = []
    for i, turn in enumerate(session):
        await asyncio.sleep(turn.gap_s)
        text = filler(language.words, turn.added_tokens, f"{number} {i}")
        calls = messages[-1].get("tool_calls") if messages else None
        messages.append(
            {"role": "tool", "tool_call_id": calls[0]["id"], "content": text}
            if calls
            else {"role": "user", "content": text}
        )
        answer, turn_seen = await _ask(client, number, messages, turn, language)
        messages.append(answer)
        seen.append(turn_seen)
        advance()


async def _ask(
    client: openai.AsyncOpenAI,
    number: int,
    messages: list[Any],
    turn: ScaledTurn,
    language: Language,
) -> tuple[dict[str, Any], TurnSeen]:
    began = time.monotonic()
    first_token_s = None
    text = ""
    call: dict[str, Any] | None = None
    usage: Any = None
    cut_short = False
    stream = await client.chat.completions.create(
        model=vllm.MODEL,
        messages=messages,
        tools=TOOLS,
        tool_choice=TOOL_CHOICE if turn.calls_tool else "none",
        parallel_tool_calls=False,
        max_tokens=ANSWER_LIMIT_TOKENS if turn.calls_tool else TEXT_TOKENS,
        temperature=0,
        logit_bias=language.tool_call_bias if turn.calls_tool else {},
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-session-id": f"replayed-{number}"},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if first_token_s is None and (choice.delta.content or choice.delta.tool_calls):
                first_token_s = time.monotonic() - began
            text += choice.delta.content or ""
            cut_short = cut_short or choice.finish_reason == "length"
            for piece in choice.delta.tool_calls or ():
                if piece.id:
                    call = {"id": piece.id, "type": "function"}
                    call["function"] = {"name": TOOL, "arguments": ""}
                if call is not None and piece.function is not None:
                    call["function"]["arguments"] += piece.function.arguments or ""
    latency_s = time.monotonic() - began
    if usage is None or turn.calls_tool != (call is not None) or (cut_short and turn.calls_tool):
        raise RuntimeError(f"session {number}: not the answer asked for: {call or text[:200]!r}")
    answer: dict[str, Any] = {"role": "assistant", "content": text or None}
    if call is not None:
        answer["tool_calls"] = [call]
    details = usage.prompt_tokens_details
    return answer, TurnSeen(
        number,
        latency_s,
        latency_s if first_token_s is None else first_token_s,
        usage.prompt_tokens,
        (details.cached_tokens or 0) if details is not None else 0,
        usage.completion_tokens,
        call is not None,
    )


def _holds(metrics: str) -> tuple[int, float]:
    """How many turns were held, and for how many seconds in all."""
    samples = [
        sample
        for family in text_string_to_metric_families(metrics)
        if family.name == "cachewise_hold_seconds"
        for sample in family.samples
    ]

    def total(suffix: str) -> float:
        return sum(sample.value for sample in samples if sample.name.endswith(suffix))

    return round(total("_count")), total("_sum")


def figures(turns: Sequence[TurnSeen]) -> Row:
    """One run in numbers. `session_s` is the sum of all turns' latencies, holds included."""
    latencies_s = quantiles((turn.latency_s for turn in turns), n=100, method="inclusive")
    first_s = quantiles((turn.first_token_s for turn in turns), n=100, method="inclusive")
    prompt_tokens = sum(turn.prompt_tokens for turn in turns)
    cached_tokens = sum(turn.cached_tokens for turn in turns)
    return {
        "session_s": sum(turn.latency_s for turn in turns),
        "p50_s": latencies_s[49],
        "p90_s": latencies_s[89],
        "p99_s": latencies_s[98],
        "first_token_p50_s": first_s[49],
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
        "cached_share": cached_tokens / prompt_tokens,
        "output_tokens": sum(turn.output_tokens for turn in turns),
        "tool_calls": sum(turn.called_tool for turn in turns),
        "turns": len(turns),
    }


def compare(rows: Sequence[Row]) -> None:
    """Give each row its total session time's ratio to stock's, where stock was run."""
    stock_s = next((row["session_s"] for row in rows if row["policy"] == "stock"), None)
    for row in rows:
        if stock_s is not None:
            row["ratio"] = stock_s / row["session_s"]


def describe(load: Load, tokens_by: float, gaps_by: float) -> dict[str, Any]:
    """The load in numbers, for the results."""
    working_set_tokens = sum(map(final_tokens, load.sessions))
    return {
        "sessions": len(load.sessions),
        "turns": sum(map(len, load.sessions)),
        "pods": load.pods,
        "kv_tokens_per_pod": load.kv_tokens,
        "working_set_tokens": working_set_tokens,
        "working_set_over_kv": working_set_tokens / (load.pods * load.kv_tokens),
        "tokens_divided_by": tokens_by,
        "gaps_divided_by": gaps_by,
        "model": vars(SHAPE),
        "cpus": os.cpu_count(),
    }


def table(rows: Sequence[Row], title: str) -> Table:
    made = Table(title=title)
    for name in ("policy", "routing", "admission", "patch", "session s, all", "turn s p50", "p90",
                 "p99", "first token s p50", "cached", "holds", "held s", "makespan s",
                 "machine load"):  # fmt: skip
        made.add_column(name, justify="right" if name[0] not in "prm" else "left")
    for row in rows:
        better = f" ({row['ratio']:.2f}x)" if "ratio" in row else ""
        made.add_row(
            row["policy"], row["routing"], row["admission"], "yes" if row["patched"] else "no",
            f"{row['session_s']:,.0f}{better}", f"{row['p50_s']:.1f}", f"{row['p90_s']:.1f}",
            f"{row['p99_s']:.1f}", f"{row['first_token_p50_s']:.1f}", f"{row['cached_share']:.1%}",
            str(row["holds"]), f"{row['held_s']:,.0f}", f"{row['makespan_s']:.0f}",
            f"{row['machine_load_before'][0]:.1f} → {row['machine_load_after'][0]:.1f}",
        )  # fmt: skip
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    """Total session time, turn latency and cached share of each policy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = [row["policy"] for row in rows]
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3), layout="constrained")
    axes[0].bar(names, [row["session_s"] for row in rows])
    axes[0].set_title("session time, s, all sessions")
    places = range(len(rows))
    for shift, key in ((-0.2, "p50_s"), (0.2, "p99_s")):
        axes[1].bar([i + shift for i in places], [row[key] for row in rows], 0.4, label=key[:3])
    axes[1].set_xticks(places, names)
    axes[1].set_title("latency of a turn, s")
    axes[1].legend()
    axes[2].bar(names, [100 * row["cached_share"] for row in rows])
    axes[2].set_ylim(0, 100)
    axes[2].set_title("prompt tokens found cached, %")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
