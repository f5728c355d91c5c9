"""Every Prometheus metric of the gateway, in one place; `docs/metrics.md` says what each means.

Labels are bounded: pods and models are the operator's, the rest are fixed words of the code. No
session, key, path or text of a client is ever a label.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any, Generic, TypeVar, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from engine_patch.hints import Status
from gateway.admission import Admission
from gateway.fleet.fleet import Fleet
from gateway.fleet.ledger import Trouble
from gateway.fleet.pod import Pod
from gateway.hold import HoldEnd
from gateway.losses import LOSS_CAUSES
from gateway.prefix import BreakCause
from gateway.relay import Reason
from gateway.sessions import SessionStore

disable_created_metrics()  # type: ignore[no-untyped-call]

LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
STAGES = (
    *("session", "admission", "route", "observe", "forecast", "settle", "history", "inspector"),
    *("forget", "tick", "sharing", "audit", "trace", "record"),
)
"""Where a fault of the clever part is survived."""
RETRY_REASONS = ("status_503", *(r for r in get_args(Reason) if r != "first_byte_timeout"))
"""Who has waited for a pod's first byte in vain is not sent to another."""
LOST_TO = ("queue", "disk", "fault")
HINT_RESULTS = (*get_args(Status), "failed", "dropped")
HOLD_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 90, 120, 180, 240, 300, 600, 1200, 2400)
GAP_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 7200, 28800, 86400)


_M = TypeVar("_M", bound=MetricWrapperBase)


class Family(dict[tuple[str, ...], _M], Generic[_M]):
    """A labelled metric's children by label values. ``family[values]`` is a dictionary's look-up,
    a tenth of what `labels` costs."""

    def __init__(self, metric: _M) -> None:
        super().__init__()
        self.metric = metric

    def __missing__(self, values: tuple[str, ...]) -> _M:
        child = self[values] = self.metric.labels(*values)
        return child


class Metrics:
    """The gateway's metrics over a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        self.turns = Family(
            Counter(
                "cachewise_turns",
                "Turns by how they ended.",
                ("wire", "client", "outcome"),
                registry=registry,
            )
        )
        self.turn_duration = Family(
            Histogram(
                "cachewise_turn_duration_seconds",
                "From a turn's arrival to its last byte.",
                ("wire",),
                buckets=LATENCY_BUCKETS,
                registry=registry,
            )
        )
        self.first_byte = Family(
            Histogram(
                "cachewise_time_to_first_byte_seconds",
                "From a turn's arrival to the first byte of the pod's answer.",
                ("pod",),
                buckets=LATENCY_BUCKETS,
                registry=registry,
            )
        )
        self.overhead = Histogram(
            "cachewise_overhead_seconds",
            "Time from a turn's whole request to its being sent to a pod.",
            buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5),
            registry=registry,
        )
        self.errors = Counter(
            "cachewise_gateway_errors",
            "Errors the gateway itself answered, by HTTP status.",
            ("status",),
            registry=registry,
        )
        self.retries = Counter(
            "cachewise_retries",
            "Turns sent again before their first byte, by reason.",
            ("reason",),
            registry=registry,
        )
        self.degraded = Counter(
            "cachewise_degraded",
            "Faults of the clever part that a turn survived as a plain relay, by stage.",
            ("stage",),
            registry=registry,
        )
        self.prompt_tokens = Family(
            Counter(
                "cachewise_prompt_tokens",
                "Prompt tokens of answered turns, as the pods report them.",
                ("pod",),
                registry=registry,
            )
        )
        self.cached_tokens = Family(
            Counter(
                "cachewise_cached_prompt_tokens",
                "Prompt tokens served from a pod's prefix cache, as the pods report them.",
                ("pod",),
                registry=registry,
            )
        )
        self.output_tokens = Family(
            Counter(
                "cachewise_output_tokens",
                "Generated tokens, as the pods report them.",
                ("pod",),
                registry=registry,
            )
        )
        self.expected_cached_tokens = Family(
            Counter(
                "cachewise_expected_cached_prompt_tokens",
                "Prompt tokens believed resident, of turns whose pod reports cached tokens.",
                ("pod",),
                registry=registry,
            )
        )
        self.identified = Family(
            Counter(
                "cachewise_identified_turns",
                "Turns by how their session was recognised.",
                ("by",),
                registry=registry,
            )
        )
        self.gaps = Family(
            Histogram(
                "cachewise_gap_seconds",
                "Gaps between a session's turns, by what it waited for.",
                ("idle_kind",),
                buckets=GAP_BUCKETS,
                registry=registry,
            )
        )
        self.tool_gaps = Family(
            Histogram(
                "cachewise_tool_gap_seconds",
                "Gaps that were forecast, by the tool waited for; of parallel calls the slowest.",
                ("tool_kind",),
                buckets=GAP_BUCKETS,
                registry=registry,
            )
        )
        self.tool_calls = Family(
            Counter(
                "cachewise_tool_calls",
                "Tool calls seen in answers.",
                ("client",),
                registry=registry,
            )
        )
        self.forecasts = Family(
            Counter(
                "cachewise_forecast_gaps",
                "Gaps that ended and had been forecast.",
                ("tool_kind",),
                registry=registry,
            )
        )
        self.forecasts_below = Family(
            Counter(
                "cachewise_forecast_gaps_below",
                "Of these, gaps no longer than the quantile forecast for them.",
                ("tool_kind", "quantile"),
                registry=registry,
            )
        )
        self.forecast_nodes = Gauge(
            "cachewise_forecast_nodes",
            "Places in the forecast's hierarchy of tools, programs, tenants and sessions.",
            registry=registry,
        )
        self.forecast_saves = Counter(
            "cachewise_forecast_saves",
            "Saves of what the forecast has learned, by how they ended.",
            ("result",),
            registry=registry,
        )
        self.prefix_breaks = Counter(
            "cachewise_prefix_breaks",
            "Turns whose prompt did not extend the one before, by cause.",
            ("cause",),
            registry=registry,
        )
        self.prefix_lost_tokens = Counter(
            "cachewise_prefix_lost_tokens",
            "Tokens of earlier prompts made useless by a break, by cause.",
            ("cause",),
            registry=registry,
        )
        self.decisions = Family(
            Counter(
                "cachewise_route_decisions",
                "Routing decisions by reason.",
                ("policy", "reason"),
                registry=registry,
            )
        )
        self.lost_tokens = Family(
            Counter(
                "cachewise_lost_tokens",
                "Prompt tokens that were not cached, and cached ones given up, by cause.",
                ("loss",),
                registry=registry,
            )
        )
        self.holds = Family(
            Histogram(
                "cachewise_hold_seconds",
                "How long turns were held, by how it ended.",
                ("hold_end",),
                buckets=HOLD_BUCKETS,
                registry=registry,
            )
        )
        self.held = Gauge(
            "cachewise_held_turns",
            "Turns held now (`observe`: that would be).",
            registry=registry,
        )
        self.saved_tokens = Counter(
            "cachewise_saved_tokens",
            "`observe`: tokens lost to eviction that `enforce` would have kept, an estimate.",
            registry=registry,
        )
        self.hints = Family(
            Counter(
                "cachewise_hints",
                "Actions of hints by what became of them.",
                ("hint_result",),
                registry=registry,
            )
        )
        self.sessions = Gauge(
            "cachewise_sessions", "Sessions known, by state.", ("state",), registry=registry
        )
        self.sessions_evicted = Counter(
            "cachewise_sessions_evicted",
            "Sessions forgotten because the limit was reached.",
            registry=registry,
        )
        self.pod_ready = Gauge(
            "cachewise_pod_ready", "1 if the pod takes turns.", ("pod",), registry=registry
        )
        self.pod_in_flight = Gauge(
            "cachewise_pod_in_flight_turns",
            "Turns this gateway has in flight on the pod.",
            ("pod",),
            registry=registry,
        )
        self.pod_queued = Gauge(
            "cachewise_pod_queued_prefill_tokens",
            "Tokens of these turns believed still to be prefilled.",
            ("pod",),
            registry=registry,
        )
        self.pod_rate = Gauge(
            "cachewise_pod_prefill_tokens_per_second",
            "Prefill rate learned from the turns served.",
            ("pod",),
            registry=registry,
        )
        self.pod_resident = Gauge(
            "cachewise_pod_resident_tokens",
            "Tokens of sessions believed to be in the pod's KV cache.",
            ("pod",),
            registry=registry,
        )
        self.pod_capacity = Gauge(
            "cachewise_pod_kv_capacity_tokens",
            "KV cache capacity the pod reports; absent if it does not.",
            ("pod",),
            registry=registry,
        )
        self.pod_kv_usage = Gauge(
            "cachewise_pod_kv_usage_ratio",
            "KV cache in use as the pod reports it; absent if it does not.",
            ("pod",),
            registry=registry,
        )
        self.pod_events_live = Gauge(
            "cachewise_pod_kv_events_live",
            "1 while the pod's KV events tell what its cache holds, 0 while it is believed; absent"
            " without a subscription.",
            ("pod",),
            registry=registry,
        )
        self.pod_events_troubles = Counter(
            "cachewise_pod_kv_events_troubles",
            "KV events that were missed or of no use, by what came of it.",
            ("pod", "trouble"),
            registry=registry,
        )
        self.discovery_failures = Counter(
            "cachewise_discovery_failures",
            "Times that discovery could not ask where the pods are.",
            registry=registry,
        )
        self.pod_places = Gauge(
            "cachewise_pod_admitted_sessions",
            "Sessions that have a place on the pod.",
            ("pod",),
            registry=registry,
        )
        self.pod_admitted = Gauge(
            "cachewise_pod_admitted_tokens",
            "Tokens of these places, shared prefixes once.",
            ("pod", "lane"),
            registry=registry,
        )
        self.pod_budget = Gauge(
            "cachewise_pod_budget_tokens",
            "Tokens that the pod's places may have; absent if its capacity is not known.",
            ("pod",),
            registry=registry,
        )
        self.pod_reserve = Gauge(
            "cachewise_pod_reserve_ratio",
            "The budget's share of the pod's capacity.",
            ("pod",),
            registry=registry,
        )
        self.pod_regret = Gauge(
            "cachewise_pod_regret_ratio",
            "Share of the tokens that admitted sessions left on the pod and did not find again.",
            ("pod",),
            registry=registry,
        )
        self.pod_horizon = Gauge(
            "cachewise_pod_hold_horizon_seconds",
            "A place is kept for a session expected back within about this time; absent if the"
            " pod's capacity is not known.",
            ("pod",),
            registry=registry,
        )
        self.store_up = Gauge(
            "cachewise_store_up",
            "1 while the store that replicas share answers; absent where there is none.",
            ("store",),
            registry=registry,
        )
        self.store_reads = Family(
            Counter(
                "cachewise_store_reads",
                "Sessions unknown here that were looked for in the store.",
                ("read_result",),
                registry=registry,
            )
        )
        self.store_writes = Family(
            Counter(
                "cachewise_store_writes",
                "Writes to the store, each of all that was to be told.",
                ("result",),
                registry=registry,
            )
        )
        self.store_dropped = Counter(
            "cachewise_store_dropped",
            "News of turns that was not told to other replicas: the store was away too long.",
            registry=registry,
        )
        self.shared_gaps = Family(
            Counter(
                "cachewise_shared_gaps",
                "Gaps whose lessons were told to other replicas, or taken from them.",
                ("direction",),
                registry=registry,
            )
        )
        self.replicas = Gauge(
            "cachewise_replicas",
            "Replicas of the gateway that this one hears of, itself included.",
            registry=registry,
        )
        self.replicas.set(1)
        self.loop_lag = Gauge(
            "cachewise_event_loop_lag_seconds",
            "How late the event loop woke a timer last, at the worst of the last ten.",
            registry=registry,
        )
        self.log_lines_dropped = Counter(
            "cachewise_log_lines_dropped",
            "Log lines given up because the log could not be written fast enough.",
            registry=registry,
        )
        self.recording = Gauge(
            "cachewise_recording",
            "1 while turns are recorded, 0 while they are not: it is off, or the disk is full.",
            registry=registry,
        )
        self.recorded_turns = Counter(
            "cachewise_recorded_turns", "Turns written into recordings.", registry=registry
        )
        self.recorded_bytes = Counter(
            "cachewise_recorded_bytes", "Bytes that they took on the disk.", registry=registry
        )
        self.recording_lost = Family(
            Counter(
                "cachewise_recording_lost_turns",
                "Turns that should have been recorded and were not, by what they were lost to.",
                ("lost_to",),
                registry=registry,
            )
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Show counters of fixed words from the start: one that appears with its first event hides
        that event from `rate`."""
        words: tuple[tuple[Counter | Family[Any], Iterable[str]], ...] = (
            (self.retries, RETRY_REASONS),
            (self.degraded, STAGES),
            (self.forecast_saves, ("ok", "failed")),
            (self.prefix_breaks, get_args(BreakCause)),
            (self.prefix_lost_tokens, get_args(BreakCause)),
            (self.lost_tokens, LOSS_CAUSES),
            (self.holds, get_args(HoldEnd)),
            (self.hints, HINT_RESULTS),
            (self.recording_lost, LOST_TO),
            (self.store_reads, ("hit", "miss", "late", "failed")),
            (self.store_writes, ("ok", "failed")),
            (self.shared_gaps, ("told", "taken")),
        )
        for metric, values in words:
            for value in values:
                (metric.metric if isinstance(metric, Family) else metric).labels(value)

    def kv_events_troubled(self, pod: Pod, trouble: Trouble) -> None:
        self.pod_events_troubles.labels(pod.name, trouble).inc()

    def forget(self, pod: str) -> None:
        """Drop what is kept of a pod that has left."""
        for kept in vars(self).values():
            metric = kept.metric if isinstance(kept, Family) else kept
            if not isinstance(metric, MetricWrapperBase) or "pod" not in metric._labelnames:
                continue
            metric.remove_by_labels({"pod": pod})
            if isinstance(kept, Family):
                at = metric._labelnames.index("pod")
                for values in [values for values in kept if values[at] == pod]:
                    del kept[values]

    def refresh(
        self,
        fleet: Fleet,
        sessions: SessionStore,
        admission: Admission,
        log_lines_dropped: int,
    ) -> None:
        """Set the gauges from the state they mirror; called at each scrape."""
        states = {"running": 0, "idle": 0, "ended": 0}
        for session in sessions:
            states[session.state] += 1
        for state, count in states.items():
            self.sessions.labels(state).set(count)
        _raise_to(self.sessions_evicted, sessions.evicted_total)
        _raise_to(self.log_lines_dropped, log_lines_dropped)
        if fleet.discovery is not None:
            _raise_to(self.discovery_failures, fleet.discovery.failures)
        for gauge in (
            self.pod_capacity,
            self.pod_kv_usage,
            self.pod_places,
            self.pod_admitted,
            self.pod_budget,
            self.pod_reserve,
            self.pod_regret,
            self.pod_horizon,
        ):
            gauge.clear()
        self.held.set(admission.held_count)
        _raise_to(self.saved_tokens, admission.saved_tokens)
        for name, book in admission.books.items():
            self.pod_places.labels(name).set(len(book.places))
            self.pod_admitted.labels(name, "agent").set(book.tokens)
            self.pod_admitted.labels(name, "aside").set(book.aside_tokens)
            self.pod_reserve.labels(name).set(book.reserve)
            self.pod_regret.labels(name).set(book.regret)
            if book.budget_tokens < inf:
                self.pod_budget.labels(name).set(book.budget_tokens)
                self.pod_horizon.labels(name).set(book.horizon_s)
        for pod in fleet:
            self.pod_ready.labels(pod.name).set(pod.takes_turns)
            self.pod_in_flight.labels(pod.name).set(pod.in_flight)
            self.pod_queued.labels(pod.name).set(pod.queued_prefill_tokens)
            self.pod_rate.labels(pod.name).set(pod.rate.tokens_per_s)
            self.pod_resident.labels(pod.name).set(pod.residency.resident_tokens)
            if pod.residency.ledger is not None:
                self.pod_events_live.labels(pod.name).set(pod.residency.ledger.live)
                for trouble in get_args(Trouble):
                    self.pod_events_troubles.labels(pod.name, trouble)  # from the start, at 0
            if pod.residency.capacity_tokens is not None:
                self.pod_capacity.labels(pod.name).set(pod.residency.capacity_tokens)
            load = pod.probed.load if pod.probed is not None else None
            if load is not None and load.kv_usage_ratio is not None:
                self.pod_kv_usage.labels(pod.name).set(load.kv_usage_ratio)


def _raise_to(counter: Counter, total: int) -> None:
    """Bring a counter up to a total that is counted elsewhere."""
    counter.inc(max(0, total - counter._value.get()))


def reference() -> str:
    """The tables of `docs/metrics.md`: every metric and every label with its meaning."""
    rows = []
    for metric in Metrics().registry.collect():
        if not metric.name.startswith("cachewise_"):
            continue
        suffix = "_total" if metric.type == "counter" else ""
        rows.append(f"| `{metric.name}{suffix}` | {metric.type} | {metric.documentation} |")
    labels = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in LABELS.items())
    heads = "| metric | type | meaning |", "| label | values |"
    lines = "| --- | --- | --- |", "| --- | --- |"
    return "\n".join([heads[0], lines[0], *rows, "", heads[1], lines[1], labels])


LABELS = {
    "wire": "the dialect: `chat`, `completions`, `responses`, `messages`",
    "client": "the client program by its `User-Agent`: one of a fixed few names, or `other`",
    "outcome": "`ok`, `pod_error` (the pod's own error, passed through), `gateway_error`,"
    " `broken_off` (the pod failed in the middle), `client_gone`, `cancelled`, `failed`",
    "pod": "the pod's name as configured",
    "by": "what named the session: a header, a body field, `tool_call_id`, `prefix`, `store`"
    " (what another replica knows), `new`",
    "idle_kind": "`tool`, `human`, `background`, `ended`",
    "cause": "`model`, `tools`, `system`, `compaction`, `edit`, `truncation`",
    "policy": "the routing policy",
    "reason": "of a route: `only`, `home`, `moved`, `shared_prefix`, `hashed`, `policy`; see"
    " [how it works](how-it-works.md); of a turn that was held `home`, `admitted`; `fallback`. Of a"
    " retry: `refused`, `connect_timeout`, `disconnected`, `lost`, `failed`, `status_503`",
    "stage": "where a fault was survived: `session`, `admission`, `route`, `observe`, `forecast`,"
    " `settle`, `history`, `inspector`, `forget`, `tick`, `sharing`, `audit` (what a fault had left"
    " in the books was found), `trace` (a span is lost), `record` (a turn's record is lost)",
    "loss": "`first_turn` (the session is new), `prefix_break`, `moved` (to another pod),"
    " `pod_restart`, `evicted`; see [admission](admission.md)",
    "hold_end": "`released`, `too_long`, `queue_full` (not held at all), `client_gone`, `no_pod`,"
    " `shutdown`, `failed`; `observed`: would have been held",
    "lane": "`agent`, `aside`",
    "hint_result": "the pod's answer: `applied`, `clipped`, `rejected`, `unsupported`; or `failed`"
    " (not delivered), `dropped` (the queue was full)",
    "lost_to": "`queue` (the disk was too slow), `disk` (full, or not to be written), `fault`",
    "status": "an HTTP status code",
    "tool_kind": "what was waited for: `shell`, `poll`, `read`, `edit`, `search`, `plan`,"
    " `subagent`, `message`, `web`, `human`, `background`, `mcp`, `other`, `ended`",
    "quantile": "`0.025`, `0.1`, `0.25`, `0.5`, `0.75`, `0.9`, `0.975`; calibrated, the share of"
    " gaps below is just this number",
    "result": "`ok`, `failed`",
    "trouble": "`replayed` (a missed message was had in the end), `lost` (what was missed cannot be"
    " had), `restarted` (another engine), `malformed`, `overflow` (more blocks than are kept)",
    "store": "`redis`",
    "direction": "`told`, `taken`",
    "read_result": "`hit`, `miss`, `late` (no answer within `sharing.read_timeout_s`), `failed`",
    "state": "`running`, `idle`, `ended`",
}

if __name__ == "__main__":
    print(reference())
