"""One pod: an engine with its own KV cache, as the gateway sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gateway.fleet.probe import ProbeResult
from gateway.fleet.residency import Residency

DEFAULT_PREFILL_TOKENS_PER_S = 8_000.0
"""Prefill rate assumed before the first turn: between a laptop and a data-centre GPU."""


@dataclass(slots=True)
class PrefillRate:
    """Tokens a second that a pod prefills, from what it served.

    The ratio of exponentially forgotten sums of tokens and seconds, so that long prompts, which
    measure the rate well, count for more than short ones, which measure fixed costs.
    """

    tokens: float = DEFAULT_PREFILL_TOKENS_PER_S / 4
    seconds: float = 0.25
    keep: float = 0.9

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def learn(self, tokens: int, seconds: float) -> None:
        """A request whose first token came after ``seconds``, with ``tokens`` to prefill before it
        (its own uncached ones and those queued ahead)."""
        if tokens > 0 and seconds > 0:
            self.tokens = self.keep * self.tokens + tokens
            self.seconds = self.keep * self.seconds + seconds


@dataclass(slots=True, eq=False)
class Prefill:
    """Prefill work that a turn has queued on a pod and that is not done yet."""

    tokens: int


@dataclass(slots=True, eq=False)
class Pod:
    """State of one pod. Written by the prober (health, models, load) and by the turns it serves."""

    name: str
    url: str
    api_key: str | None = None
    rank: int | None = None
    """Data-parallel rank behind the address, where several engines share it."""
    kv_events: tuple[str, str | None] | None = None
    """Where it publishes what is in its KV cache, and where it replays that."""
    ready: bool = False
    draining: bool = False
    """It gets no new turns, and leaves the fleet when its last one has ended."""
    withheld: bool = False
    """Discovery deems it unfit for new turns, whatever the probes say."""
    models: dict[str, int | None] = field(default_factory=dict)
    """Served models and their ``max_model_len`` in tokens."""
    probed: ProbeResult | None = None
    """The latest good probe."""
    failures: int = 0
    """Probes that failed since the latest good one."""
    trouble: str | None = None
    """Why it is not ready, once enough probes have failed."""
    in_flight: int = 0
    queued_prefill_tokens: int = 0
    elsewhere_in_flight: int = 0
    elsewhere_queued_tokens: float = 0.0
    """The same of other replicas of the gateway, as far as they have told."""
    elsewhere_at: float = 0.0
    """As of when."""
    rate: PrefillRate = field(default_factory=PrefillRate)
    residency: Residency = field(default_factory=Residency)

    @property
    def takes_turns(self) -> bool:
        """Whether new turns may go there."""
        return self.ready and not self.draining and not self.withheld

    @property
    def takes_session_id(self) -> bool:
        """Whether the engine sees ``X-Session-ID``."""
        return self.probed is not None and self.probed.capabilities.session_id

    @property
    def takes_hints(self) -> bool:
        """Whether the engine acts on hints, and sees the session ids that they name."""
        return (
            self.takes_session_id
            and self.probed is not None
            and (self.probed.capabilities.kv_hints)
        )

    def heard(self, in_flight: int, queued_tokens: float, now: float) -> None:
        """Other replicas have told what they have here."""
        self.elsewhere_in_flight = in_flight
        self.elsewhere_queued_tokens = queued_tokens
        self.elsewhere_at = now

    def pass_time(self, now: float) -> None:
        """What others had queued when they told of it is being prefilled meanwhile."""
        if self.elsewhere_queued_tokens:
            done = max(0.0, now - self.elsewhere_at) * self.rate.tokens_per_s
            self.elsewhere_queued_tokens = max(0.0, self.elsewhere_queued_tokens - done)
            self.elsewhere_at = now

    @contextmanager
    def serving(self, uncached_tokens: int) -> Iterator[Prefill]:
        """Count a turn in, with its prefill work; on every exit count it out."""
        prefill = Prefill(uncached_tokens)
        self.in_flight += 1
        self.queued_prefill_tokens += uncached_tokens
        try:
            yield prefill
        finally:
            self.in_flight -= 1
            self.prefilled(prefill)

    def prefilled(self, prefill: Prefill) -> None:
        """The turn's first token has come: its prefill is no longer queued."""
        self.queued_prefill_tokens -= prefill.tokens
        prefill.tokens = 0
