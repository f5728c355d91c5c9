"""What a pod is told about a session: `kv_hints` envelopes (docs/hint-protocol.md).

Pure: building them. Delivery is out of band and never on a turn's way.
"""

from __future__ import annotations

from typing import Any, Final

from engine_patch.hints import ACTION_VERSIONS, MAX_POINTS, PROTOCOL_VERSION
from gateway.admission import GapForecast
from gateway.idle import IdleKind

_WIRE_KIND: Final[dict[IdleKind, str]] = {
    "tool": "tool",
    "human": "human",
    "background": "tool",
    "ended": "ended",
}


def envelope(message_id: str, *actions: dict[str, Any]) -> dict[str, Any]:
    """A message of actions, numbered."""
    return {
        "protocol_version": PROTOCOL_VERSION,
        "message_id": message_id,
        "actions": [{"action_id": str(i), **action} for i, action in enumerate(actions)],
    }


def reuse(
    session_id: str, idle_kind: IdleKind, forecast: GapForecast | None, elapsed_s: float = 0.0
) -> dict[str, Any]:
    """`cachewise.reuse`: when the session will need its KV again. Without a forecast it will not
    (``ended``)."""
    ended = idle_kind == "ended" or forecast is None
    return {
        "action_type": "cachewise.reuse",
        "action_version": ACTION_VERSIONS["cachewise.reuse"],
        "payload": {
            "session_id": session_id,
            "idle_kind": "ended" if ended else _WIRE_KIND[idle_kind],
            "survival": []
            if forecast is None
            else [[t_s, p] for t_s, p in forecast.curve()][:MAX_POINTS],
            "p_return": 0.0 if ended or forecast is None else forecast.p_return,
            "elapsed_s": elapsed_s,
        },
    }
