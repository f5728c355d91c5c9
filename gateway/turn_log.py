"""The line of the log that a turn leaves."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gateway.dialects.turn import TurnOutcome
from gateway.logs import turn_logged

if TYPE_CHECKING:
    from gateway.turns import TurnFlow

logger = logging.getLogger("gateway.turns")


def log_turn(flow: TurnFlow, now: float, outcome: TurnOutcome | None) -> None:
    """Counts, times and names of one finished turn; no text of the conversation."""
    if not logger.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "wire": flow.dialect.wire,
        "status": flow.status,
        "outcome": flow.outcome,
        "duration_s": round(now - flow.started_at, 4),
    }
    if flow.tenant is not None:
        fields["tenant"] = flow.tenant.name
    if flow.request is not None:
        fields["model"] = flow.request.model[:128]
    if flow.decision is not None:
        fields["pod"] = flow.decision.pod.name
        fields["reason"] = flow.decision.reason
    if flow.attempts > 1:
        fields["attempts"] = flow.attempts
    if flow.held_s:
        fields["held_s"] = round(flow.held_s, 3)
    if flow.first_byte_s is not None:
        fields["first_byte_s"] = round(flow.first_byte_s, 4)
    if flow.turn is not None:
        session = flow.turn.session
        fields |= {
            "session": session.sid,
            "client": session.client,
            "class": flow.turn.request_class,
            "turn": session.turns,
        }
        if flow.turn.gap is not None:
            fields["gap_s"] = round(flow.turn.gap.seconds, 3)
            fields["gap_kind"] = flow.turn.gap.kind
        if flow.turn.change.cause is not None:
            fields["prefix_break"] = flow.turn.change.cause
    if outcome is not None:
        if outcome.usage is not None:
            fields["prompt_tokens"] = outcome.usage.prompt_tokens
            fields["cached_tokens"] = outcome.usage.cached_tokens
            fields["output_tokens"] = outcome.usage.output_tokens
        if outcome.tool_calls:
            fields["tools"] = [call.name[:64] for call in outcome.tool_calls[:8]]
    turn_logged(logger, **fields)
