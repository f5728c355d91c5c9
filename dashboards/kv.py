"""*KV and hints*: what pods hold, what they give away, and what they are told."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.panels import ENGINE, GATEWAY, POD, board, graph, mean, percentile, rate

KINDS = {
    "open": "green",
    "tool": "blue",
    "human": "purple",
    "unknown": "yellow",
    "ended": "orange",
}


def make() -> Dashboard:
    return board(
        "cachewise-kv",
        "CacheWise / KV and hints",
        "What the pods' caches hold and what is believed of it, admission's books, hints and what"
        " became of them, evictions and whether they were right.",
        {
            "Residency": RESIDENCY,
            "KV events": EVENTS,
            "Admission": ADMISSION,
            "Hints": HINTS,
            "Eviction": EVICTION,
            "Engine patch": PATCH,
            "vLLM": ENGINES,
        },
    )


def mean_of(metric: str) -> str:
    return f"avg by (pod) ({metric}{{{POD}}})"


def highest(metric: str) -> str:
    return f"max by (pod) ({metric}{{{POD}}})"


RESIDENCY = [
    graph(
        "KV capacity",
        "Tokens that each pod's KV cache holds, as the pod reports it.",
        "what you reckoned with; alike on equal pods. A pod that reports none holds no turns.",
        "short",
        (highest("cachewise_pod_kv_capacity_tokens"), "{{pod}}"),
    ),
    graph(
        "KV cache in use",
        "Share of each pod's KV blocks that running requests hold, as the pod reports it. Cached"
        " blocks that nobody uses do not count.",
        "below 90 %. At 100 % vLLM preempts requests.",
        "percentunit",
        (highest("cachewise_pod_kv_usage_ratio"), "{{pod}}"),
        top=1,
        limit=0.9,
    ),
    graph(
        "Believed resident",
        "Tokens of sessions believed to be in each pod's cache, as a share of its capacity, by the"
        " replica that believes most: with a store each knows of all.",
        "near 100 % on a busy pod: a cache is there to be full.",
        "percentunit",
        (
            f"{highest('cachewise_pod_resident_tokens')}"
            f" / {highest('cachewise_pod_kv_capacity_tokens')}",
            "{{pod}}",
        ),
    ),
    graph(
        "Is the belief right?",
        "Cached tokens that pods reported, for each that was believed to be cached.",
        "near 1. Below 0.8: pods hold less than believed, and turns are sent where their KV is"
        " not.",
        "short",
        (
            f"{rate('cachewise_cached_prompt_tokens_total', POD, 'pod')}"
            f" / {rate('cachewise_expected_cached_prompt_tokens_total', POD, 'pod')}",
            "{{pod}}",
        ),
    ),
    graph(
        "Prompt tokens found in vLLM's prefix cache",
        "Share of the tokens looked up that vLLM found, as vLLM counts it, over all its clients.",
        "above 80 %.",
        "percentunit",
        (
            f"{rate('vllm:prefix_cache_hits_total', ENGINE, 'pod')}"
            f" / {rate('vllm:prefix_cache_queries_total', ENGINE, 'pod')}",
            "{{pod}}",
        ),
        top=1,
    ),
    graph(
        "Prefill waiting",
        "Tokens of turns in flight that are believed still to be prefilled.",
        "falls back to 0 between turns. A level that stays is a queue.",
        "short",
        (f"sum by (pod) (cachewise_pod_queued_prefill_tokens{{{POD}}})", "{{pod}}"),
    ),
]

ADMISSION = [
    graph(
        "Admitted of budget",
        "Tokens of the sessions that have a place on each pod, as a share of what places may have.",
        "near 100 % while turns are held. Above for a while: sessions that have a place grow, or"
        " nobody waits for one.",
        "percentunit",
        (
            f"sum by (pod) (cachewise_pod_admitted_tokens{{{POD}}})"
            f" / {highest('cachewise_pod_budget_tokens')}",
            "{{pod}}",
        ),
        limit=1,
    ),
    graph(
        "Reserve",
        "The budget's share of the pod's KV capacity. Admission moves it between 0.5 and 0.8.",
        "high where sessions find their KV again. At 0.5 for long: something else uses the cache.",
        "percentunit",
        (highest("cachewise_pod_reserve_ratio"), "{{pod}}"),
        top=1,
    ),
    graph(
        "Regret",
        "Share of the tokens that admitted sessions left on the pod and did not find again.",
        "below 3 %. Above, the reserve is lowered.",
        "percentunit",
        (highest("cachewise_pod_regret_ratio"), "{{pod}}"),
        limit=0.03,
    ),
    graph(
        "Horizon",
        "A place is kept for a session that is expected back within about this time: the time in"
        " which the pod could prefill all that it has admitted.",
        "steady; about a minute for a 32B model on two H200.",
        "s",
        (highest("cachewise_pod_hold_horizon_seconds"), "{{pod}}"),
    ),
    graph(
        "Prefill rate learned",
        "Tokens a second that each pod prefills, from the turns that it served.",
        "steady, and alike on equal hardware.",
        "short",
        (mean_of("cachewise_pod_prefill_tokens_per_second"), "{{pod}}"),
    ),
    graph(
        "What `enforce` would have kept",
        "With `admission.mode: observe`: tokens a second that eviction lost and that holding turns"
        " would have kept, an estimate.",
        "0 with `enforce`. Much with `observe`: turn `enforce` on.",
        "short",
        (rate("cachewise_saved_tokens_total", GATEWAY), "kept"),
    ),
]

HINTS = [
    graph(
        "Hints by result",
        "Actions a second that gateways sent, by what the pods answered; `failed` could not be"
        " delivered, `dropped` found the queue full.",
        "all `applied`, some `clipped`.",
        "reqps",
        (rate("cachewise_hints_total", GATEWAY, "hint_result"), "{{hint_result}}"),
        stacked=True,
        colours={
            "applied": "green",
            "clipped": "yellow",
            "rejected": "orange",
            "unsupported": "purple",
            "failed": "red",
            "dropped": "dark-red",
        },
    ),
    graph(
        "Hints as pods count them",
        "Actions a second that pods with the engine patch received, by action and result.",
        "the same sum as the gateways sent.",
        "reqps",
        (rate("cachewise:hints_total", ENGINE, "action, result"), "{{action}} {{result}}"),
        stacked=True,
    ),
    graph(
        "Patch active",
        "Engines whose reuse-aware patch is at work, and sessions that they follow.",
        "every patched engine; it follows the sessions that are hinted.",
        "short",
        (f"sum(cachewise:patch_active{{{ENGINE}}})", "engines active"),
        (f"sum(cachewise:sessions{{{ENGINE}}})", "sessions followed"),
    ),
]

EVICTION = [
    graph(
        "KV blocks by what their session waits for",
        "Blocks that sessions own on pods with the engine patch. `open`: a turn runs or waits;"
        " `unknown`: not hinted.",
        "mostly `open` and `tool`. Much `ended`: nothing else wanted the room.",
        "short",
        (f"sum by (idle_kind) (cachewise:resident_blocks{{{ENGINE}}})", "{{idle_kind}}"),
        stacked=True,
        colours=KINDS,
    ),
    graph(
        "Evicted blocks by cause",
        "Cached blocks a second given away: `ended` sessions' and `superseded` ones first, then by"
        " `forecast`; `lru` where nothing is known.",
        "as much `ended` and `superseded` as there is. Mostly `lru`: hints do not arrive.",
        "short",
        (rate("cachewise:evicted_blocks_total", ENGINE, "cause"), "{{cause}}"),
        stacked=True,
        colours={"ended": "green", "superseded": "blue", "forecast": "yellow", "lru": "red"},
    ),
    graph(
        "Evictions regretted",
        "Evicted tokens a second that a request asked for again within the window: what the choice"
        " of victims cost.",
        "a small part of what is evicted. Nearly as much within 60 s as within 600 s: sessions come"
        " back sooner than forecast.",
        "short",
        (
            rate("cachewise:evicted_tokens_returned_total", ENGINE, "window"),
            "within {{window}} s",
        ),
    ),
]

PATCH = [
    graph(
        "Waiting order",
        "Requests a second that were let in before an older one, since they need fewer blocks.",
        "above 0 under load only.",
        "reqps",
        (rate("cachewise:waiting_overtakes_total", ENGINE, "pod"), "{{pod}}"),
    ),
    graph(
        "Longest wait behind younger requests",
        "In each engine, so far.",
        "not far above `CACHEWISE_MAX_WAIT_S` (30 s).",
        "s",
        (f"max by (pod) (cachewise:waiting_longest_seconds{{{ENGINE}}})", "{{pod}}"),
        limit=60,
    ),
    graph(
        "Cost of scoring",
        "CPU of each engine core that the patch uses to score sessions and order requests.",
        "below 5 % of a core.",
        "percentunit",
        (rate("cachewise:scoring_seconds_total", ENGINE, "pod"), "{{pod}}"),
        limit=0.05,
    ),
]

EVENTS = [
    graph(
        "Residency known, not believed",
        "1 while the pod's KV events tell what its cache holds, 0 while it is believed. No data"
        " without a subscription.",
        "1.",
        "short",
        (f"min by (pod) (cachewise_pod_kv_events_live{{{GATEWAY}}})", "{{pod}}"),
        top=1,
        span=12,
    ),
    graph(
        "Trouble with KV events",
        "Events a second that were missed or of no use, by what came of it.",
        "0; `replayed` does no harm.",
        "short",
        (rate("cachewise_pod_kv_events_troubles_total", GATEWAY, "trouble"), "{{trouble}}"),
        stacked=True,
        span=12,
    ),
]
ENGINES = [
    graph(
        "Time in vLLM's queue",
        "What requests waited inside vLLM before they first ran, on average: the first bucket ends"
        " at 0.3 s, so a percentile cannot tell shorter waits apart.",
        "near 0 with admission: turns wait at the gateway instead.",
        "s",
        (mean("vllm:request_queue_time_seconds", ENGINE, "pod"), "{{pod}}"),
        log=True,
    ),
    graph(
        "Time between tokens, p90",
        "How fast answers are written.",
        "below 0.1 s. It grows with the requests that run at once and with long prefills.",
        "s",
        (percentile(0.9, "vllm:inter_token_latency_seconds", ENGINE, "pod"), "{{pod}}"),
        log=True,
    ),
    graph(
        "Requests by how they ended",
        "Requests a second, as vLLM counts them; `abort`: the client or the gateway left.",
        "`stop`, some `length`; no `error`.",
        "reqps",
        (
            rate("vllm:request_success_total", ENGINE, "finished_reason"),
            "{{finished_reason}}",
        ),
        stacked=True,
        colours={"stop": "green", "length": "yellow", "abort": "blue", "error": "red"},
    ),
]
