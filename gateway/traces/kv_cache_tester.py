"""Sessions of `callanjfox/kv-cache-tester`: one JSON object a session, and its compact re-encoding.

The original gives each request's whole list of block ids (``hash_ids``, unique to a prefix), nests
a sub-agent's requests in an entry of type ``subagent``, and holds most turns twice, as a streaming
and a non-streaming request with equal blocks: these are one turn here, from the start of the first
to the end of the second. The compact form names the blocks that are new, and has no such pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import numpy as np
import orjson

from gateway.idle import IdleKind
from gateway.traces.families import tree
from gateway.traces.lines import MAX_TOKENS, count, number, tokens
from gateway.traces.session import (
    BLOCK_TOKENS,
    MAX_BLOCKS,
    Blocks,
    Chain,
    Runs,
    Session,
    Turn,
    is_id,
)


def is_session(record: dict[str, Any]) -> bool:
    return isinstance(record.get("requests"), list) and "block_size" in record


def is_compact(record: dict[str, Any]) -> bool:
    return isinstance(record.get("req"), list) and "bs" in record


def sessions(record: dict[str, Any], scope: str) -> list[Session]:
    """A session and its sub-agents. Raises what a record of another shape raises."""
    session = _session(record, str(record["id"]))
    session.scope = scope if record.get("hash_id_scope") == "global" else str(record["id"])
    children: list[Session] = []
    session.turns = _turns(record["requests"], session, children)
    everything = [session, *children]
    if not children and session.scope == session.id:
        session.scope = ""
    return [each for each in everything if each.turns]


def _session(record: dict[str, Any], name: str) -> Session:
    return Session(
        name,
        block_tokens=_within(record.get("block_size") or BLOCK_TOKENS, MAX_TOKENS, least=1),
        tool_tokens=tokens(record.get("tool_tokens")),
        system_tokens=tokens(record.get("system_tokens")),
    )


def _within(value: Any, most: int, least: int = 0) -> int:
    if not least <= number(value) <= most:
        raise ValueError
    return int(value)


def _seconds(value: Any) -> float | None:
    return None if value is None else number(value)


def _turns(
    requests: list[dict[str, Any]], session: Session, children: list[Session], origin_s: float = 0.0
) -> list[Turn]:
    turns: list[Turn] = []
    chain = Chain()
    first: dict[str, Any] | None = None
    own = [request for request in requests if request["type"] != "subagent"]
    for request in requests:
        if request["type"] == "subagent":
            child = _session(request, f"{session.id}/{request['agent_id']}")
            child.block_tokens = session.block_tokens
            child.scope, child.parent = session.scope, session.id
            child.agent_type = str(request.get("subagent_type") or "")
            inner = [r for r in request["requests"] if r["type"] != "subagent"]
            begins_s = number(inner[0]["t"] if inner else request["t"])
            child.start_s = round(begins_s - origin_s, 6)
            children.append(child)
            child.turns = _turns(request["requests"], child, children, begins_s)
    for request, after in zip(own, [*own[1:], None], strict=True):
        if first is None and after is not None and _is_pair(request, after):
            first = request
            continue
        begun = first or request
        begun_s, t_s = number(begun["t"]), number(request["t"])
        api_s = _seconds(request.get("api_time"))
        turns.append(
            Turn(
                round(begun_s - origin_s, 6),
                count(request["in"]),
                count(request["out"]),
                gap_s=number(max(0.0, begun.get("think_time") or 0.0)) if turns else 0.0,
                gap_known=not turns or begun.get("think_time") is not None,
                api_s=None if api_s is None else round(max(0.0, t_s - begun_s) + api_s, 6),
                first_token_s=_seconds(begun.get("ttft")),
                idle_kind=_idle(_stop(begun, request), after is not None and _answers(after)),
                stop=_stop(begun, request),
                model=str(request.get("model") or ""),
                **chain.add(_ids(request["hash_ids"])),
            )
        )
        first = None
    return turns


def _ids(ids: list[int]) -> Blocks:
    if not set(map(type, ids)) <= {int}:
        raise ValueError
    try:
        return np.array(ids, np.int64)
    except OverflowError:  # unsigned hashes
        return np.array(ids, np.uint64).view(np.int64)


def _is_pair(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (
        a["type"] == "s"
        and b["type"] == "n"
        and not b.get("input_types")
        and a["hash_ids"] == b["hash_ids"]
    )


def _stop(begun: dict[str, Any], ended: dict[str, Any]) -> str:
    return str(ended.get("stop") or begun.get("stop") or "")


def _answers(request: dict[str, Any]) -> bool:
    return request.get("input_types") == ["tool_result"]


def _idle(stop: str, answered: bool) -> IdleKind:
    """What a turn is followed by; where its stop reason was not recorded, the next turn's input
    tells."""
    return "tool" if stop == "tool_use" or (not stop and answered) else "human"


def compact_sessions(record: dict[str, Any]) -> list[Session]:
    """A session in the compact form, and its sub-agents."""
    name, models, agents = str(record["id"]), record["models"], record["subs"]
    block_tokens = _within(record["bs"], MAX_TOKENS, least=1)
    root = Session(
        name,
        block_tokens=block_tokens,
        tool_tokens=tokens(record["tool"]),
        system_tokens=tokens(record["sys"]),
    )
    streams: dict[int | None, Session] = {None: root}
    origins_s = {None: 0.0}
    for request in record["req"]:
        agent, t_s = request.get("sa"), number(request["t"])
        if agent not in streams:
            known = agents[agent]
            origins_s[agent] = t_s
            streams[agent] = Session(
                f"{name}/{known['agent_id']}",
                parent=name,
                agent_type=str(known.get("subagent_type") or ""),
                start_s=t_s,
                block_tokens=block_tokens,
                tool_tokens=tokens(known.get("tool")),
                system_tokens=tokens(known.get("sys")),
            )
        named = models if agent is None else agents[agent]["models"]
        model, stop = request["m"], str(request["st"])
        turns = streams[agent].turns
        if turns and not turns[-1].stop and request["it"] == "tool_result":
            turns[-1] = replace(turns[-1], idle_kind="tool")
        turns.append(
            Turn(
                t_s - origins_s[agent],
                count(request["in"]),
                count(request["out"]),
                shared=_within(request.get("sb", request["s"]), MAX_BLOCKS),
                fresh=_merged(request["r"]),
                back=_within(request.get("b", 1), MAX_BLOCKS, least=1),
                gap_s=number(request.get("g", 0.0)) if turns else 0.0,
                gap_known=not turns or "g" in request,
                api_s=_seconds(request.get("a")),
                first_token_s=_seconds(request.get("tf")),
                idle_kind=_idle(stop, False),
                stop=stop,
                model=str(named[model]) if model is not None and model < len(named) else "",
            )
        )
    if len(streams) > 1:
        for session in streams.values():
            session.scope = name
    return [session for session in streams.values() if session.turns]


def _merged(flat: list[int]) -> Runs:
    if not set(map(type, flat)) <= {int}:
        raise ValueError
    starts, counts = flat[::2], flat[1::2]
    if not all(map(is_id, starts)):
        raise ValueError
    if any(length < 0 for length in counts) or sum(counts) > MAX_BLOCKS:
        raise ValueError
    pairs = zip(starts, counts, strict=True)
    return tuple(n for start, length in pairs if length for n in (start, length))


_STOP: Final = {"tool": "tool_use", "human": "end_turn", "background": "end_turn", "ended": ""}


def dump(sessions: Iterable[Session]) -> list[tuple[str, bytes]]:
    """Each root session with its sub-agents as (id, JSON).

    What the format cannot hold is left out: tool calls, cached tokens, wall-clock times, idle kinds
    but ``tool`` and ``human``.
    """
    everything = list(sessions)
    below = {
        None if n is None else everything[n].id: [everything[child] for child in children]
        for n, children in tree(everything).items()
    }
    return [(session.id, orjson.dumps(_record(session, below))) for session in below[None]]


def _record(session: Session, below: dict[str | None, list[Session]]) -> dict[str, Any]:
    return {
        "id": session.id,
        "models": sorted({turn.model for turn in session.turns}),
        "block_size": session.block_tokens,
        "hash_id_scope": "local" if session.scope in ("", session.id) else "global",
        "tool_tokens": session.tool_tokens,
        "system_tokens": session.system_tokens,
        "requests": _requests(session, below, 0.0),
    }


def _requests(
    session: Session, below: dict[str | None, list[Session]], origin_s: float
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    before: Turn | None = None
    for turn, chain in zip(session.turns, session.chains(), strict=True):
        answers = before is not None and before.idle_kind == "tool"
        entry = {
            "t": origin_s + turn.at_s,
            "type": "n",
            "model": turn.model,
            "in": turn.prompt_tokens,
            "out": turn.output_tokens,
            "hash_ids": chain.tolist(),
            "input_types": ["tool_result" if answers else "text"],
            "output_types": ["tool_use" if turn.idle_kind == "tool" else "text"],
            "stop": _STOP[turn.idle_kind] if turn.stop is None else turn.stop,
        }
        if turn.gap_known:
            entry["think_time"] = turn.gap_s
        if turn.api_s is not None:
            entry["api_time"] = turn.api_s
        if turn.first_token_s is not None:
            entry["ttft"] = turn.first_token_s
        entries.append(entry)
        before = turn
    for child in below.get(session.id, ()):
        begins_s = origin_s + child.start_s
        entries.append(
            {
                "t": begins_s,
                "type": "subagent",
                "agent_id": child.id.removeprefix(f"{session.id}/"),
                "subagent_type": child.agent_type,
                "duration_ms": round(child.ends_s * 1000),
                "status": "completed",
                "models": sorted({turn.model for turn in child.turns}),
                "tool_tokens": child.tool_tokens,
                "system_tokens": child.system_tokens,
                "requests": _requests(child, below, begins_s),
            }
        )
    return sorted(entries, key=lambda entry: float(entry["t"]))
