"""What admission is asked for a turn: which lane it takes, who waits for it, how urgent it is."""

from __future__ import annotations

from typing import get_args

from gateway.admission import Ask, Lane
from gateway.dialects.turn import TurnRequest
from gateway.errors import GatewayError
from gateway.holds import Priority
from gateway.identity import Headers
from gateway.routing import Arrival
from gateway.sessions import Turn

PRIORITY_HEADER = b"x-cachewise-priority"
HEAD_SEGMENTS = (3, 2, 1)
"""Prefix links under which a prompt's beginning is shared between sessions: up to the second
message, the first message, the system prompt."""

_PRIORITIES: dict[bytes, Priority] = {name.encode(): name for name in get_args(Priority)}


def priority_of(headers: Headers) -> Priority:
    """What the caller says of its turn's urgency. Raises `GatewayError` 400."""
    value = headers.get(PRIORITY_HEADER)
    if value is None:
        return "interactive"
    found = _PRIORITIES.get(value.strip().lower())
    if found is None:
        raise GatewayError(
            400,
            "invalid_request",
            f"{PRIORITY_HEADER.decode()}: {value[:40].decode('latin-1')!r} is not a priority;"
            f" allowed: {', '.join(get_args(Priority))}",
        )
    return found


def lane_of(turn: Turn, request: TurnRequest) -> Lane:
    """``agent`` for a turn of a loop: it offers tools, or its conversation already goes on. The
    rest (titles, single questions, completions) is ``aside``."""
    if turn.request_class == "auxiliary" or request.wire == "completions":
        return "aside"
    if request.has_tools or (turn.session.turns > 1 and turn.request_class != "compaction"):
        return "agent"
    return "aside"


def ask_for(
    turn: Turn | None,
    request: TurnRequest,
    tenant: str,
    tenant_weight: float,
    priority: Priority,
    number: int,
    arrived_at: float,
    spared: bool,
) -> Ask:
    """The turn as admission sees it. One without a session is an aside of its own, told from
    others by ``number``. ``arrived_at`` is when it first arrived, seconds of the loop's clock;
    ``spared`` whether it was when its client left."""
    if turn is None:
        nobody = Arrival(sid=f"?{number}", prompt_tokens=1, same_tokens=0, heads=[])
        return Ask(
            nobody,
            request.model,
            tenant,
            priority,
            lane="aside",
            tenant_weight=tenant_weight,
            arrived_at=arrived_at,
        )
    session = turn.session
    person_waits = turn.request_class == "main" and (
        session.turns == 1 or (turn.gap is not None and turn.gap.kind == "human")
    )
    return Ask(
        Arrival(
            sid=session.sid,
            prompt_tokens=turn.prompt_tokens,
            # Of a session that others have served nothing shows that it has changed.
            same_tokens=turn.prompt_tokens if turn.resumed else turn.same_tokens,
            heads=turn.heads(HEAD_SEGMENTS),
            home=None if turn.resumed else session.pod,
            relative=turn.forked_from,
            affinity=session.affinity,
            resumed=turn.resumed,
        ),
        request.model,
        tenant,
        priority,
        lane=lane_of(turn, request),
        began_at=session.created_at,
        person_waits=person_waits,
        output_tokens=round(session.answer_tokens),
        tenant_weight=tenant_weight,
        arrived_at=arrived_at,
        spared=spared,
    )
