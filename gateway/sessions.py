"""Sessions: which conversation a turn belongs to, and where each conversation stands.

Identity: what the request names (`gateway.identity`), else the tool-call ids this gateway relayed,
else the longest common prefix, else a new chain. Lifecycle: ``running`` while a turn is in flight,
then ``idle`` (for a tool, a person or the background), ``ended`` when it will not come back.

Bounded: at most ``max_sessions`` sessions (least recently seen out first), none idle longer than
``ttl_s``; what a session holds is a few numbers a message. All methods are O(1) in the number of
sessions, and take ``now``.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count, islice, takewhile
from math import inf
from secrets import token_hex

from gateway.dialects.turn import ToolCall, TurnOutcome, TurnRequest, Usage
from gateway.identity import (
    Headers,
    Named,
    RequestClass,
    classify,
    client_kind,
    named_by_body,
    named_by_headers,
)
from gateway.idle import (
    STARTS_BACKGROUND,
    IdleKind,
    idle_after,
    notified_calls,
    resumed_by,
    starts_background,
    waited_for,
    went_to_background,
)
from gateway.predictor import Forecast
from gateway.prefix import (
    HEAD_SEGMENTS,
    Prefix,
    PrefixChange,
    Skeleton,
    TailIndex,
    advance,
    raw_hashes,
    seed_of,
    since,
    xxh3,
)
from gateway.routing import Decision

GAPS_KEPT = 8
CALLS_KEPT = 64
BACKGROUND_KEPT = 32
RESPONSES_KEPT = 4
MAX_ID_CHARS = 256
TOKENS_PER_BYTE = 0.25
"""What a byte of canonical JSON costs in tokens before a pod has said otherwise."""


@dataclass(slots=True, frozen=True)
class Gap:
    """The time a session was away: from the end of a response to its next request."""

    seconds: float
    kind: IdleKind
    tools: tuple[str, ...]
    at: float


@dataclass(slots=True)
class Session:
    """One chain. ``sid`` is its opaque public name; times are of the caller's clock, seconds."""

    key: str
    sid: str
    tenant: str
    scope: int
    source: str
    group: str
    parent: str | None
    client: str
    model: str
    created_at: float
    seen_at: float
    request_class: RequestClass
    affinity: str
    """What every replica of the gateway calls it when it chooses a pod: ``sid`` of a session that
    its client names, else a digest of how it begins."""
    forked_from: str | None = None
    turns: int = 0
    in_flight: int = 0
    idle_kind: IdleKind | None = None
    idle_since: float | None = None
    waiting_for: tuple[str, ...] = ()
    """Names of the tools that the last response asked for."""
    calls: tuple[str, ...] = ()
    """Ids of these calls, as issued."""
    responses: tuple[str, ...] = ()
    """Where the ids of the latest responses stand in the store's index."""
    background: dict[str, bool] = field(default_factory=dict)
    """Ids of calls left running; True for a wake-up the client has planned for itself."""
    gaps: tuple[Gap, ...] = ()
    prefix: Prefix | None = None
    last_user_text: str = ""
    tokens_per_byte: float = TOKENS_PER_BYTE
    usage: Usage | None = None
    pod: str | None = None
    breaks: int = 0
    lost_tokens: int = 0
    tool_calls: int = 0
    has_tools: bool = False
    final: bool = False
    decision: Decision | None = None
    """How the latest turn was routed."""
    last_failed: bool = False
    """Whether the latest tool result it brought was an error."""
    forecast: Forecast | None = None
    """Of the gap it is in; None while a turn is in flight or where none could be made."""
    answer_tokens: float = 500.0
    """Length of its answers: a mean that forgets."""
    elsewhere: bool = False
    """Another replica of the gateway has served it last, and has said so."""
    skeleton: Skeleton | None = None
    """Of its latest request, where that was served by another replica."""
    heads_elsewhere: frozenset[int] = frozenset()
    """Links under which its latest request began, where another replica has said so."""
    heard_at: float = -inf
    """When another replica, or the store, last spoke of it."""
    marks: tuple[bytes, ...] = ()
    """Under what it was written to the store, where no request names it."""

    @property
    def named(self) -> bool:
        """Whether its client names it, so that every replica calls it alike."""
        return self.source != "new"

    @property
    def state(self) -> str:
        if self.in_flight:
            return "running"
        return "ended" if self.idle_kind == "ended" else "idle"


@dataclass(slots=True)
class Turn:
    """A turn in flight. ``prompt_tokens`` and ``same_tokens`` are estimates from bytes; ``number``
    counts the session's turns from 1."""

    session: Session
    number: int
    request_class: RequestClass
    identified_by: str
    prefix: Prefix
    change: PrefixChange
    prompt_tokens: int
    same_tokens: int
    lost_tokens: int
    gap: Gap | None
    forked_from: tuple[str, int] | None
    """The chain (its sid) that this new one continues, and how many tokens they share."""
    started_at: float
    resumed: bool = False
    """Its history holds answers that did not pass here, nor is it known where they came from."""
    came_over: bool = False
    """Another replica of the gateway has served its session last, and has said so."""

    def heads(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Links of the prompt's prefix after the given segments and the tokens up to there."""
        prefix, rate = self.prefix, self.session.tokens_per_byte
        return [
            (prefix.chain[i], round(prefix.end_bytes[i] * rate))
            for i in positions
            if i < len(prefix) and prefix.end_bytes[i] > 0
        ]


@dataclass(slots=True, frozen=True)
class Unknown:
    """The session of a request that goes on with a conversation of which nothing, or nothing
    recent, is known here: under what another replica may know it."""

    scope: int
    key: str | None
    """Of a session that the request names."""
    marks: tuple[str, ...]
    """Of one that it does not name: what may tell it, the surest first."""


class SessionStore:
    """All sessions of this gateway. `begin` and `end` frame each turn; `end` must follow on every
    exit (the caller holds them together with ``try/finally``)."""

    def __init__(self, max_sessions: int, ttl_s: float) -> None:
        self.max_sessions = max_sessions
        self.ttl_s = ttl_s
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._by_sid: dict[str, str] = {}
        self._issued: OrderedDict[str, str | None] = OrderedDict()
        self._responses: dict[str, str] = {}
        self._tails = TailIndex(limit=TailIndex.LINKS * max_sessions)
        self._distrust: OrderedDict[str, int] = OrderedDict()
        self._unnamed = token_hex(16)
        self._numbers = count()
        self.evicted_total = 0
        self.on_forget: Callable[[Session], None] = lambda session: None
        """Called with each session that is forgotten."""

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        """Sessions, least recently seen first."""
        return iter(self._sessions.values())

    def __reversed__(self) -> Iterator[Session]:
        """Sessions, most recently seen first."""
        return reversed(self._sessions.values())

    def by_sid(self, sid: str) -> Session | None:
        key = self._by_sid.get(sid)
        return self._sessions.get(key) if key is not None else None

    def of_response(self, scope: int, response_id: str) -> Session | None:
        """The session whose response had this id (``/v1/responses/{id}``)."""
        key = self._responses.get(f"{scope:x}:{response_id}")
        return self._sessions.get(key) if key is not None else None

    # -- a turn begins ---------------------------------------------------------------------------

    def begin(
        self,
        headers: Headers,
        request: TurnRequest,
        tenant: str,
        scope: int,
        now: float,
        recalled: str | None = None,
    ) -> Turn:
        """Find or make the session of a request that just arrived, close its gap, count it in.
        ``recalled`` is the key of the one that `look_up` asked for, if it was found."""
        named, request_class = self._named(headers, request, scope)
        session, prefix, change, by, fork = self._resolve(
            headers, request, named, request_class, tenant, scope, now, recalled
        )
        came_over = session.elsewhere
        resumed = fork is None and _answered_elsewhere(session, request, change)
        session.elsewhere = False
        session.skeleton = None
        session.heads_elsewhere = frozenset()
        gap = self._close_gap(session, request, request_class, now)
        self._note_background(session, request, change)

        lost_tokens = round(change.lost_bytes * session.tokens_per_byte)
        if change.cause is not None:
            session.breaks += 1
            session.lost_tokens += lost_tokens
        if session.prefix is not None:
            self._tails.forget(scope, session.prefix, session.key)
        session.prefix = prefix
        self._tails.register(scope, prefix, session.key)
        session.last_user_text = _last_user_text(request)
        session.model = request.model
        session.has_tools = session.has_tools or request.has_tools
        results = request.item(len(request.segments) - 1).results
        session.last_failed = bool(results) and results[-1].is_error
        session.final = named is not None and named.final
        session.seen_at = now
        session.in_flight += 1
        session.turns += 1
        self._sessions.move_to_end(session.key)
        self._make_room()
        return Turn(
            session=session,
            number=session.turns,
            request_class=request_class,
            identified_by=by,
            prefix=prefix,
            change=change,
            prompt_tokens=max(1, round(change.total_bytes * session.tokens_per_byte)),
            same_tokens=round(change.same_bytes * session.tokens_per_byte),
            lost_tokens=lost_tokens,
            gap=gap,
            forked_from=fork,
            started_at=now,
            resumed=resumed,
            came_over=came_over,
        )

    def look_up(
        self, headers: Headers, request: TurnRequest, scope: int, current_from: float
    ) -> Unknown | None:
        """What to ask other replicas for before `begin`; None if there is nothing to ask. What is
        known of a session is current if it was seen, or heard of, after ``current_from``."""
        if not _replied_after(request, HEAD_SEGMENTS):
            return None
        named, request_class = self._named(headers, request, scope)
        aside = _is_aside(request, request_class)
        if named is not None:
            key = f"{scope:x}:{_chain(named, request_class, aside)}"
            unknown = Unknown(scope, key, ())
            known = self._sessions.get(key)
        elif aside:
            return None
        else:
            unknown = Unknown(scope, None, _marks(request, scope))
            known = self._owner_of_calls(request, scope) or self._extended(request, scope)
            if known is None:
                known = self._continued(request, advance(None, request)[0], scope)
        if known is not None and (
            known.in_flight or max(known.seen_at, known.heard_at) >= current_from
        ):
            return None
        return unknown

    def take_in(self, session: Session) -> None:
        """Remember a session that another replica has served."""
        self._sessions[session.key] = session
        self._by_sid[session.sid] = session.key
        self._make_room()

    def _named(
        self, headers: Headers, request: TurnRequest, scope: int
    ) -> tuple[Named | None, RequestClass]:
        """What the request names as its session, as far as it is believed, and its class."""
        named = named_by_headers(headers) or named_by_body(request)
        if named is not None and self._distrust.get(_source(headers, named, scope), 0) >= 3:
            named = None
        request_class = classify(headers, request, named)
        if named is not None and request_class in ("main", "subagent") and not request.has_tools:
            known = self._sessions.get(f"{scope:x}:{named.chain}")
            if known is not None and known.has_tools:
                request_class = "auxiliary"
        return named, request_class

    def _resolve(
        self,
        headers: Headers,
        request: TurnRequest,
        named: Named | None,
        request_class: RequestClass,
        tenant: str,
        scope: int,
        now: float,
        recalled: str | None,
    ) -> tuple[Session, Prefix, PrefixChange, str, tuple[str, int] | None]:
        """The session of a request, its prefix, how it was recognised, what it was forked from."""
        aside = _is_aside(request, request_class)
        source = "new"
        forked_from: Session | None = None
        if named is not None:
            group, parent = named.group, named.parent
            chain = _chain(named, request_class, aside)
            if aside:
                parent = named.chain
            key, source = f"{scope:x}:{chain}", named.source
            known = self._sessions.get(key)
            if known is not None:
                prefix, change = _advance(known, request)
                self._distrust.pop(_source(headers, named, scope), None)
                return known, prefix, change, named.source, None
            prefix, change = advance(None, request)
            if not aside:
                forked_from = self._continued(request, prefix, scope)
                self._weigh_source(_source(headers, named, scope), named, forked_from)
        else:
            owner = self._sessions.get(recalled) if recalled is not None else None
            if owner is not None:
                return owner, *_advance(owner, request), "store", None
            owner = self._owner_of_calls(request, scope)
            if owner is not None:
                return owner, *_advance(owner, request), "tool_call_id", None
            if not aside and (owner := self._extended(request, scope)) is not None:
                return owner, *_advance(owner, request), "prefix", None
            prefix, change = advance(None, request)
            if not aside and (owner := self._continued(request, prefix, scope)) is not None:
                return owner, *_advance(owner, request), "prefix", None
            chain = f"{self._unnamed}.{next(self._numbers)}"
            key, group, parent = f"{scope:x}:{chain}", chain, None

        sid = sid_of(key)
        session = Session(
            key=key,
            sid=sid,
            tenant=tenant,
            scope=scope,
            source=source,
            group=sid_of(f"{scope:x}:{group}"),
            parent=sid_of(f"{scope:x}:{parent}") if parent else None,
            client=client_kind(headers),
            model=request.model,
            created_at=now,
            seen_at=now,
            request_class=request_class,
            affinity=sid if named is not None else _beginning(scope, request, prefix),
        )
        fork = None
        if forked_from is not None:
            session.forked_from = forked_from.sid
            session.tokens_per_byte = forked_from.tokens_per_byte
            shared_bytes = advance(forked_from.prefix, request)[1].same_bytes
            fork = forked_from.sid, round(shared_bytes * session.tokens_per_byte)
        elif (relative := self._sessions.get(f"{scope:x}:{parent or group}")) is not None:
            session.tokens_per_byte = relative.tokens_per_byte
        self._sessions[key] = session
        self._by_sid[session.sid] = key
        return session, prefix, change, source, fork

    def _owner_of_calls(self, request: TurnRequest, scope: int) -> Session | None:
        """The session that was issued the newest tool-call id found in the request, or whose
        response it continues."""
        previous = _previous_response(request)
        if previous and (owner := self.of_response(scope, previous)) is not None:
            return owner
        for index in range(len(request.segments) - 1, 1, -1):
            item = request.item(index)
            for call_id in (*(r.call_id for r in item.results), *item.call_ids):
                key = self._issued.get(f"{scope:x}:{call_id}")
                if key is not None and (owner := self._sessions.get(key)) is not None:
                    return owner
            if item.call_ids:
                return None  # older calls are of older turns: their chain has moved on
        return None

    def _extended(self, request: TurnRequest, scope: int) -> Session | None:
        """The session whose latest request this one extends byte for byte: what `_continued` finds
        too, at the cost of parsing the whole history."""
        found = self._tails.find_raw(scope, seed_of(request), raw_hashes(request))
        if found is None or not _replied_after(request, found[1]):
            return None
        owner = self._sessions.get(found[0])
        if owner is None or owner.prefix is None or len(owner.prefix) != found[1]:
            return None
        return owner

    def _continued(self, request: TurnRequest, prefix: Prefix, scope: int) -> Session | None:
        """The session whose latest request this one extends. One rewritten last message is
        forgiven if the request has grown beyond it and they have more in common than a system
        prompt. Several that fit: the one whose last words fit, else one at rest, else the one seen
        last."""

        def fits(owner: Session) -> bool:
            """aider's rewriting cuts the end of what was the last message."""
            text = request.item(len(owner.prefix or ()) - 1).text
            return bool(text) and owner.last_user_text.startswith(text[:200])

        if not _replied_after(request, HEAD_SEGMENTS):
            return None
        candidates: list[Session] = []
        longest = 0
        for key, shared in self._tails.find(scope, prefix):
            owner = self._sessions.get(key)
            if owner is None or owner.prefix is None or shared < longest:
                continue
            whole = shared == len(owner.prefix) and len(prefix) > shared
            rewritten = (
                shared == len(owner.prefix) - 1
                and len(prefix) > len(owner.prefix)
                and (_user_spoke(request, shared) or fits(owner))
            )
            if not (whole or rewritten) or not _replied_after(request, shared):
                continue
            longest = shared
            candidates.append(owner)
        return max(
            candidates,
            key=lambda owner: (fits(owner), owner.in_flight == 0, owner.seen_at),
            default=None,
        )

    def _weigh_source(self, place: str, named: Named, continued: Session | None) -> None:
        """A header whose value is new each time while the conversation goes on names requests, not
        sessions: after three such in a row it is not believed any more from this client."""
        if continued is None or continued.source != named.source or continued.turns > 1:
            return
        self._distrust[place] = self._distrust.get(place, 0) + 1
        self._distrust.move_to_end(place)
        while len(self._distrust) > 1024:
            self._distrust.popitem(last=False)

    @staticmethod
    def _close_gap(
        session: Session, request: TurnRequest, request_class: RequestClass, now: float
    ) -> Gap | None:
        since, expected = session.idle_since, session.idle_kind
        session.idle_since = session.idle_kind = None
        if since is None or expected is None or session.in_flight:
            return None
        if len(request.segments) <= 2:
            return None
        if expected == "ended":
            expected = "human"
        # A compaction's last message is the client's own: it says nothing about the wait.
        compacts = request_class == "compaction"
        resumed = None if compacts else resumed_by(request.item(len(request.segments) - 1))
        kind = waited_for(expected, resumed)
        gap = Gap(max(0.0, now - since), kind, session.waiting_for, now)
        session.gaps = (*session.gaps[1 - GAPS_KEPT :], gap)
        return gap

    @staticmethod
    def _note_background(session: Session, request: TurnRequest, change: PrefixChange) -> None:
        """Follow what the client left running, from the request's new messages."""
        for index in range(max(2, change.same), len(request.segments)):
            item = request.item(index)
            for result in item.results:
                if went_to_background(result):
                    _leave_running(session, result.call_id, planned=False)
                elif result.is_error:
                    session.background.pop(result.call_id, None)
            finished = notified_calls(item) if item.role == "user" else None
            if finished is not None:
                for call_id in finished:
                    if session.background.pop(call_id, None) is None:
                        session.background.pop(_unnamed_call(session), None)
                if not finished and session.background:
                    del session.background[next(iter(session.background))]
            elif item.role == "user" and item.text and not item.results:
                # A person is back: a wake-up the client had planned is no longer what we wait for.
                for call_id in [c for c, planned in session.background.items() if planned]:
                    del session.background[call_id]

    # -- a turn ends -----------------------------------------------------------------------------

    def end(self, turn: Turn, outcome: TurnOutcome | None, now: float) -> None:
        """Close a turn: what it asked for, what the session waits for now. ``outcome`` is None
        where the turn failed or was aborted: the client may send it again at once, so the session
        is idle without a kind and the next gap is not measured."""
        session = turn.session
        session.in_flight -= 1
        session.seen_at = now
        self._sessions.move_to_end(session.key)
        if outcome is None:
            return
        if outcome.usage is not None and outcome.usage.prompt_tokens:
            session.usage = outcome.usage
            session.answer_tokens += 0.3 * (outcome.usage.output_tokens - session.answer_tokens)
            if turn.change.total_bytes:
                session.tokens_per_byte = outcome.usage.prompt_tokens / turn.change.total_bytes
        if outcome.response_id is not None and len(outcome.response_id) <= MAX_ID_CHARS:
            self._responded(session, outcome.response_id)
        calls = outcome.tool_calls
        session.tool_calls += len(calls)
        self._issue(session, calls)
        for call in calls:
            if starts_background(call):
                _leave_running(session, call.id, planned=call.name in STARTS_BACKGROUND)
        session.waiting_for = tuple(call.name[:128] for call in calls[:CALLS_KEPT])
        session.idle_since = now
        session.idle_kind = self.idle_kind_after(turn, calls)

    @staticmethod
    def idle_kind_after(turn: Turn, calls: list[ToolCall]) -> IdleKind:
        """What the session will wait for after an answer with these calls."""
        session = turn.session
        if session.final or turn.request_class == "auxiliary":
            return "ended"
        if turn.request_class == "compaction":
            # The client goes on by itself; an aside without tools has done its work.
            return "background" if session.has_tools else "ended"
        kind = idle_after(calls, bool(session.background))
        if kind == "human" and not calls and session.parent is not None:
            return "ended"  # a sub-agent that answers without a call has reported to its parent
        return kind

    def _responded(self, session: Session, response_id: str) -> None:
        place = f"{session.scope:x}:{response_id}"
        if place in session.responses:
            return
        self._responses[place] = session.key
        for old in session.responses[: 1 - RESPONSES_KEPT]:
            self._forget_response(session, old)
        session.responses = (*session.responses[1 - RESPONSES_KEPT :], place)

    def _forget_response(self, session: Session, place: str) -> None:
        if self._responses.get(place) == session.key:
            del self._responses[place]

    def _issue(self, session: Session, calls: list[ToolCall]) -> None:
        """Remember whose the calls' ids are. An id that two sessions were given names neither."""
        for call_id in session.calls:
            if self._issued.get(f"{session.scope:x}:{call_id}") == session.key:
                del self._issued[f"{session.scope:x}:{call_id}"]
        session.calls = tuple(
            call.id for call in calls[:CALLS_KEPT] if 0 < len(call.id) <= MAX_ID_CHARS
        )
        for call_id in session.calls:
            place = f"{session.scope:x}:{call_id}"
            taken = place in self._issued and self._issued[place] != session.key
            self._issued[place] = None if taken else session.key
            self._issued.move_to_end(place)
        while len(self._issued) > 4 * self.max_sessions:
            self._issued.popitem(last=False)

    # -- forgetting ------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Session]:
        """Forget sessions not seen for ``ttl_s``; returns them."""
        old = takewhile(lambda s: s.seen_at <= now - self.ttl_s, self._sessions.values())
        gone = [session for session in old if not session.in_flight]
        for session in gone:
            self._forget(session)
        return gone

    def _make_room(self) -> None:
        surplus = len(self._sessions) - self.max_sessions
        if surplus <= 0:
            return
        idle = (s for s in self._sessions.values() if not s.in_flight)
        for session in list(islice(idle, surplus)):
            self._forget(session)
            self.evicted_total += 1

    def _forget(self, session: Session) -> None:
        del self._sessions[session.key]
        self._by_sid.pop(session.sid, None)
        self._issue(session, [])
        for place in session.responses:
            self._forget_response(session, place)
        if session.prefix is not None:
            self._tails.forget(session.scope, session.prefix, session.key)
        self.on_forget(session)


def sid_of(key: str) -> str:
    """An opaque name for a key. Collision-proof, since pods tell sessions apart by it."""
    return blake2b(key.encode(), digest_size=16).hexdigest()


def _source(headers: Headers, named: Named, scope: int) -> str:
    """Who names sessions by this header or field."""
    return f"{scope:x}:{client_kind(headers)}:{named.source}"


def _is_aside(request: TurnRequest, request_class: RequestClass) -> bool:
    """Whether a request is kept apart from the chain that it names."""
    return request_class == "auxiliary" or (request_class == "compaction" and not request.has_tools)


def _chain(named: Named, request_class: RequestClass, aside: bool) -> str:
    return f"{named.chain}#{request_class}" if aside else named.chain


def _advance(session: Session, request: TurnRequest) -> tuple[Prefix, PrefixChange]:
    prefix, change = advance(session.prefix, request)
    if session.skeleton is not None:
        change = since(session.skeleton, prefix)
    heads = session.heads_elsewhere
    broken_here = change.cause is not None and heads.isdisjoint(prefix.chain[change.same :])
    if heads and heads.issubset(prefix.chain) and not broken_here:
        # It begins as the one before it did, which another replica has served: so far as that says
        # nothing has changed, whatever has since this replica saw it.
        change = PrefixChange(change.same, change.total_bytes, change.total_bytes)
    return prefix, change


MARKS_LOOKED_UP = 64


def call_mark(scope: int, call_id: str) -> str:
    return f"{scope:x}:call:{call_id}"


def response_mark(scope: int, response_id: str) -> str:
    return f"{scope:x}:response:{response_id}"


def request_mark(scope: int, raw: bytes | memoryview | array[int], seed: int) -> str:
    """Of a request's segments, by the hashes of their bytes."""
    return f"{scope:x}:request:{xxh3(raw, seed):x}"


def marks_of(session: Session) -> list[str]:
    """What tells that a request goes on with a session that no request names."""
    scope = session.scope
    marks = [call_mark(scope, call_id) for call_id in session.calls]
    marks += [f"{scope:x}:response:{place.partition(':')[2]}" for place in session.responses[-1:]]
    if session.prefix is not None:
        marks.append(request_mark(scope, session.prefix.raw, session.prefix.seed))
    return marks


def _marks(request: TurnRequest, scope: int) -> tuple[str, ...]:
    """The marks by which another replica may know the session of a request, the surest first."""
    marks: list[str] = []
    if previous := _previous_response(request):
        marks.append(response_mark(scope, previous))
    for index in range(len(request.segments) - 1, 1, -1):
        item = request.item(index)
        ids = (*(r.call_id for r in item.results), *item.call_ids)
        marks += (call_mark(scope, call_id) for call_id in ids if len(call_id) <= MAX_ID_CHARS)
        if item.call_ids or len(marks) >= MARKS_LOOKED_UP:
            break
    if not marks:
        raw = memoryview(raw_hashes(request))
        first = max(HEAD_SEGMENTS, len(raw) - TailIndex.RAW_LOOKBACK)
        seed = seed_of(request)
        marks = [request_mark(scope, raw[:n], seed) for n in range(len(raw) - 1, first, -1)]
    return tuple(dict.fromkeys(marks[:MARKS_LOOKED_UP]))


def _previous_response(request: TurnRequest) -> str:
    previous = request.ids.previous_response_id
    if not 0 < len(previous) <= 2 * MAX_ID_CHARS:
        return ""
    return bytes(previous).decode(errors="replace").strip('"')


UNNAMED_CALL = "?"
"""Begins the id of a call left running that another replica relayed."""


def _unnamed_call(session: Session) -> str:
    return next((c for c in session.background if c.startswith(UNNAMED_CALL)), UNNAMED_CALL)


def _leave_running(session: Session, call_id: str, planned: bool) -> None:
    if len(call_id) <= MAX_ID_CHARS:
        session.background[call_id] = planned
    if len(session.background) > BACKGROUND_KEPT:
        del session.background[next(iter(session.background))]


def _last_user_text(request: TurnRequest) -> str:
    for index in range(len(request.segments) - 1, max(1, len(request.segments) - 4), -1):
        item = request.item(index)
        if item.role == "user" and item.text:
            return item.text[:200]
    return ""


def _user_spoke(request: TurnRequest, shared: int) -> bool:
    """Whether a person's words are among the first ``shared`` segments."""
    return any(request.item(i).role == "user" for i in range(2, shared))


def _beginning(scope: int, request: TurnRequest, prefix: Prefix) -> str:
    """A digest of all up to a conversation's first words of a person."""
    for index in range(HEAD_SEGMENTS, len(prefix)):
        if request.item(index).role == "user":
            break
    return f"{prefix.chain[index] ^ scope:x}"


def _answered_elsewhere(session: Session, request: TurnRequest, change: PrefixChange) -> bool:
    """Whether another replica of the gateway, which may not know what this one knows, has served
    turns of the session since this one did (or ever): the request holds answers that were not given
    here."""
    if not session.turns:
        return _replied_after(request, HEAD_SEGMENTS)
    if session.heard_at > -inf:
        return False  # they do know
    new = (request.item(i).call_ids for i in range(change.same, len(request.segments)))
    return any(call_id not in session.calls for ids in new for call_id in ids)


def _replied_after(request: TurnRequest, shared: int) -> bool:
    """Whether the part beyond the first ``shared`` segments holds an answer of the model: without
    one, an equal beginning is another conversation that starts alike."""
    return any(request.item(i).role == "assistant" for i in range(shared, len(request.segments)))
