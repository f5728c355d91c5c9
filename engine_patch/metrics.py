"""What the patch counts, as plain data in the engine core and as Prometheus text on the pod."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine_patch.hints import HintBook
from engine_patch.order import WaitingOrder
from engine_patch.queue import ReuseAwareFreeQueue
from engine_patch.regret import EvictionLedger
from engine_patch.sessions import Session, SessionTable


def idle_kind(session: Session) -> str:
    """`open` with a turn waiting or running, else the forecast's kind, else `unknown`."""
    return "open" if session.open_turns else session.idle_kind or "unknown"


_KINDS = ("open", "tool", "human", "unknown", "ended")  # the first of a group's owners counts


def snapshot(
    queue: ReuseAwareFreeQueue,
    sessions: SessionTable,
    hints: HintBook,
    order: WaitingOrder,
    ledger: EvictionLedger,
    scoring_s: float,
) -> dict[str, Any]:
    """All counts as JSON-compatible data."""
    resident = dict.fromkeys(_KINDS, 0)
    for group in queue.groups():
        kinds = {idle_kind(s) for s in group.members}
        resident[next((k for k in _KINDS if k in kinds), "ended")] += group.size
    return {
        "active": True,
        "evicted_blocks": queue.evictions,
        "returned_tokens": {str(w): n for w, n in ledger.tokens.items()},
        "hints": [[kind, status, n] for (kind, status), n in hints.results.items()],
        "sessions": len(sessions),
        "resident_blocks": resident,
        "overtakes": order.overtakes,
        "longest_wait_s": order.longest_wait_s,
        "scoring_s": scoring_s,
    }


def session_rows(sessions: SessionTable, now: float) -> list[dict[str, Any]]:
    """One row a session: its blocks and when it is expected."""
    rows = []
    for session in sessions:
        session.refresh(now)
        rate = None if session.open_turns else session.rate
        rows.append(
            {
                "session_id": session.key,
                "idle_kind": idle_kind(session),
                "idle_s": None if session.open_turns else now - session.idle_since,
                "resident_blocks": sum(g.size for g in session.groups),
                "shared_blocks": sum(g.size for g in session.groups if len(g.members) > 1),
                "superseded_blocks": session.superseded.size if session.superseded else 0,
                "evicted_blocks": session.evicted_blocks,
                "expected_reuse_s": 1 / rate if rate else None,
                "p_return": session.forecast.p_return if session.forecast else None,
            }
        )
    return rows


def render(engines: list[dict[str, Any]]) -> bytes:
    """Prometheus text (0.0.4) of the snapshots of all engines, labelled `engine` as vLLM does."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshots([e if e.get("active") else None for e in engines]))
    return generate_latest(registry)


class _Snapshots:
    def __init__(self, engines: list[dict[str, Any] | None]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        active = [(str(i), e) for i, e in enumerate(self._engines) if e is not None]
        yield _family(
            GaugeMetricFamily,
            "patch_active",
            "Whether the reuse-aware patch is active.",
            (),
            [((str(i),), float(e is not None)) for i, e in enumerate(self._engines)],
        )
        yield _family(
            CounterMetricFamily,
            "evicted_blocks",
            "Cached KV blocks given away, by cause.",
            ("cause",),
            [((i, c), n) for i, e in active for c, n in e["evicted_blocks"].items()],
        )
        yield _family(
            CounterMetricFamily,
            "evicted_tokens_returned",
            "Evicted tokens that a request asked for again within the window, in seconds.",
            ("window",),
            [((i, w), n) for i, e in active for w, n in e["returned_tokens"].items()],
        )
        yield _family(
            CounterMetricFamily,
            "hints",
            "Hint actions received, by type and result.",
            ("action", "result"),
            [((i, kind, status), n) for i, e in active for kind, status, n in e["hints"]],
        )
        yield _family(
            GaugeMetricFamily,
            "resident_blocks",
            "KV blocks that sessions own, by the idle kind of the owner that is back soonest.",
            ("idle_kind",),
            [((i, k), n) for i, e in active for k, n in e["resident_blocks"].items()],
        )
        for cls, name, text, key in (
            (GaugeMetricFamily, "sessions", "Sessions tracked.", "sessions"),
            (
                CounterMetricFamily,
                "waiting_overtakes",
                "Requests admitted before an older one.",
                "overtakes",
            ),
            (
                GaugeMetricFamily,
                "waiting_longest_seconds",
                "Longest time a request has waited behind younger ones.",
                "longest_wait_s",
            ),
            (
                CounterMetricFamily,
                "scoring_seconds",
                "CPU time spent on scoring sessions and arranging the waiting queue.",
                "scoring_s",
            ),
        ):
            yield _family(cls, name, text, (), [((i,), e[key]) for i, e in active])


def _family(
    cls: type[Any],
    name: str,
    text: str,
    labels: tuple[str, ...],
    samples: Iterable[tuple[tuple[str, ...], float]],
) -> Metric:
    family: Metric = cls(f"cachewise:{name}", text, labels=("engine", *labels))
    for values, value in samples:
        family.add_metric(values, value)  # type: ignore[attr-defined]
    return family
