from __future__ import annotations

import json
from typing import Any

import pytest

from engine_patch.hints import MAX_POINTS, HintBook, HintError, parse
from engine_patch.queue import ReuseAwareFreeQueue
from engine_patch.sessions import SessionTable
from tests.engine_patch.pool import PlainBlock

REUSE: dict[str, Any] = {
    "session_id": "s",
    "idle_kind": "tool",
    "survival": [[1.0, 0.9], [5.0, 0.1]],
    "p_return": 0.9,
    "elapsed_s": 0.0,
}
RETAIN: dict[str, Any] = {
    "scope": "s",
    "directives": [{"start": 0, "end": None, "priority": 50, "duration": 60.0}],
}


def envelope(
    payload: dict[str, Any], kind: str = "cachewise.reuse", version: str = "1.0", message: str = "m"
) -> dict[str, Any]:
    return {
        "protocol_version": "0.1",
        "message_id": message,
        "actions": [
            {"action_id": "a", "action_type": kind, "action_version": version, "payload": payload}
        ],
    }


@pytest.fixture
def book() -> HintBook:
    return HintBook(SessionTable(ReuseAwareFreeQueue([PlainBlock(i) for i in range(4)])))


def apply(
    book: HintBook, message: dict[str, Any], now: float = 10.0, own: str | None = None
) -> Any:
    return book.apply(*parse(message), now, own)[0]


PAYLOAD = "actions[0].payload"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (envelope(REUSE) | {"protocol_version": "9"}, "protocol_version"),
        (envelope(REUSE) | {"surprise": 1}, "body"),
        (envelope(REUSE) | {"actions": []}, "actions"),
        (envelope(REUSE, version="2.0"), "actions[0].action_version"),
        (envelope(REUSE | {"p_return": 1.5}), f"{PAYLOAD}.p_return"),
        (envelope(REUSE | {"p_return": "x"}), f"{PAYLOAD}.p_return"),
        (envelope(REUSE | {"idle_kind": "lunch"}), f"{PAYLOAD}.idle_kind"),
        (envelope(REUSE | {"elapsed_s": -1.0}), f"{PAYLOAD}.elapsed_s"),
        (envelope(REUSE | {"elapsed_s": float("nan")}), f"{PAYLOAD}.elapsed_s"),
        (envelope(REUSE | {"survival": [[1.0, float("nan")]]}), f"{PAYLOAD}.survival[0]"),
        (envelope(REUSE | {"survival": [[1, 0.5], [2, 0.6]]}), f"{PAYLOAD}.survival[1][1]"),
        (envelope(REUSE | {"survival": [[2, 0.5], [2, 0.4]]}), f"{PAYLOAD}.survival[1][0]"),
        (
            envelope(REUSE | {"survival": [[i, 0.5] for i in range(MAX_POINTS + 1)]}),
            f"{PAYLOAD}.survival",
        ),
        (envelope(REUSE | {"session_id": "x" * 257}), f"{PAYLOAD}.session_id"),
        (envelope(REUSE | {"session_id": "é" * 200}), f"{PAYLOAD}.session_id"),
        (envelope(REUSE | {"session_id": ""}), f"{PAYLOAD}.session_id"),
        (envelope(RETAIN | {"directives": []}, "kv.retain"), f"{PAYLOAD}.directives"),
        (
            envelope({"directives": [{"priority": 101, "duration": 1}]}, "kv.retain"),
            f"{PAYLOAD}.directives[0].priority",
        ),
        (
            envelope(
                {
                    "directives": [
                        {"end": 8, "priority": 1, "duration": 1},
                        {"start": 8, "priority": 2, "duration": 1},
                    ]
                },
                "kv.retain",
            ),
            f"{PAYLOAD}.directives[1].priority",
        ),
        (
            envelope(
                {"directives": [{"start": 8, "end": 8, "priority": 1, "duration": 1}]}, "kv.retain"
            ),
            f"{PAYLOAD}.directives[0].end",
        ),
    ],
)
def test_a_malformed_envelope_is_refused_and_the_field_named(
    message: dict[str, Any], field: str
) -> None:
    with pytest.raises(HintError) as caught:
        parse(message)
    assert caught.value.field.startswith(field) or f"`{field}`" in caught.value.reason


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"null", b'{"a": NaN}', b"[" * 5_000])
def test_what_is_no_envelope_is_refused(body: bytes) -> None:
    with pytest.raises(HintError):
        parse(body)


def test_each_action_gets_its_answer(book: HintBook) -> None:
    assert apply(book, envelope(REUSE)).status == "applied"
    assert apply(book, envelope(RETAIN, "kv.retain", message="2")).status == "applied"
    unknown = apply(book, envelope({}, "kv.prefetch", "7.1", message="3"))
    assert (unknown.status, unknown.reason) == ("unsupported", "unknown action type")
    far = REUSE | {"survival": [[1.0, 0.9], [1e6, 0.1]]}
    assert apply(book, envelope(far, message="4")).status == "clipped"
    old = REUSE | {"elapsed_s": 1e6}
    assert apply(book, envelope(old, message="5")).status == "rejected"
    assert book.results[("other", "unsupported")] == 1


def test_a_message_counts_once(book: HintBook) -> None:
    book.sessions.turn_arrived("s", 0.0)
    book.sessions.turn_finished("s", 1.0)
    first = apply(book, envelope(REUSE), now=1.0)
    book.sessions.turn_arrived("s", 2.0)
    again = apply(book, envelope(REUSE), now=3.0)
    assert again is first
    session = book.sessions.get("s")
    assert session is not None
    assert session.forecast is None
    assert sum(book.results.values()) == 1


def test_a_retention_without_scope_is_the_requests_own(book: HintBook) -> None:
    message = envelope({"directives": RETAIN["directives"]}, "kv.retain")
    assert apply(book, message).status == "unsupported"
    message["message_id"] = "2"
    assert apply(book, message, own="mine").status == "applied"
    assert book.sessions.get("mine") is not None


def test_json_and_plain_data_are_read_alike() -> None:
    message = envelope(REUSE)
    (_, from_json), (_, from_data) = parse(json.dumps(message).encode()), parse(message)
    assert [payload for _, payload in from_json] == [payload for _, payload in from_data]
