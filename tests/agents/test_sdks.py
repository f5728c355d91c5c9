"""A tool-calling run with the official SDKs: one session to the gateway, and to the SDK exactly
what the pod alone would have answered."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import anthropic
import openai
import pytest

from tests.agents.script import call, prompt, turn
from tests.agents.serving import Serving, serving

pytestmark = pytest.mark.agents

MODEL = "embedded"
SCRIPT = (
    turn(call("shell", command="sleep 0.2; seq 100")),
    turn(
        call("shell", command="seq 150"),
        call("shell", command="sleep 0.1; seq 200"),
        text="Two at once.",
    ),
    turn(call("shell", command="seq 250")),
    turn(text="All done."),
)
COMMAND = {
    "type": "object",
    "properties": {"command": {"type": "string"}},
    "required": ["command"],
    "additionalProperties": False,
}


@dataclass
class Answer:
    """One answer as the SDK gives it: every event of the stream or the whole object."""

    seen: list[dict[str, Any]]
    calls: list[tuple[str, str]]
    """Ids and commands."""
    text: str
    cached_tokens: int


class Agent(Protocol):
    """A conversation in one dialect."""

    def ask(self) -> Answer: ...
    def tell(self, results: list[tuple[str, str]]) -> None: ...
    def __enter__(self) -> Agent: ...
    def __exit__(self, *_: object) -> None: ...


class ChatAgent:
    def __init__(self, url: str, task: str, system: str, stream: bool) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        self.stream = stream
        self.messages: list[Any] = [
            {"role": "system", "content": system},
            {"role": "user", "content": task},
        ]
        function = {"description": system, "name": "shell", "parameters": COMMAND, "strict": True}
        self.tools: list[Any] = [{"function": function, "type": "function"}]

    def __enter__(self) -> ChatAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self) -> Answer:
        seen: list[dict[str, Any]] = []
        if self.stream:
            with self.client.chat.completions.stream(
                model=MODEL,
                messages=self.messages,
                tools=self.tools,
                stream_options={"include_usage": True},
            ) as events:
                seen += [e.chunk.model_dump() for e in events if e.type == "chunk"]
                whole: Any = events.get_final_completion()
        else:
            whole = self.client.chat.completions.create(
                model=MODEL, messages=self.messages, tools=self.tools
            )
        message = whole.choices[0].message
        self.messages.append(message.model_dump(include={"role", "content", "tool_calls"}))
        return Answer(
            [*seen, whole.model_dump()],
            [(c.id, json.loads(c.function.arguments)["command"]) for c in message.tool_calls or ()],
            message.content or "",
            whole.usage.prompt_tokens_details.cached_tokens,
        )

    def tell(self, results: list[tuple[str, str]]) -> None:
        self.messages += [
            {"role": "tool", "tool_call_id": call_id, "content": text} for call_id, text in results
        ]


class ResponsesAgent:
    """Its SDK's parsed models warn, when dumped, about their own type parameters."""

    def __init__(self, url: str, task: str, system: str, stream: bool) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        self.stream = stream
        self.system = system
        self.items: list[Any] = [{"role": "user", "content": task}]
        tool = {"description": system, "name": "shell", "parameters": COMMAND, "strict": True}
        self.tools: list[Any] = [{**tool, "type": "function"}]

    def __enter__(self) -> ResponsesAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self) -> Answer:
        request: dict[str, Any] = {
            "model": MODEL,
            "instructions": self.system,
            "input": self.items,
            "tools": self.tools,
            "store": False,
        }
        seen: list[dict[str, Any]] = []
        if self.stream:
            with self.client.responses.stream(**request) as events:
                seen += [event.model_dump(warnings=False) for event in events]
                whole: Any = events.get_final_response()
        else:
            whole = self.client.responses.create(**request)
        calls = [item for item in whole.output if item.type == "function_call"]
        self.items += [
            item.model_dump(exclude={"parsed_arguments"}, warnings=False) for item in whole.output
        ]
        return Answer(
            [*seen, whole.model_dump(warnings=False)],
            [(c.call_id, json.loads(c.arguments)["command"]) for c in calls],
            whole.output_text,
            whole.usage.input_tokens_details.cached_tokens,
        )

    def tell(self, results: list[tuple[str, str]]) -> None:
        self.items += [
            {"type": "function_call_output", "call_id": call_id, "output": text}
            for call_id, text in results
        ]


class MessagesAgent:
    def __init__(self, url: str, task: str, system: str, stream: bool) -> None:
        self.client = anthropic.Anthropic(base_url=url, api_key="any", max_retries=0)
        self.stream = stream
        self.system = system
        self.messages: list[Any] = [{"role": "user", "content": task}]
        self.tools: list[Any] = [{"description": system, "name": "shell", "input_schema": COMMAND}]

    def __enter__(self) -> MessagesAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self) -> Answer:
        request: dict[str, Any] = {
            "model": MODEL,
            "max_tokens": 1000,
            "system": self.system,
            "messages": self.messages,
            "tools": self.tools,
        }
        seen: list[dict[str, Any]] = []
        if self.stream:
            with self.client.messages.stream(**request) as events:
                seen += [event.model_dump() for event in events]
                whole: Any = events.get_final_message()
        else:
            whole = self.client.messages.create(**request)
        content = [block.model_dump(exclude_none=True) for block in whole.content]
        self.messages.append({"role": "assistant", "content": content})
        return Answer(
            [*seen, whole.model_dump()],
            [(b.id, b.input["command"]) for b in whole.content if b.type == "tool_use"],
            "".join(b.text for b in whole.content if b.type == "text"),
            whole.usage.cache_read_input_tokens or 0,
        )

    def tell(self, results: list[tuple[str, str]]) -> None:
        content = [
            {"type": "tool_result", "tool_use_id": call_id, "content": text}
            for call_id, text in results
        ]
        self.messages.append({"role": "user", "content": content})


@dataclass
class Step:
    """A turn of a run; times in seconds. The tools ran for ``tools_s`` before it, the client was
    busy with itself and them for ``away_s``, counted from when the turn before was sent."""

    answer: Answer
    tools_s: float
    away_s: float


def run(agent: Agent) -> Iterator[Step]:
    """The loop of an agent: ask, run the tools for real, tell, until there is no call left."""
    tools_s = away_s = 0.0
    while True:
        sent_at = time.monotonic()
        answer = agent.ask()
        yield Step(answer, tools_s, away_s)
        if not answer.calls:
            return
        began_at = time.monotonic()
        agent.tell([(call_id, shell(command)) for call_id, command in answer.calls])
        now = time.monotonic()
        tools_s, away_s = now - began_at, now - sent_at


def shell(command: str) -> str:
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def pod_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an embedded pod that nobody else uses."""
    with serving(tmp_path_factory.mktemp("pod")) as other:
        yield other.pod_url()


_NAMES = re.compile(r'"(?:id|item_id|call_id|tool_call_id)": ?"([^"]+)"')
_TIMES = re.compile(r'"(created|created_at|completed_at)": ?[0-9.]+')


def without_names(seen: list[dict[str, Any]]) -> list[Any]:
    """What was seen, with ids replaced by numbers in order of appearance, and without times."""
    text = json.dumps(seen)
    for number, name in enumerate(dict.fromkeys(_NAMES.findall(text))):
        text = text.replace(f'"{name}"', f'"id-{number}"')
    found: list[Any] = json.loads(_TIMES.sub(r'"\1": 0', text))
    return found


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(
    ("kind", "client"),
    [
        (ChatAgent, "openai-sdk"),
        (ResponsesAgent, "openai-sdk"),
        (MessagesAgent, "anthropic-sdk"),
    ],
    ids=["chat", "responses", "messages"],
)
def test_a_run_is_one_session_and_reads_as_the_pod_alone_would_answer(
    gateway: Serving, pod_alone: str, kind: type[Any], client: str, stream: bool
) -> None:
    # Prompts begin with the tools, tools here with this text: no two tests share a block of KV.
    system = f"{stream} {kind.__name__}: you run commands."
    task = prompt("Count.", *SCRIPT)
    with kind(pod_alone, task, system, stream) as agent:
        alone = [step.answer for step in run(agent)]

    steps: list[Step] = []
    with gateway.watched() as found, kind(gateway.url, task, system, stream) as agent:
        for step in run(agent):
            steps.append(step)
            session = gateway.sessions()[-1]
            assert session["turns"] == len(steps)
            assert session["idle_kind"] == ("tool" if step.answer.calls else "human")
            assert session["waiting_for"] == ["shell"] * len(step.answer.calls)

    assert [s.answer.text for s in steps] == ["", "Two at once.", "", "All done."]
    for step, direct in zip(steps, alone, strict=True):
        assert without_names(step.answer.seen) == without_names(direct.seen)

    assert len(found) == 1
    session = found[0]
    assert (session["client"], session["parent"], session["class"]) == (client, None, "main")
    assert (session["turns"], session["tool_calls"], session["prefix_breaks"]) == (4, 4, 0)
    gaps = session["gaps"]
    assert [gap["kind"] for gap in gaps] == ["tool"] * 3
    assert [gap["tools"] for gap in gaps] == [["shell"], ["shell", "shell"], ["shell"]]
    for gap, step in zip(gaps, steps[1:], strict=True):
        # The answer's last bytes and the gateway's clock may cross, by little.
        assert 0.5 * step.tools_s < gap["seconds"] < step.away_s + 0.5

    turns = gateway.turns(session)
    assert len({turn["pod"] for turn in turns}) == 1
    cached_tokens = [step.answer.cached_tokens for step in steps]
    assert cached_tokens == [turn["cached_tokens"] for turn in turns]
    assert cached_tokens[0] == 0
    assert cached_tokens == sorted(set(cached_tokens)), "each turn finds more in the cache"
    for before, now in pairwise(turns):
        whole_blocks = (before["prompt_tokens"] + before["output_tokens"]) // 16 * 16
        assert now["cached_tokens"] >= whole_blocks - 16


def test_two_runs_alike_at_once_are_two_sessions(gateway: Serving) -> None:
    """Nothing but the tool-call ids tells them apart."""
    task = prompt("Count alike.", *SCRIPT)
    before = gateway.recognised()
    with (
        gateway.watched() as found,
        ChatAgent(gateway.url, task, "alike", False) as one,
        ChatAgent(gateway.url, task, "alike", True) as two,
    ):
        for _ in zip(run(one), run(two), strict=True):
            pass
    assert [session["turns"] for session in found] == [4, 4]
    assert [session["tool_calls"] for session in found] == [4, 4]
    after = gateway.recognised()
    assert after["tool_call_id"] - before.get("tool_call_id", 0) == 6
