"""Request bodies shaped like those of coding agents, seeded and cheap to make.

An agent session resends its whole history. From a head of about 30 kB (15 tools, system prompt,
task) each turn adds one assistant message with a tool call and that call's result, together
`NEW_SHARE` of the body: 2.6 %, the share of new KV blocks a turn measured on 483 Claude Code
sessions. So turn 100 is about 400 kB in about 200 messages. Texts are slices of one shared corpus
behind a line that names session and turn: making them costs a copy, no two are equal.
"""

import random
from functools import cache

import orjson

MODEL = "bench-model"
NEW_SHARE = 0.026
HEAD_BYTES = 30_000
TOOLS = 15

_WORDS = """
return self value index block cache token request session async await def class import from
if else for while error result config path open read write test assert None True False dict
list str int float with as yield raise except finally lambda module parse route relay pod
"""


@cache
def _corpus() -> str:
    rng = random.Random(20)
    words = _WORDS.split()
    lines = [
        " " * rng.choice((0, 4, 4, 8)) + " ".join(rng.choices(words, k=rng.randint(2, 11)))
        for _ in range(12_000)
    ]
    return "\n".join(lines)


@cache
def _json_expansion() -> float:
    return len(orjson.dumps(_corpus())) / len(_corpus())


def _text(rng: random.Random, mark: str, json_bytes: float) -> str:
    """About `json_bytes` bytes of text, once encoded as JSON, beginning with `mark`."""
    length = max(0, int((json_bytes - len(mark)) / _json_expansion()))
    start = rng.randrange(len(_corpus()) - length)
    return mark + _corpus()[start : start + length]


@cache
def _tools() -> list[dict[str, object]]:
    rng = random.Random(15)
    return [
        {
            "type": "function",
            "function": {
                "name": f"tool_{i}",
                "description": _text(rng, f"Tool {i}. ", 900),
                "parameters": {
                    "type": "object",
                    "properties": {
                        "path": {"type": "string", "description": "Absolute path of a file"},
                        "command": {"type": "string", "description": "Shell command to run"},
                    },
                    "required": ["path"],
                },
            },
        }
        for i in range(TOOLS)
    ]


class AgentSession:
    """One growing chat session; `body(turn)` is the request of that turn, from 0.

    Messages are encoded once and kept, so a body costs one join. `seed` fixes every byte.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._name = f"{seed:08x}"
        tools = orjson.dumps(_tools())
        self._prefix = b'{"model":"%s","tools":%s,"messages":[' % (MODEL.encode(), tools)
        self._suffix = b"]}"
        rest = HEAD_BYTES - len(self._prefix)
        self._messages: list[bytes] = []
        self._bytes = len(self._prefix) + len(self._suffix)
        self._add(
            {"role": "system", "content": _text(self._rng, "You are an agent.\n", rest * 3 / 4)}
        )
        task = _text(self._rng, f"Task {self._name}\n", rest / 4)
        self._add({"role": "user", "content": task})

    def _add(self, message: dict[str, object]) -> None:
        self._messages.append(orjson.dumps(message))
        self._bytes += len(self._messages[-1]) + 1

    def _grow(self) -> None:
        turn = len(self._messages) // 2
        new_bytes = self._bytes * NEW_SHARE
        call_id = f"call_{self._rng.getrandbits(96):024x}"
        arguments = {"path": f"/src/{self._name}/module_{turn}.py"}
        call = {
            "id": call_id,
            "type": "function",
            "function": {
                "name": f"tool_{turn % TOOLS}",
                "arguments": orjson.dumps(arguments).decode(),
            },
        }
        said = _text(self._rng, f"Step {turn}. ", new_bytes * 0.1)
        before = self._bytes
        self._add({"role": "assistant", "content": said, "tool_calls": [call]})
        left = new_bytes - (self._bytes - before) - 80
        result = _text(self._rng, f"# {self._name} {turn}\n", left)
        self._add({"role": "tool", "tool_call_id": call_id, "content": result})

    def body(self, turn: int) -> bytes:
        """The JSON body of turn `turn`: 2 + 2 x turn messages."""
        while len(self._messages) < 2 + 2 * turn:
            self._grow()
        return self._prefix + b",".join(self._messages[: 2 + 2 * turn]) + self._suffix


def chat_body(seed: int, *, stream: bool = False) -> bytes:
    """A chat request of about 1 kB, its text different for every seed."""
    rng = random.Random(seed)
    body: dict[str, object] = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": _text(rng, f"Question {seed:08x}. ", 820)},
        ],
        "max_tokens": 256,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return orjson.dumps(body)
