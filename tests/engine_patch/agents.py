"""Agents' sessions on a real pod: the same turns in the same order, with and without hints."""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.engine import pods

SYSTEM_TOKENS = 320
TOKEN_IDS = range(100, 200)


@dataclass
class Turn:
    session: str
    prompt: list[int]
    turns_until_next: int | None  # of all sessions; None: the session has ended


@dataclass
class Result:
    latency_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: list[int] = field(default_factory=list)

    @property
    def cached_share(self) -> float:
        return sum(self.cached_tokens) / self.prompt_tokens


def workload(sessions: int, turns: int, first_tokens: int, seed: int) -> list[Turn]:
    """Sessions that share a system prompt, each turn 64 tokens longer, some faster than others."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return rng.choices(TOKEN_IDS, k=n)

    system = tokens(SYSTEM_TOKENS)
    history = {f"s{i}": system + tokens(first_tokens + 400 * (i % 3)) for i in range(sessions)}
    left = dict.fromkeys(history, turns)
    order: list[str] = []
    clock = {name: rng.random() for name in history}
    pace = {name: rng.choice((1.0, 1.0, 3.0)) for name in history}
    while clock:
        name = min(clock, key=lambda n: clock[n])
        order.append(name)
        clock[name] += pace[name] * rng.uniform(0.7, 1.3)
        left[name] -= 1
        if not left[name]:
            del clock[name]
    result = []
    for i, name in enumerate(order):
        history[name] = history[name] + tokens(64)
        later = next((k for k in range(i + 1, len(order)) if order[k] == name), None)
        result.append(Turn(name, history[name], later - i if later is not None else None))
    return result


def envelope(action_type: str, payload: dict[str, Any], version: str = "1.0") -> dict[str, Any]:
    return {
        "protocol_version": "0.1",
        "message_id": uuid.uuid4().hex,
        "actions": [
            {
                "action_id": "a",
                "action_type": action_type,
                "action_version": version,
                "payload": payload,
            }
        ],
    }


def reuse(session: str, gap_s: float | None, p_return: float = 1.0) -> dict[str, Any]:
    ended = gap_s is None
    return envelope(
        "cachewise.reuse",
        {
            "session_id": session,
            "idle_kind": "ended" if ended else "tool",
            "survival": [] if gap_s is None else [[gap_s, 1.0], [gap_s * 1.01, 0.0]],
            "p_return": 0.0 if ended else p_return,
            "elapsed_s": 0.0,
        },
    )


def play(client: httpx.Client, turns: list[Turn], hints: bool) -> Result:
    """Take the turns one after another; a hint tells when the session's next one is due."""
    result = Result()
    turn_s = 0.2
    for turn in turns:
        started = time.perf_counter()
        answer = client.post(
            "/v1/completions",
            json={
                "model": pods.MODEL,
                "prompt": turn.prompt,
                "max_tokens": 2,
                "temperature": 0,
                "ignore_eos": True,
                "session_id": turn.session,
            },
        )
        answer.raise_for_status()
        usage = answer.json()["usage"]
        latency_s = time.perf_counter() - started
        result.latency_s += latency_s
        result.prompt_tokens += usage["prompt_tokens"]
        result.cached_tokens.append((usage["prompt_tokens_details"] or {}).get("cached_tokens", 0))
        turn_s += (latency_s - turn_s) / 10
        if hints:
            due_s = turn.turns_until_next and turn.turns_until_next * turn_s * 1.5
            client.post("/v1/kv_hints", json=reuse(turn.session, due_s)).raise_for_status()
    return result


def samples(client: httpx.Client, name: str) -> dict[str, float]:
    """Values of one metric by its last label, summed over the others, engine 0."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and sample.labels.get("engine", "0") == "0":
                labels = [v for k, v in sample.labels.items() if k != "engine"]
                key = labels[-1] if labels else ""
                found[key] = found.get(key, 0) + sample.value
    return found


def evictions(client: httpx.Client) -> float:
    return sum(samples(client, "cachewise:evicted_blocks_total").values())
