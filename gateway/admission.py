"""Which sessions a pod works for: as many as its KV cache holds, the others wait their turn.

A session that is admitted to a pod has a *place* there: tokens of the pod's capacity for its next
turn (prompt and answer; prefixes shared between sessions count once). Places of a pod never exceed
its budget, `reserve × capacity`, except by what admitted sessions grow. A turn of a session with a
place goes through at once. Any other goes where it is served soonest (`routing.choose` with the
expected wait for a place as one more term), and is *held* if that is nowhere now.

A place outlives its turn: the session is about to come back from a tool. It is given up when it
ended, or for a held turn when waiting is not worth it: keeping k tokens costs k / budget
pod-seconds a second, losing them k / prefill rate pod-seconds, so the place is kept while the
forecast's reuse rate (its Gittins index, `engine_patch.forecast`) is at least 1 / horizon, with

    horizon = budget / prefill rate

the seconds in which the pod could prefill all that it has admitted.

A held turn is promised a place (`Admission.promise_s`). Once that is due some places go round: a
session that has had its for a stint gives way, the youngest session first, and stints are as long
as the promise allows. Each round costs the recomputation of two contexts, and attention makes a
context of twice the size more than twice as costly. So most of the budget does not go round: the
largest contexts keep their places, unless a turn has waited twice its promise, and come to their
end at full speed; and of the turns that are due a few of the largest are spared, and wait for what
the others leave.

Driving it. `Admission` is synchronous and knows no clock; an asynchronous caller does this:

    ticket = admission.arrive(ask, pods, now)          # may raise QueueFull: answer 503
    try:
        if ticket.held:                                # `released(ticket)` is called, from within
            await asyncio.wait_for(its_event, limit)   # a later call, when it gets its place
        ... relay to ticket.decision.pod ...
    finally:
        admission.end(ticket, now, ended_or_none)      # on every exit: abort, deadline, failure

and besides calls `tick(now)` about twice a second, `forget(sid)` when a session is over, and
`pod_lost`, `pod_restarted`, `pods_changed` as the fleet changes. A turn whose pod failed before it
answered is ended (None) and arrives again; `Ask.arrived_at` keeps its age.

Modes: ``enforce``; ``observe`` decides alike but lets every turn through and estimates the tokens
that enforcing would have saved; ``off`` only routes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from math import inf
from typing import Final, Literal, Protocol

from engine_patch.forecast import Forecast as ReuseForecast
from gateway.fleet.pod import Pod
from gateway.holds import (
    AGE_BOUND_S,
    PRIORITY_WEIGHT,
    Entry,
    HoldQueue,
    Priority,
    ShareClass,
    Shares,
    standing_s,
)
from gateway.idle import IdleKind
from gateway.routing import Arrival, Decision, Policy, Reason, choose, settled

Mode = Literal["enforce", "observe", "off"]
HoldReason = Literal["no_room", "after_a_due_turn", "no_pod"]
Lane = Literal["agent", "aside"]

RESERVE: Final = 0.8
RESERVE_RANGE: Final = (0.7, 0.95)
FREE_SHARE: Final = 0.8
"""Of the capacity, admitted while no more than one turn is held: what fits may stay."""
RESERVE_UP: Final = 0.0005
"""A second, while turns are held and admitted sessions find their KV again; twice while the pod
does nothing."""
RESERVE_DOWN: Final = 0.005
"""A second, while they do not."""
REGRET_LOW: Final = 0.01
REGRET_HIGH: Final = 0.05
ASIDE_SHARE: Final = 0.1
"""Of the capacity, kept for turns that belong to no agent loop."""
SHED: Final = 1.0
"""Of the capacity: beyond it, while turns are held, the places least worth keeping are given up, as
sessions that grew would evict one another's KV."""
FAIR_S: Final = 6.5
"""A turn's fair share of waiting, for each turn of an agent that waits for the pod."""
FAIR_FALLS_S: Final = 2000.0
"""In so long the promise follows a load that falls."""
FAIR_RISES: Final = 2.0
"""Seconds a second by which it follows one that rises."""
STINT_RANGE_S: Final = (30.0, 600.0)
"""So long a session keeps a place that goes round, from turn to turn, while a due turn waits."""
ROUND_SHARE: Final = 0.2
"""Of the budget, what goes round, one place at least; the largest contexts keep theirs."""
NEW_S: Final = 1.0
"""A session that began longer ago is not new any more."""
FIRST_TRY_S: Final = 10.0
"""A turn that arrived longer ago has been held before."""
SPARED_OF: Final = 5.5
"""Of so many sessions that compete one may be made to wait, once, for what the others leave: with
25 turns a session, 7 of 1,000 turns, which leaves the longest answers room in the hundredth."""
SPARED_S: Final = 3600.0
"""So much later such a turn is due."""
HORIZON_RANGE_S: Final = (5.0, 600.0)
MEAN_STINT_S: Final = 300.0
"""How long a session keeps its place, assumed before any was seen."""
REGRET_KEEP: Final = 0.98
"""Of the regret's memory, kept over a turn: about the last 50 turns count."""
STINT_SHARE: Final = 0.1
"""Of the mean stint, what the latest makes up."""
LOOK_AHEAD: Final = 16
"""Held turns that are tried for the room that there is, before the rest must wait for more."""
STALE_TOKENS: Final = 2_048
"""A held turn that lost more of its KV than this is put in its order anew."""
RECHECK: Final = 0.05
"""A reuse rate stands until this share has been added to the time waited, at least 0.2 s."""


class GapForecast(Protocol):
    """What is read of a forecast of the gap after a turn."""

    @property
    def p_return(self) -> float: ...

    def curve(self) -> Sequence[tuple[float, float]]:
        """Points (seconds, P(gap > seconds | it returns)), at most 32."""
        ...


class QueueFull(Exception):  # noqa: N818 - a condition, not a fault
    """No more turns are held."""


@dataclass(slots=True, frozen=True)
class Ask:
    """What admission needs to know of a turn."""

    arrival: Arrival
    model: str
    tenant: str = ""
    priority: Priority = "interactive"
    lane: Lane = "agent"
    """``aside`` for traffic that is no agent loop (single turns, titles): it has its own share."""
    began_at: float = 0.0
    """When its session began."""
    person_waits: bool = False
    """A person sits waiting: the first turn of a main session, or one after a human's."""
    output_tokens: int = 500
    """The answer's expected length."""
    tenant_weight: float = 1.0
    arrived_at: float | None = None
    """When the turn first arrived, if this is not the first try."""
    spared: bool = False
    """It was when its client left, and comes again: its wait goes on (`Ticket.spared`)."""
    tokens: int = field(init=False, compare=False)
    """Of prompt and answer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", self.arrival.prompt_tokens + self.output_tokens)

    @property
    def share(self) -> ShareClass:
        return self.tenant, self.priority

    @property
    def weight(self) -> float:
        return self.tenant_weight * PRIORITY_WEIGHT[self.priority]


@dataclass(slots=True, frozen=True)
class Ended:
    """How a turn ended that was answered."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    """None where the pod does not say."""
    idle_kind: IdleKind
    forecast: GapForecast | None = None


@dataclass(slots=True, eq=False)
class Place:
    """Tokens of a pod's budget that belong to one session."""

    sid: str
    ask: Ask
    since: float
    links: tuple[tuple[int, int], ...]
    """Shared prefixes: (link, tokens it adds to the one before)."""
    charged_at: float
    shared_tokens: int = field(init=False)
    own_tokens: int = field(init=False)
    """Tokens beyond the shared prefixes."""
    running: int = 0
    idle_since: float = 0.0
    idle_kind: IdleKind | None = None
    _forecast: GapForecast | ReuseForecast | None = None
    _rate: float = 0.0
    _recheck_at: float = -inf

    def __post_init__(self) -> None:
        self.shared_tokens = sum(tokens for _, tokens in self.links)
        self.own_tokens = max(0, self.ask.tokens - self.shared_tokens)

    @property
    def tokens(self) -> int:
        return self.own_tokens + self.shared_tokens

    def idles(self, now: float, kind: IdleKind | None, forecast: GapForecast | None) -> None:
        self.idle_since = now
        self.idle_kind = kind
        self._forecast = forecast
        self._recheck_at = -inf

    def reuse_rate(self, now: float) -> float:
        """Reuses a second that waiting for the session is worth; without a forecast 1 / age."""
        if self.running:
            return inf
        if now >= self._recheck_at:
            elapsed_s = now - self.idle_since
            forecast = self._forecast
            if forecast is None:
                self._rate = 1 / max(elapsed_s, 1.0)
            else:
                if not isinstance(forecast, ReuseForecast):  # most places are never asked
                    forecast = ReuseForecast(tuple(forecast.curve()), forecast.p_return)
                    self._forecast = forecast
                self._rate = forecast.reuse_rate(elapsed_s)
            self._recheck_at = now + max(0.2, RECHECK * elapsed_s)
        return self._rate


@dataclass(slots=True, eq=False)
class Ticket:
    """One turn between its arrival and its end."""

    ask: Ask
    decision: Decision
    """Where it goes; while held, where it would be served soonest."""
    arrived_at: float
    number: int
    held: bool = False
    """It must wait (``observe``: it would have to)."""
    held_s: float = 0.0
    """How long it was held, once it is not any more."""
    due_from: float = inf
    """When its wait began, as far as the promise goes: later than it came if it was spared."""
    spared: bool = False
    """It waits for what the others leave."""
    claim: str | None = None
    """The pod that takes no other turn before this one."""
    only: str | None = None
    """The one pod it may be released to; None for any."""
    shared_tokens: int = 0
    """Of its prompt, tokens of a prefix that other sessions left on some pod."""
    missing_tokens: int = 0
    """Of its prompt, what its home (without one, any pod) had to prefill when it was looked at."""
    home: Book | None = None
    """While held, where its live KV is."""
    kept: bool = False
    """Its session kept its place during the gap before."""
    expected_wait_s: float = 0.0
    """Of a held turn: how soon a place was to be expected when it came."""
    place: Place | None = None
    open: bool = True
    entries: tuple[Entry, ...] = ()
    """See `HoldQueue`."""
    context: object = None
    """The caller's own."""


@dataclass(slots=True, frozen=True)
class Others:
    """What other replicas of the gateway have on a pod, as far as they have told."""

    kept_tokens: float = 0.0
    """Of the budget, what is theirs or due to them."""
    placed_tokens: int = 0
    """Of their agents' places."""
    aside_tokens: int = 0
    held: int = 0
    """Turns that they hold, for any pod."""

    def without(self, tokens: int) -> Others:
        """The same after one of their sessions has come over."""
        return replace(
            self,
            kept_tokens=max(0.0, self.kept_tokens - tokens),
            placed_tokens=max(0, self.placed_tokens - tokens),
        )


NOBODY: Final = Others()


@dataclass(slots=True, frozen=True)
class Lent:
    """A place that another replica keeps for a session."""

    replica: str
    pod: str
    tokens: int


@dataclass(slots=True, eq=False)
class Book:
    """The places of one pod."""

    pod: Pod
    waiting: HoldQueue[Ticket]
    """Agents' turns held, on whatever pod's account."""
    reserve: float = RESERVE
    places: dict[str, Place] = field(default_factory=dict)
    claim: Ticket | None = None
    stint_s: float = MEAN_STINT_S
    """How long sessions kept their places of late, while others waited."""
    homed: int = 0
    """Held turns whose live KV is here."""
    regret: float = 0.0
    """Share of the tokens that admitted sessions left here and did not find again."""
    others: Others = NOBODY
    going_round: int = 0
    """Places that did when a due turn last looked for one."""
    _tokens: dict[Lane, int] = field(default_factory=lambda: {"agent": 0, "aside": 0})
    _links: dict[int, list[int]] = field(default_factory=dict)

    @property
    def capacity_tokens(self) -> float:
        capacity_tokens = self.pod.residency.capacity_tokens
        return inf if capacity_tokens is None else capacity_tokens

    @property
    def budget_tokens(self) -> float:
        share = self.reserve
        if share < FREE_SHARE and len(self.waiting) + self.others.held <= 1:
            share = FREE_SHARE
        return share * self.capacity_tokens

    @property
    def room_tokens(self) -> float:
        """Of the budget, what agents' places may still have; less than 0 if they have too much."""
        return self.budget_tokens - self.others.kept_tokens - self._tokens["agent"]

    @property
    def tokens(self) -> int:
        """Tokens of all agents' places."""
        return self._tokens["agent"]

    @property
    def aside_tokens(self) -> int:
        return self._tokens["aside"]

    @property
    def horizon_s(self) -> float:
        low_s, high_s = HORIZON_RANGE_S
        return min(max(self.budget_tokens / self.pod.rate.tokens_per_s, low_s), high_s)

    def put(self, place: Place) -> None:
        self.places[place.sid] = place
        self._tokens[place.ask.lane] += place.own_tokens
        for link, tokens in place.links:
            entry = self._links.get(link)
            if entry is None:
                self._links[link] = [1, tokens]
                self._tokens["agent"] += tokens
            else:
                entry[0] += 1

    def take(self, place: Place) -> None:
        """Undo `put`."""
        del self.places[place.sid]
        self._tokens[place.ask.lane] -= place.own_tokens
        for link, _ in place.links:
            entry = self._links[link]
            entry[0] -= 1
            if not entry[0]:
                del self._links[link]
                self._tokens["agent"] -= entry[1]

    def resize(self, place: Place, tokens: int) -> None:
        own_tokens = max(0, tokens - place.shared_tokens)
        self._tokens[place.ask.lane] += own_tokens - place.own_tokens
        place.own_tokens = own_tokens

    def freed_tokens(self, place: Place) -> int:
        """Tokens by which the sum falls without this place alone."""
        unshared = sum(tokens for link, tokens in place.links if self._links[link][0] == 1)
        return place.own_tokens + unshared

    def additional_tokens(self, ask: Ask) -> int:
        """Tokens by which a place for this turn would raise the sum."""
        arrival = ask.arrival
        tokens = ask.tokens
        if arrival.steps and self._links:
            for link, added_tokens in arrival.steps:
                if link in self._links:
                    tokens -= added_tokens
        place = self.places.get(arrival.sid)
        if place is not None:
            tokens -= place.own_tokens
        return max(0, tokens)

    def fits(self, ask: Ask) -> bool:
        """Whether the turn may have a place now. An agent's first place on an empty pod always
        fits, so that a turn larger than the budget runs alone; asides have a share of their own
        and may use what agents leave."""
        if ask.lane == "agent":
            room_tokens = self.room_tokens
            if ask.tokens <= room_tokens:
                return True  # it adds no more than that
            alone = not self.places and not self.others.placed_tokens
            return alone or self.additional_tokens(ask) <= room_tokens
        aside_tokens = (
            self._tokens["aside"] + self.others.aside_tokens + self.additional_tokens(ask)
        )
        return (
            not self._tokens["aside"]
            or aside_tokens <= ASIDE_SHARE * self.capacity_tokens
            or aside_tokens <= self.room_tokens
        )

    def wait_s(self, ahead: float) -> float:
        """How long a turn waits for a place behind ``ahead`` others, first come first served: the
        pod's places turn over once in a stint."""
        return self.stint_s * (1 + ahead) / max(1, len(self.places))


class Admission:
    """The books of all pods and the turns held. All methods take ``now``, seconds of one clock.

    ``released`` is called with each held turn that gets its place; ``ticket.decision`` says where.
    ``arrive`` costs O(pods + places of a pod), every other event O(places of a pod) and O(log held)
    for each turn it releases; ``tick`` does so for each pod.
    """

    def __init__(
        self,
        released: Callable[[Ticket], None],
        mode: Mode = "enforce",
        policy: Policy = "expected_ttft",
        max_held: int = 10_000,
        age_bound_s: float | None = None,
    ) -> None:
        self.mode = mode
        self.policy: Policy = policy
        self.max_held = max_held
        self.age_bound_s = AGE_BOUND_S if age_bound_s is None else age_bound_s
        self.books: dict[str, Book] = {}
        self.saved_tokens = 0
        """``observe``: tokens lost to eviction that enforcing would have kept."""
        self.lent: dict[str, Lent] = {}
        """Places that other replicas keep, by session: a session brings its place along."""
        self._released = released
        self._places: dict[str, tuple[Book, Place]] = {}
        self._queues: dict[Lane, HoldQueue[Ticket]] = {
            "agent": HoldQueue(),
            "aside": HoldQueue(),
        }
        self._shares = Shares()
        self.promise_s = self.age_bound_s
        """A turn is due once it was held for so long."""
        self._agents = 0
        """Agents' places."""
        self._newcomers = 0.0
        """Sessions that began while they competed, of which none was spared yet."""
        self._spared = 0
        """Turns held that are."""
        self._not_due: deque[Ticket] = deque()
        """Agents' turns held, by age, until they are due."""
        self._numbers = count()
        self._adapted_at = -inf
        self._arriving: Ticket | None = None

    @property
    def held(self) -> Iterator[Ticket]:
        """Turns held."""
        return chain.from_iterable(self._queues.values())

    @property
    def held_count(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def _competing(self) -> int:
        """Sessions of agents that have a place or wait for one."""
        return self._agents + len(self._queues["agent"])

    def place_of(self, sid: str) -> tuple[Pod, Place] | None:
        found = self._places.get(sid)
        return None if found is None else (found[0].pod, found[1])

    def due_at(self, ticket: Ticket) -> float:
        """When a held turn is due, as things stand."""
        return ticket.due_from + self.promise_s

    def why_held(self, ticket: Ticket) -> HoldReason:
        """Why a held turn waits: for room, behind one that is due, or for a pod to come back."""
        book = self.books.get(ticket.decision.pod.name)
        if book is None:
            return "no_pod"
        return "no_room" if book.claim in (None, ticket) else "after_a_due_turn"

    # -- a turn ----------------------------------------------------------------------------------

    def arrive(self, ask: Ask, pods: Sequence[Pod], now: float) -> Ticket:
        """Place a turn on one of ``pods`` (not empty, all able to serve it), or hold it.

        Raises:
            QueueFull: it would have to be held, and ``max_held`` turns are.
        """
        number = next(self._numbers)
        arrived_at = now if ask.arrived_at is None else ask.arrived_at
        if self.mode == "off":
            decision = choose(pods, ask.arrival, self.policy, number)
            return Ticket(ask, decision, arrived_at, number)
        self.take_in(pods, now)
        enforced = self.mode == "enforce"
        decision = choose(
            pods,
            ask.arrival,
            self.policy,
            number,
            partial(self._wait_s, ask) if enforced else None,
        )
        ticket = Ticket(ask, decision, arrived_at, number)
        if ask.lane == "agent" and now - ask.began_at < NEW_S and not ask.arrival.resumed:
            self._newcomers = min(self._newcomers, self._competing) + 1
        book = self.books[decision.pod.name]
        found = self._places.get(ask.arrival.sid)
        ticket.kept = found is not None and found[0] is book
        if self._fits(book, ask) or (ticket.kept and book.places[ask.arrival.sid].running):
            self._admit(ticket, book, now)
        else:
            self._hold(ticket, book, pods, now)
        return ticket

    def _wait_s(self, ask: Ask, pod: Pod) -> float:
        book = self.books[pod.name]
        if self._fits(book, ask):
            return 0.0
        live = pod.residency.tokens(ask.arrival.sid) if ask.arrival.home else 0
        ahead = book.homed + (0 if live else len(self._queues[ask.lane]) / len(self.books))
        return book.wait_s(ahead)

    def _fits(self, book: Book, ask: Ask) -> bool:
        if ask.lane == "agent":
            sid = ask.arrival.sid
            if sid in book.places:
                return True  # it has its place; growth is not held
            if self.lent and (lent := self.lent.get(sid)) is not None and lent.pod == book.pod.name:
                return True
            if book.claim is not None:
                return False
        return book.fits(ask)

    def _hold(self, ticket: Ticket, book: Book, pods: Sequence[Pod], now: float) -> None:
        if self.held_count >= self.max_held and self.mode == "enforce":
            raise QueueFull
        ask = ticket.ask
        ahead = len(self._queues[ask.lane]) / len(pods)
        ticket.expected_wait_s = book.wait_s(ahead)
        ticket.due_from = ticket.arrived_at
        ticket.held = True
        if ask.spared:
            self._spare(ticket)
        if self.mode == "observe" or self.policy != "expected_ttft":
            ticket.only = book.pod.name
        ticket.shared_tokens = ticket.decision.common_tokens
        self._shares.waits(ask.share)
        ticket.home = self._live_home(ask)
        if ticket.home is not None:
            ticket.home.homed += 1
        self._enqueue(ticket, book)
        if ask.lane == "agent" and now - ticket.arrived_at < FIRST_TRY_S:
            self._not_due.append(ticket)
            if len(self._not_due) > 2 * len(self._queues["agent"]) + 64:
                self._not_due = deque(t for t in self._not_due if t in self._queues["agent"])
        if ask.lane == "agent" and book.claim is None:
            dispensable = self._dispensable(book, now)
            if dispensable and self._make_room(book, ask, dispensable, now):
                self._arriving = ticket
                self._release(ticket, book, now)
                self._arriving = None

    def _live_home(self, ask: Ask) -> Book | None:
        """Where the session's KV is believed to be."""
        home = self.books.get(ask.arrival.home) if ask.arrival.home is not None else None
        if home is None or not home.pod.ready or not home.pod.residency.tokens(ask.arrival.sid):
            return None
        return home

    def _enqueue(self, ticket: Ticket, book: Book) -> None:
        """Let the turn stand in its lane's queue; ``book`` is the pod it was offered."""
        ask = ticket.ask

        def standing(tokens: int, of: Book) -> float:
            additional_s = tokens / of.pod.rate.tokens_per_s
            return standing_s(additional_s, ticket.arrived_at, ask.person_waits)

        home = book if ticket.only is not None else ticket.home
        home_s = 0.0
        ticket.missing_tokens = away_tokens = max(
            0, ask.arrival.prompt_tokens - ticket.shared_tokens
        )
        if home is not None:
            ticket.missing_tokens = self._missing_tokens(ticket, home.pod)
            home_s = standing(ticket.missing_tokens, home)
        self._queues[ask.lane].add(
            ticket,
            ask.share,
            home.pod.name if home is not None else None,
            home_s,
            None if ticket.only is not None else standing(away_tokens, book),
            ask.tokens - ticket.shared_tokens,
        )

    def _unhold(self, ticket: Ticket, now: float) -> None:
        self._queues[ticket.ask.lane].remove(ticket)
        self._spared -= ticket.spared
        self._shares.waits_no_more(ticket.ask.share)
        ticket.held = False
        ticket.held_s = now - ticket.arrived_at
        if ticket.home is not None:
            ticket.home.homed -= 1
            ticket.home = None
        self._unclaim(ticket)

    def _unclaim(self, ticket: Ticket) -> None:
        if ticket.claim is not None:
            book = self.books.get(ticket.claim)
            if book is not None and book.claim is ticket:
                book.claim = None
            ticket.claim = None

    def _admit(self, ticket: Ticket, book: Book, now: float) -> None:
        ask = ticket.ask
        sid = ask.arrival.sid
        found = self._places.get(sid)
        if found is not None and (found[0] is not book or ask.lane != found[1].ask.lane):
            self._drop(found[1], now)
            found = None
        lent = self.lent.pop(sid, None)
        if lent is not None and (held_for := self.books.get(lent.pod)) is not None:
            held_for.others = held_for.others.without(lent.tokens)
        if found is None:
            links = ask.arrival.steps if ask.lane == "agent" else ()
            place = Place(sid, ask, now, links, charged_at=now)
            book.put(place)
            self._places[sid] = (book, place)
            self._agents += ask.lane == "agent"
        else:
            place = found[1]
            place.ask = ask
            book.resize(place, max(place.tokens, ask.tokens) if place.running else ask.tokens)
        place.running += 1
        ticket.place = place

    def end(self, ticket: Ticket, now: float, ended: Ended | None = None) -> None:
        """A turn is over, in whatever way; ``ended`` is None if it was not answered. Idempotent."""
        if not ticket.open:
            return
        ticket.open = False
        if self.mode == "off":
            return
        if ticket in self._queues[ticket.ask.lane]:
            claimed = self.books.get(ticket.claim or "")
            self._unhold(ticket, now)
            if claimed is not None:
                self._fill(claimed, now)
        place = ticket.place
        if place is None:
            return
        place.running -= 1
        found = self._places.get(place.sid)
        if found is None or found[1] is not place:
            return  # its place was lost meanwhile
        book = found[0]
        self._charge(book, place, now)
        if ended is not None:
            self._regret(book, ticket, ended)
            book.resize(place, ended.prompt_tokens + ended.output_tokens)
        if not place.running:
            place.idles(
                now,
                ended.idle_kind if ended is not None else None,
                ended.forecast if ended is not None else None,
            )
            over = ended is not None and ended.idle_kind == "ended"
            if over or place.ask.lane == "aside":
                self._drop(place, now)
        if self.held_count:
            self._shed(book, now)
        self._fill(book, now)

    def _regret(self, book: Book, ticket: Ticket, ended: Ended) -> None:
        expected_tokens = min(ticket.ask.arrival.same_tokens, ended.prompt_tokens)
        if not ticket.kept or ended.cached_tokens is None or expected_tokens <= 0:
            return
        lost = max(0.0, 1 - ended.cached_tokens / expected_tokens)
        book.regret = REGRET_KEEP * book.regret + (1 - REGRET_KEEP) * lost
        if self.mode == "observe" and lost > 0.02:
            self.saved_tokens += expected_tokens - ended.cached_tokens

    # -- sessions, pods, time --------------------------------------------------------------------

    def forget(self, sid: str, now: float) -> None:
        """The session is over: its place is free. A turn of it that still runs goes on."""
        found = self._places.get(sid)
        if found is not None:
            self._drop(found[1], now)
            self._fill(found[0], now)

    def pod_lost(self, name: str, now: float) -> None:
        """The pod is gone: its places are void, and held turns look elsewhere."""
        book = self.books.pop(name, None)
        if book is None:
            return
        for place in book.places.values():
            del self._places[place.sid]
            self._agents -= place.ask.lane == "agent"
        for queue in self._queues.values():
            queue.drop_home(name)
        for ticket in self.held:
            if ticket.claim == name:
                ticket.claim = None
            if ticket.home is book:
                ticket.home = None
            if ticket.only == name:
                ticket.only = None
                self._enqueue(ticket, book)
        self.pods_changed(now)

    def pod_restarted(self, name: str, now: float) -> None:
        """The pod's cache is empty: idle sessions have nothing there to wait for."""
        book = self.books.get(name)
        if book is not None:
            for place in list(book.places.values()):
                if not place.running:
                    self._drop(place, now)
            self._fill(book, now)

    def pods_changed(self, now: float) -> None:
        """Pods were added, became ready or changed their capacity."""
        for book in list(self.books.values()):
            self._fill(book, now)

    def take_in(self, pods: Iterable[Pod], now: float) -> None:
        """Let held turns be released to pods that no turn has been offered yet."""
        for pod in pods:
            book = self.books.get(pod.name)
            if book is None or book.pod is not pod:
                self.pod_lost(pod.name, now)
                self.books[pod.name] = Book(pod, self._queues["agent"])

    def tick(self, now: float) -> None:
        """Time has passed: adapt the reserves, let places lapse, release what fits."""
        if self.mode == "off":
            return
        since_s = now - self._adapted_at
        if since_s >= 1.0:
            self._adapted_at = now
            self._promise(since_s)
            for book in self.books.values():
                self._adapt(book)
        if self.held_count:
            for book in list(self.books.values()):
                self._fill(book, now)

    def _adapt(self, book: Book) -> None:
        low, high = RESERVE_RANGE
        if book.regret > REGRET_HIGH:
            book.reserve = max(low, book.reserve - RESERVE_DOWN)
        elif self.held_count and book.regret < REGRET_LOW:
            book.reserve = min(high, book.reserve + RESERVE_UP * (1 + (book.pod.in_flight == 0)))

    # -- places and holds ------------------------------------------------------------------------

    def _drop(self, place: Place, now: float) -> None:
        book, _ = self._places.pop(place.sid)
        self._agents -= place.ask.lane == "agent"
        self._charge(book, place, now)
        if self.held_count and place.ask.lane == "agent":
            book.stint_s += STINT_SHARE * (now - place.since - book.stint_s)
        book.take(place)

    def _charge(self, book: Book, place: Place, now: float) -> None:
        share = place.tokens / book.budget_tokens if book.budget_tokens < inf else 0.0
        self._shares.charge(place.ask.share, share * (now - place.charged_at), place.ask.weight)
        place.charged_at = now

    def _fill(self, book: Book, now: float) -> None:
        """Give places on the pod to held turns, the first in order first, while they fit."""
        if not book.pod.ready or book.pod.draining:
            return
        asides, agents = self._queues["aside"], self._queues["agent"]
        if asides:
            for ticket in chain(
                asides.due(now - self.promise_s), asides.next(book.pod.name, {}, now)
            ):
                if not self._may_go(ticket, book, now):
                    continue
                if not self._fits(book, ticket.ask):
                    break
                self._release(ticket, book, now)
        if not agents:
            return
        dispensable = self._dispensable(book, now)
        for_due: list[Place] | None = None
        self._spare_some(book, now)
        if book.claim is not None and now < self.due_at(book.claim):
            self._unclaim(book.claim)  # the promise has grown meanwhile
        for ticket in agents.due(now - self.promise_s):
            if not self._may_go(ticket, book, now):
                continue
            if for_due is None:  # each place once, where it comes first
                for_due = list(dict.fromkeys(dispensable + self._going_round(book, now)))
            if self._make_room(book, ticket.ask, for_due, now):
                self._release(ticket, book, now)
                continue
            if ticket.claim is None and book.claim is None:
                ticket.claim = book.pod.name
                book.claim = ticket
            if book.claim is ticket:
                return
        if book.claim is not None:
            return
        most_tokens = self._most_tokens(book, dispensable)
        if agents.least_tokens > most_tokens:
            return
        looked_at = 0
        for ticket in agents.next(book.pod.name, self._shares.debts(), now):
            if looked_at >= LOOK_AHEAD:
                break
            looked_at += 1
            if not self._may_go(ticket, book, now):
                continue
            if book.additional_tokens(ticket.ask) > most_tokens:
                continue
            if self._make_room(book, ticket.ask, dispensable, now):
                self._release(ticket, book, now)
                most_tokens = self._most_tokens(book, dispensable)
                if agents.least_tokens > most_tokens:
                    return
                looked_at = 0

    @staticmethod
    def _most_tokens(book: Book, dispensable: list[Place]) -> float:
        """The largest turn that could have room now, idle places given up for it."""
        if not book.places:
            return inf
        spare_tokens = sum(
            book.freed_tokens(place) for place in dispensable if book.places.get(place.sid) is place
        )
        return max(0.0, book.room_tokens + spare_tokens)

    def _shed(self, book: Book, now: float) -> None:
        """Give up the idle places least worth keeping while those of the pod exceed its cache."""
        excess_tokens = book.tokens - SHED * book.capacity_tokens
        if excess_tokens <= 0:
            return
        idle = [
            (place.reuse_rate(now), place.sid, place)
            for place in book.places.values()
            if not place.running and place.ask.lane == "agent"
        ]
        for _, _, place in sorted(idle):
            if excess_tokens <= 0:
                break
            excess_tokens -= book.freed_tokens(place)
            self._drop(place, now)

    def _missing_tokens(self, ticket: Ticket, pod: Pod) -> int:
        arrival = ticket.ask.arrival
        own_tokens = min(pod.residency.tokens(arrival.sid), arrival.same_tokens)
        return max(0, arrival.prompt_tokens - max(own_tokens, ticket.shared_tokens))

    def _may_go(self, ticket: Ticket, book: Book, now: float) -> bool:
        """Whether the turn may be released to this pod. Live KV elsewhere moves only if computing
        it here ends sooner than waiting there."""
        pod = book.pod
        if ticket.only is not None:
            return ticket.only == pod.name
        ask = ticket.ask
        if pod.models and ask.model not in pod.models:
            return False
        home = ticket.home
        if home is None or not home.pod.ready:
            return True
        there_tokens = self._missing_tokens(ticket, home.pod)
        if there_tokens > ticket.missing_tokens + STALE_TOKENS:
            self._enqueue(ticket, book)  # its KV has gone meanwhile: it stands elsewhere now
        if home is book:
            return True
        missing_tokens = self._missing_tokens(ticket, pod)
        if there_tokens >= missing_tokens:
            return True
        there_s = there_tokens / home.pod.rate.tokens_per_s + home.wait_s(home.homed - 1)
        return missing_tokens / pod.rate.tokens_per_s < there_s

    def _promise(self, since_s: float) -> None:
        """A turn's fair share of waiting grows with those that wait, as it does on a pod that
        computes each of them anew for every turn; ``since_s`` have passed."""
        books = [book for book in self.books.values() if book.pod.ready]
        if not books:
            return
        waiting = len(self._queues["agent"]) + max(book.others.held for book in books)
        promise_s = FAIR_S * waiting / len(books) + self.age_bound_s
        rise_s = promise_s - self.promise_s
        if rise_s > 0:
            self.promise_s += min(rise_s, FAIR_RISES * since_s)
        else:
            self.promise_s += rise_s * min(1.0, since_s / FAIR_FALLS_S)

    def _stint_s(self) -> float:
        """How long a session keeps a place that goes round while a due turn waits for one: so that
        these places go round once within the promise."""
        waiting = len(self._queues["agent"]) - self._spared
        going_round = sum(book.going_round for book in self.books.values())
        low_s, high_s = STINT_RANGE_S
        return min(max(self.promise_s * max(1, going_round) / max(1, waiting), low_s), high_s)

    def _spare_some(self, book: Book, now: float) -> None:
        """Of the turns that are due from now on, let those wait on that are among the largest
        held, as many as may be."""
        agents = self._queues["agent"]
        due = []
        while self._not_due and self.due_at(self._not_due[0]) <= now:
            ticket = self._not_due.popleft()
            if ticket in agents:
                due.append(ticket)
        may_wait = int(self._newcomers / SPARED_OF)
        if not due or not may_wait or len(agents) < SPARED_OF:
            return
        waiting = (ticket.missing_tokens for ticket in agents if not ticket.spared)
        least_tokens = heapq.nlargest(may_wait, waiting)[-1]
        for ticket in heapq.nlargest(may_wait, due, key=lambda ticket: ticket.missing_tokens):
            if ticket.missing_tokens >= least_tokens:
                self._newcomers -= SPARED_OF
                self._spare(ticket)
                self._unclaim(ticket)
                self._enqueue(ticket, self.books[ticket.only] if ticket.only else book)

    def _spare(self, ticket: Ticket) -> None:
        self._spared += 1
        ticket.spared = True
        ticket.due_from += SPARED_S

    def _dispensable(self, book: Book, now: float) -> list[Place]:
        """Idle places not worth keeping while turns are held, the least worth first."""
        least = 1 / book.horizon_s
        idle = (place for place in book.places.values() if not place.running)
        return sorted(
            (place for place in idle if place.reuse_rate(now) < least),
            key=lambda place: (place.reuse_rate(now), -place.ask.began_at, place.sid),
        )

    def _going_round(self, book: Book, now: float) -> list[Place]:
        """Idle places that give way to a due turn: their stint is over, and they are not among the
        largest, unless the turn is late. The youngest session's first, so that the eldest come to
        their end."""
        agents = (place for place in book.places.values() if place.ask.lane == "agent")
        by_size = sorted(agents, key=lambda place: (-place.tokens, place.sid))
        keeping = 0
        if book.claim is None or now < self.due_at(book.claim) + self.promise_s:
            room_tokens = (1 - ROUND_SHARE) * book.budget_tokens
            for place in by_size[:-1]:
                room_tokens -= place.tokens
                if room_tokens < 0:
                    break
                keeping += 1
        book.going_round = len(by_size) - keeping
        stint_s = self._stint_s()
        over = (
            place
            for place in by_size[keeping:]
            if not place.running and now - place.since >= stint_s
        )
        return sorted(over, key=lambda place: (-place.ask.began_at, place.sid))

    def _make_room(self, book: Book, ask: Ask, idle: list[Place], now: float) -> bool:
        """Make the turn fit by giving up idle places in their order; none is given up in vain."""
        if book.fits(ask):
            return True
        if ask.lane == "aside":
            return False
        needed = book.additional_tokens(ask) - book.room_tokens
        victims = []
        for place in idle:
            if needed <= 0:
                break
            if book.places.get(place.sid) is not place:
                continue
            victims.append(place)
            needed -= book.freed_tokens(place)
        if needed > 0 and len(victims) < len(book.places):
            return False
        for place in victims:
            self._drop(place, now)
        return book.fits(ask)

    def _release(self, ticket: Ticket, book: Book, now: float) -> None:
        arrival = ticket.ask.arrival
        reason: Reason = "home" if book.pod.name == arrival.home else "admitted"
        self._unhold(ticket, now)
        self._admit(ticket, book, now)
        if self.mode == "enforce":
            ticket.decision = settled(book.pod, arrival, self.policy, reason)
            if ticket is not self._arriving:
                self._released(ticket)
