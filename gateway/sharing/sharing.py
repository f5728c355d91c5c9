"""One of several replicas of the gateway: what it tells the others, what it takes from them.

Told a moment after it happened, many things at once, never in a turn's way: sessions as their turns
end, the pods' caches with them, what each replica has admitted and would admit, what was learned of
gaps. The one thing a turn waits for, and no longer than `sharing.read_timeout_s`, is what the store
knows of its session where this replica knows nothing.

A replica that is not heard of for `LAPSE_S` holds nothing any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from secrets import token_hex
from typing import Final, Never

from gateway.admission import NOBODY, Admission, Ended, Lent, Others, Ticket
from gateway.closed_loop import ClosedLoop
from gateway.config import SharingSettings
from gateway.dialects.turn import TurnRequest
from gateway.fleet.fleet import Fleet
from gateway.identity import Headers
from gateway.metrics import Metrics
from gateway.sessions import SessionStore, Turn, Unknown, marks_of, sid_of
from gateway.sharing import news, records
from gateway.sharing.learned import Learned
from gateway.sharing.news import Left, News, PlaceTaken, Share
from gateway.sharing.shares import kept_for_others
from gateway.sharing.store import AwayError, LateError, Store, stop, together

logger = logging.getLogger("gateway.sharing")

GATHER_S: Final = 0.02
"""News waits so long for more."""
BEAT_S: Final = 0.25
"""So often replicas tell what they hold."""
WHOLE_EVERY: Final = 40
"""Of these messages, one in so many tells of all places."""
LAPSE_S: Final = 3.0
MARK_TTL_S: Final = 6 * 3600
MAX_RECORDS: Final = 200
"""Sessions written at once."""
MAX_REPLICAS: Final = 256
FAREWELL_S: Final = 1.0


@dataclass(slots=True)
class Replica:
    """Another replica, as last heard of."""

    heard_at: float
    shares: dict[str, Share] = field(default_factory=dict)
    held: int = 0


class Sharing:
    """The shared part of one gateway. `recall`, `began` and `ended` are for turns; the rest is
    done while `running` is entered."""

    def __init__(
        self,
        settings: SharingSettings,
        fleet: Fleet,
        sessions: SessionStore,
        loop: ClosedLoop,
        metrics: Metrics,
    ) -> None:
        assert settings.redis_url is not None
        self.settings = settings
        self.fleet = fleet
        self.sessions = sessions
        self.loop = loop
        self.metrics = metrics
        self.replica = token_hex(8)
        self.store = Store(
            settings.redis_url.get_secret_value(), settings.prefix, self._survive_news
        )
        self.learned = Learned(self.store, self.replica, loop.foresight, metrics)
        self.replicas: dict[str, Replica] = {}
        self._unwritten: OrderedDict[str, None] = OrderedDict()
        """Sessions whose records are to be written."""
        self._began: list[tuple[str, float]] = []
        self._left: list[Left] = []
        self._any = asyncio.Event()
        self._leaving = False
        self._told_places: dict[str, PlaceTaken] = {}
        self._beats = 0
        self._beat_at = -inf
        self._up_before = -inf

    @property
    def admission(self) -> Admission:
        return self.loop.admission

    # -- in a turn's way -------------------------------------------------------------------------

    async def recall(
        self, headers: Headers, request: TurnRequest, tenant: str, scope: int
    ) -> str | None:
        """Take in what the store knows of a session of which nothing (recent) is known here; its
        key if it was found. At most ``read_timeout_s``, none while the store is away. Raises
        nothing but cancellation."""
        if not self.store.answers:
            return None
        key, result = None, "failed"
        try:
            unknown = self.sessions.look_up(headers, request, scope, self.store.up_since)
            if unknown is None:
                return None
            record = await self._read(unknown)
            result = "miss" if record is None else "hit"
            if record is not None:
                key = self._take_in(unknown, record, tenant)
        except LateError:
            result = "late"
        except AwayError:
            result = "failed"
        except records.RecordError as error:
            logger.warning("a session's record in the shared store is not used: %s", error)
        except Exception:
            self.metrics.degraded.labels("sharing").inc()
            logger.exception("a session could not be taken in; the turn goes on without")
        self.metrics.store_reads[result,].inc()
        return key

    async def _read(self, unknown: Unknown) -> records.SessionRecord | None:
        deadline = time.monotonic() + self.settings.read_timeout_s
        if unknown.key is not None:
            sid = sid_of(unknown.key)
        else:
            marks = [f"m:{records.digest(mark).hex()}" for mark in unknown.marks]
            found = await self.store.get(marks, self.settings.read_timeout_s)
            first = next((value for value in found if value), b"")
            sid = first[:64].decode("ascii", errors="replace")
            if not sid:
                return None
        (data,) = await self.store.get([f"s:{sid}"], max(0.001, deadline - time.monotonic()))
        return records.unpack(data) if data else None

    def _take_in(self, unknown: Unknown, record: records.SessionRecord, tenant: str) -> str | None:
        now, wall = time.monotonic(), time.time()
        key = unknown.key if unknown.key is not None else record.key
        if not key.startswith(f"{unknown.scope:x}:"):
            return None  # a session of somebody else's, or one that requests name
        sid = sid_of(key)
        known = self.sessions.by_sid(sid)
        if known is None:
            session = records.restore(record, key, sid, tenant, unknown.scope, now, wall)
            self.sessions.take_in(session)
        else:
            session = known
            known.heard_at = now
            if record.turns > known.turns and not known.in_flight:
                records.renew(known, record, now, wall)
        session.marks = record.marks
        pod = self.fleet.pods.get(record.pod or "")
        if pod is not None and record.usage is not None:
            prompt_tokens, output_tokens, _ = record.usage
            if not pod.residency.tokens(sid):
                pod.residency.touch(sid, prompt_tokens + output_tokens, [])
            self.loop.conductor.served_elsewhere(sid, pod, prompt_tokens)
        return key

    def began(self, turn: Turn) -> None:
        """A turn has begun: those who served the session before are told."""
        if turn.came_over or turn.resumed:
            self._began.append((turn.session.sid, time.monotonic()))
            self._any.set()

    def ended(self, turn: Turn, ticket: Ticket, ended: Ended) -> None:
        """A turn was answered."""
        session = turn.session
        self._unwritten[session.sid] = None
        self._unwritten.move_to_end(session.sid)
        self._left.append(
            Left(
                sid=session.sid,
                pod=ticket.decision.pod.name,
                prompt_tokens=ended.prompt_tokens,
                output_tokens=ended.output_tokens,
                heads=tuple(ticket.ask.arrival.heads),
                idle_kind=session.idle_kind,
                turns=session.turns,
            )
        )
        self._any.set()

    # -- telling ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Share while entered; on leaving, say farewell."""
        task = asyncio.create_task(self._run(), name="sharing")
        try:
            yield
        finally:
            self._leaving = True
            with suppress(Exception):
                async with asyncio.timeout(FAREWELL_S):
                    await self._tell(leaves=True)
                    await self.learned.tell()
            await stop(task)

    async def _run(self) -> Never:
        while True:
            with self._survived():
                await together(self.store.run(), self.learned.run(), self._tell_on())
            await asyncio.sleep(1.0)

    async def _tell_on(self) -> Never:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._any.wait()
            await asyncio.sleep(GATHER_S)
            if not self._leaving:
                with self._survived():
                    await self._tell()

    async def _tell(self, leaves: bool = False) -> None:
        now = time.monotonic()
        self._lapse(now)
        self._any.clear()
        if not self.store.up:
            self._drop_news()
            return
        beat = leaves or now - self._beat_at >= BEAT_S or self.store.up_since != self._up_before
        sids = list(islice(self._unwritten, MAX_RECORDS))
        if not (beat or sids or self._began or self._left):
            return
        began, self._began = self._began, []
        left, self._left = self._left, []
        said = News(
            version=news.VERSION,
            replica=self.replica,
            began=tuple((sid, now - at) for sid, at in began),
            left=tuple(left),
            leaves=leaves,
        )
        if beat:
            said = self._with_shares(said, now)
        values, gone = self._records(sids)
        for sid in sids:
            del self._unwritten[sid]
        try:
            await self.store.write(values, gone, news.pack(said))
        except AwayError:
            self.metrics.store_writes["failed",].inc()
            self.metrics.store_dropped.inc(len(left))
            self._told_places.clear()
            self._unwritten |= dict.fromkeys(sids)
            return
        self.metrics.store_writes["ok",].inc()
        if self._unwritten:
            self._any.set()

    def _drop_news(self) -> None:
        """Nobody hears: the records will tell."""
        self.metrics.store_dropped.inc(len(self._left))
        self._left.clear()
        self._began.clear()
        self._told_places.clear()

    def _records(self, sids: list[str]) -> tuple[dict[str, tuple[bytes, int]], list[str]]:
        """What is to be written of sessions, and what is to be deleted."""
        wall_minus_now_s = time.time() - time.monotonic()
        ttl_s = max(1, round(self.sessions.ttl_s))
        values: dict[str, tuple[bytes, int]] = {}
        gone: list[str] = []
        for sid in sids:
            session = self.sessions.by_sid(sid)
            if session is None:
                continue
            marks: tuple[bytes, ...] = ()
            if not session.named:
                marks = tuple(records.digest(mark) for mark in marks_of(session))
                for mark in marks:
                    values[f"m:{mark.hex()}"] = sid.encode(), min(ttl_s, MARK_TTL_S)
                gone += (f"m:{mark.hex()}" for mark in session.marks if mark not in marks)
                session.marks = marks
            values[f"s:{sid}"] = records.pack(session, marks, wall_minus_now_s), ttl_s
        return values, gone

    def _with_shares(self, said: News, now: float) -> News:
        whole = self._beats % WHOLE_EVERY == 0 or self.store.up_since != self._up_before
        self._beat_at, self._up_before = now, self.store.up_since
        self._beats += 1
        places = self._idle_places()
        before = {} if whole else self._told_places
        self._told_places = places
        return News(
            version=said.version,
            replica=said.replica,
            began=said.began,
            left=said.left,
            leaves=said.leaves,
            shares=self._own_shares(now),
            held=self.admission.held_count,
            whole=whole,
            placed=tuple(place for sid, place in places.items() if before.get(sid) != place),
            dropped=tuple(sid for sid in before if sid not in places),
        )

    def _idle_places(self) -> dict[str, PlaceTaken]:
        return {
            place.sid: PlaceTaken(place.sid, name, place.tokens)
            for name, book in self.admission.books.items()
            for place in book.places.values()
            if not place.running and place.ask.lane == "agent"
        }

    def _own_shares(self, now: float) -> dict[str, Share]:
        """What this replica has on each pod, and would have."""
        books = self.admission.books
        wanted: dict[str, float] = dict.fromkeys(books, 0.0)
        for ticket in self.admission.held:
            if ticket.ask.lane == "agent":
                home = ticket.home.pod.name if ticket.home is not None else ticket.only
                for name in (home,) if home in wanted else wanted:
                    wanted[name] += ticket.ask.tokens / (1 if home in wanted else len(wanted))
        shares: dict[str, Share] = {}
        for pod in self.fleet:
            book = books.get(pod.name)
            claim = book.claim if book is not None else None
            shares[pod.name] = Share(
                agent_tokens=book.tokens if book is not None else 0,
                aside_tokens=book.aside_tokens if book is not None else 0,
                wanted_tokens=round(wanted.get(pod.name, 0.0)),
                claim_tokens=claim.ask.tokens if claim is not None else 0,
                claim_age_s=max(0.0, now - self.admission.due_at(claim))
                if claim is not None
                else 0.0,
                in_flight=pod.in_flight,
                queued_tokens=pod.queued_prefill_tokens,
            )
        return shares

    # -- hearing ---------------------------------------------------------------------------------

    def _survive_news(self, data: bytes) -> None:
        with self._survived():
            try:
                self._hear(news.unpack(data), time.monotonic())
            except news.NewsError as error:
                logger.warning("a message of another replica is not used: %s", error)

    def _hear(self, said: News, now: float) -> None:
        if said.replica == self.replica:
            return
        if said.leaves:
            self._hear_turns(said, now)
            self._forget(said.replica)
            self._weigh(now)
            return
        replica = self.replicas.get(said.replica)
        if replica is None:
            if len(self.replicas) >= MAX_REPLICAS:
                return
            logger.info("another replica of the gateway is heard of: %s", said.replica)
            replica = self.replicas[said.replica] = Replica(now)
            self._beats = 0  # it is told of all places
        self._hear_turns(said, now)
        self._hear_places(said, now)
        if said.shares is not None:
            replica.heard_at, replica.shares, replica.held = now, said.shares, said.held
            self._weigh(now)

    def _hear_turns(self, said: News, now: float) -> None:
        for sid, age_s in said.began:
            self.loop.taken_over(sid, self.sessions.by_sid(sid), now - max(0.0, age_s), now)
        for left in said.left:
            pod = self.fleet.pods.get(left.pod)
            if pod is not None:
                tokens = left.prompt_tokens + left.output_tokens
                pod.residency.touch(left.sid, tokens, list(left.heads))
                self.loop.conductor.served_elsewhere(left.sid, pod, left.prompt_tokens)
            session = self.sessions.by_sid(left.sid)
            if session is not None and not session.in_flight:
                session.pod, session.turns = left.pod, max(session.turns, left.turns)
                session.idle_kind, session.idle_since = left.idle_kind, now
                session.elsewhere, session.heard_at = True, now
                session.heads_elsewhere = frozenset(link for link, _ in left.heads)

    def _hear_places(self, said: News, now: float) -> None:
        lent = self.admission.lent
        if said.whole:
            self._return(said.replica)
        for sid in said.dropped:
            if sid in lent and lent[sid].replica == said.replica:
                del lent[sid]
        for place in said.placed:
            own = self.admission.place_of(place.sid)
            if own is not None and own[1].running:
                continue
            if own is not None:
                self.admission.forget(place.sid, now)  # it was served there last
            if len(lent) < self.sessions.max_sessions or place.sid in lent:
                lent[place.sid] = Lent(said.replica, place.pod, place.tokens)

    def _return(self, replica: str) -> None:
        lent = self.admission.lent
        for sid in [sid for sid, place in lent.items() if place.replica == replica]:
            del lent[sid]

    def _forget(self, replica: str) -> None:
        self.replicas.pop(replica, None)
        self._return(replica)

    def _lapse(self, now: float) -> None:
        silent = [name for name, r in self.replicas.items() if now - r.heard_at > LAPSE_S]
        for name in silent:
            logger.info("a replica of the gateway is not heard of any more: %s", name)
            self._forget(name)
        if silent:
            self._weigh(now)
        self.metrics.replicas.set(1 + len(self.replicas))
        self.metrics.store_up.labels("redis").set(self.store.answers)

    def _weigh(self, now: float) -> None:
        """Bring into admission and routing what the others have."""
        own_shares = self._own_shares(now)
        held = sum(replica.held for replica in self.replicas.values())
        for pod in self.fleet:
            shares = [
                (name, replica.shares[pod.name])
                for name, replica in self.replicas.items()
                if pod.name in replica.shares
            ]
            rate = pod.rate.tokens_per_s
            pod.heard(
                sum(share.in_flight for _, share in shares),
                sum(
                    max(0.0, share.queued_tokens - rate * (now - self.replicas[name].heard_at))
                    for name, share in shares
                ),
                now,
            )
            book = self.admission.books.get(pod.name)
            if book is None:
                continue
            book.others = NOBODY
            if shares and book.budget_tokens < inf:
                own = own_shares[pod.name]
                book.others = Others(held=held)
                book.others = Others(
                    kept_for_others(book.budget_tokens, self.replica, own, shares),
                    sum(share.agent_tokens for _, share in shares),
                    sum(share.aside_tokens for _, share in shares),
                    held,
                )
        if self.admission.held_count:
            self.admission.pods_changed(now)

    @contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.metrics.degraded.labels("sharing").inc()
            logger.exception("sharing failed; this replica goes on")
