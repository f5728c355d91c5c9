"""Hints: what a pod is told about its sessions, checked strictly and applied once.

The envelope is vLLM's `KvHintsEnvelope` (PR #53423). Two actions are understood: `kv.retain` 1.0
(the shape of vLLM PR #38514) and `cachewise.reuse` 1.0. docs/hint-protocol.md is the reference.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated, Any, Literal

import msgspec

from engine_patch.forecast import Forecast
from engine_patch.sessions import MAX_LAPSE_S, Retention, SessionTable

PROTOCOL_VERSION = "0.1"
ACTION_VERSIONS = {"kv.retain": "1.0", "cachewise.reuse": "1.0"}
MAX_BODY_BYTES = 1_048_576
MAX_ACTIONS = 64
MAX_POINTS = 32
MAX_DIRECTIVES = 16
MAX_ID_BYTES = 256
_REMEMBERED_MESSAGES = 4_096

Status = Literal["applied", "clipped", "rejected", "unsupported"]
Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_BYTES)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class HintError(ValueError):
    """The envelope is malformed; `field` says where."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class Action(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One action of an envelope; its payload is checked by `parse`."""

    action_id: Id
    action_type: Id
    action_version: Id
    payload: msgspec.Raw


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message of hints; `message_id` makes it idempotent."""

    protocol_version: str
    message_id: Id
    actions: Annotated[list[Action], msgspec.Meta(min_length=1, max_length=MAX_ACTIONS)]


class Reuse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Payload of `cachewise.reuse`: the gap that began `elapsed_s` ago."""

    session_id: Id
    idle_kind: Literal["tool", "human", "ended"]
    survival: Annotated[list[tuple[Seconds, Probability]], msgspec.Meta(max_length=MAX_POINTS)]
    p_return: Probability
    elapsed_s: Seconds = 0.0


class Directive(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens `[start, end)`: priority 1-100 protects them, 0 releases them, for `duration` s."""

    priority: Annotated[int, msgspec.Meta(ge=0, le=100)]
    duration: Annotated[float, msgspec.Meta(gt=0)]
    start: Annotated[int, msgspec.Meta(ge=0)] = 0
    end: Annotated[int, msgspec.Meta(gt=0)] | None = None


class Retain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Payload of `kv.retain`; `scope` is a session id, by default the request's own."""

    directives: Annotated[list[Directive], msgspec.Meta(min_length=1, max_length=MAX_DIRECTIVES)]
    scope: Id | None = None


_decode_envelope = msgspec.json.Decoder(Envelope).decode
_decode_reuse = msgspec.json.Decoder(Reuse).decode
_decode_retain = msgspec.json.Decoder(Retain).decode

Payload = Reuse | Retain
Parsed = list[tuple[Action, Payload | None]]


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What became of one action."""

    action_id: str
    status: Status
    reason: str | None = None


def parse(body: bytes | dict[str, Any]) -> tuple[Envelope, Parsed]:
    """Check an envelope, given as JSON or as plain data; unknown action types have no payload.

    Raises:
        HintError: naming the field that is wrong.
    """
    try:
        if not isinstance(body, bytes):
            body = msgspec.json.encode(body)
        envelope = _decode_envelope(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _hint_error(error, "") from None
    if envelope.protocol_version != PROTOCOL_VERSION:
        raise HintError(
            "protocol_version", f"expected {PROTOCOL_VERSION!r}, got {envelope.protocol_version!r}"
        )
    return envelope, [
        (action, _parse_payload(action, f"actions[{i}]"))
        for i, action in enumerate(envelope.actions)
    ]


def parse_field(value: bytes | dict[str, Any]) -> tuple[Envelope, Parsed]:
    """`parse` for the field `kv_hints` of a request's body.

    Raises:
        HintError: naming the field from the body's root.
    """
    try:
        return parse(value)
    except HintError as error:
        raise HintError(f"kv_hints.{error.field}", error.reason) from None


def _parse_payload(action: Action, field: str) -> Payload | None:
    version = ACTION_VERSIONS.get(action.action_type)
    if version is None:
        return None
    if action.action_version != version:
        raise HintError(
            f"{field}.action_version", f"expected {version!r}, got {action.action_version!r}"
        )
    field += ".payload"
    try:
        if action.action_type == "kv.retain":
            retain = _decode_retain(action.payload)
            _check_id(retain.scope, f"{field}.scope")
            _check_directives(retain, field)
            return retain
        reuse = _decode_reuse(action.payload)
    except msgspec.DecodeError as error:
        raise _hint_error(error, field) from None
    _check_id(reuse.session_id, f"{field}.session_id")
    _check_curve(reuse, field)
    return reuse


def _check_id(value: str | None, field: str) -> None:
    if value is not None and len(value.encode()) > MAX_ID_BYTES:
        raise HintError(field, f"longer than {MAX_ID_BYTES} bytes")


def _check_curve(reuse: Reuse, field: str) -> None:
    for name, number in (("p_return", reuse.p_return), ("elapsed_s", reuse.elapsed_s)):
        if not math.isfinite(number):
            raise HintError(f"{field}.{name}", "not a finite number")
    t0, p0 = -1.0, 1.0
    for i, (t, p) in enumerate(reuse.survival):
        if t0 < t < math.inf and p <= p0:  # which no NaN is
            t0, p0 = t, p
            continue
        if not (math.isfinite(t) and math.isfinite(p)):
            raise HintError(f"{field}.survival[{i}]", "not a finite number")
        if t <= t0:
            raise HintError(f"{field}.survival[{i}][0]", "times must rise")
        raise HintError(f"{field}.survival[{i}][1]", "the curve must not rise")


def _check_directives(retain: Retain, field: str) -> None:
    start, priority = 0, 100
    for i, directive in enumerate(retain.directives):
        where = f"{field}.directives[{i}]"
        if not math.isfinite(directive.duration):
            raise HintError(f"{where}.duration", "not a finite number")
        if directive.end is not None and directive.end <= directive.start:
            raise HintError(f"{where}.end", "must lie beyond start")
        if directive.start < start:
            raise HintError(f"{where}.start", "directives must follow the token axis")
        if directive.priority > priority:
            raise HintError(f"{where}.priority", "must not rise along the token axis")
        start, priority = directive.start, directive.priority


def _hint_error(error: Exception, prefix: str) -> HintError:
    """msgspec says `... - at `$.path``; take the path."""
    reason, _, path = str(error).partition(" - at `$")
    field = prefix + path.rstrip("`")
    return HintError(field.lstrip(".") or "body", reason)


class HintBook:
    """Applies hints to the sessions of a pod, each message once, and counts the answers."""

    def __init__(self, sessions: SessionTable) -> None:
        self.sessions = sessions
        self.results: dict[tuple[str, Status], int] = {}
        self._answered: OrderedDict[str, list[Answer]] = OrderedDict()

    def apply(
        self, envelope: Envelope, actions: Parsed, now: float, own_session: str | None = None
    ) -> list[Answer]:
        """Take the parsed actions in order.

        Args:
            envelope: as given by `parse`; a `message_id` seen before changes nothing and gets the
                first answers again.
            actions: as given by `parse`.
            now: seconds of the session table's clock.
            own_session: session of the request the envelope came with, if it came with one.
        """
        answered = self._answered.get(envelope.message_id)
        if answered is not None:
            return answered
        answers = []
        for action, payload in actions:
            if payload is None:
                answer = Answer(action.action_id, "unsupported", "unknown action type")
            elif isinstance(payload, Reuse):
                answer = self._reuse(action.action_id, payload, now)
            else:
                answer = self._retain(action.action_id, payload, now, own_session)
            answers.append(answer)
            kind = action.action_type if payload is not None else "other"
            key = (kind, answer.status)
            self.results[key] = self.results.get(key, 0) + 1
        self._answered[envelope.message_id] = answers
        if len(self._answered) > _REMEMBERED_MESSAGES:
            self._answered.popitem(last=False)
        return answers

    def _reuse(self, action_id: str, reuse: Reuse, now: float) -> Answer:
        if reuse.elapsed_s > MAX_LAPSE_S:
            return Answer(action_id, "rejected", f"the gap is older than {MAX_LAPSE_S:.0f} s")
        curve = reuse.survival
        if curve and curve[-1][0] > MAX_LAPSE_S:
            curve = [(t, p) for t, p in curve if t <= MAX_LAPSE_S]
        refusal = self.sessions.forecast(
            reuse.session_id,
            reuse.idle_kind,
            Forecast(curve, reuse.p_return),
            reuse.elapsed_s,
            now,
        )
        if refusal:
            return Answer(action_id, "rejected", refusal)
        if len(curve) < len(reuse.survival):
            return Answer(action_id, "clipped", f"survival cut at {MAX_LAPSE_S:.0f} s")
        return Answer(action_id, "applied")

    def _retain(
        self, action_id: str, retain: Retain, now: float, own_session: str | None
    ) -> Answer:
        key = retain.scope or own_session
        if key is None:
            return Answer(action_id, "unsupported", "no scope, and the request has no session_id")
        self.sessions.retain(
            key,
            tuple(
                Retention(d.start, d.end, d.priority, now + min(d.duration, MAX_LAPSE_S))
                for d in retain.directives
            ),
            now,
        )
        if any(d.duration > MAX_LAPSE_S for d in retain.directives):
            return Answer(action_id, "clipped", f"duration cut to {MAX_LAPSE_S:.0f} s")
        return Answer(action_id, "applied")
