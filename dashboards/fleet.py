"""*Fleet overview*: is the fleet well, and if not, where to look."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.panels import (
    ENGINE,
    GATEWAY,
    GOOD_IS_HIGH,
    GOOD_IS_NONE,
    POD,
    board,
    graph,
    number,
    percentile,
    percentiles,
    rate,
    states,
)

OUTCOMES = {
    "ok": "green",
    "pod_error": "yellow",
    "gateway_error": "orange",
    "broken_off": "red",
    "failed": "dark-red",
    "client_gone": "blue",
    "cancelled": "purple",
}
LOSSES = {
    "first_turn": "blue",
    "prefix_break": "purple",
    "moved": "yellow",
    "pod_restart": "orange",
    "evicted": "red",
}
FAILED = 'outcome=~"gateway_error|broken_off|failed"'


def make() -> Dashboard:
    return board(
        "cachewise-fleet",
        "CacheWise / Fleet overview",
        "Turns, time to first byte, cache hits, evictions, holds and pods of the whole fleet.",
        {"": NOW, "Turns": TURNS, "Cache": CACHE, "Holds": HOLDS, "Pods": PODS},
    )


NOW = [
    number(
        "Turns",
        "Turns a second that ended, however they ended.",
        "what your agents ask for; a sudden fall is an outage.",
        "reqps",
        rate("cachewise_turns_total", GATEWAY),
        ((None, "blue"),),
    ),
    number(
        "Failed turns",
        "Share of turns that the gateway answered with an error of its own, that a pod broke off,"
        " or that failed in the gateway. Includes what clients did wrong (400, 401, 404).",
        "below 1 %.",
        "percentunit",
        f"({rate('cachewise_turns_total', f'{GATEWAY}, {FAILED}')} or vector(0))"
        f" / {rate('cachewise_turns_total', GATEWAY)}",
        GOOD_IS_NONE,
    ),
    number(
        "First byte, p90",
        "From a turn's arrival at the gateway to the first byte of the pod's answer, holds"
        " included.",
        "a few seconds for prompts that are cached; as your users bear it.",
        "s",
        percentile(0.9, "cachewise_time_to_first_byte_seconds", POD),
        ((None, "green"), (10, "orange"), (30, "red")),
    ),
    number(
        "Prompt tokens from cache",
        "Share of the prompt tokens that pods did not have to compute, as they report it.",
        "above 80 %: agents resend their whole history, and nearly all of it can be cached.",
        "percentunit",
        f"{rate('cachewise_cached_prompt_tokens_total', POD)}"
        f" / {rate('cachewise_prompt_tokens_total', POD)}",
        GOOD_IS_HIGH,
    ),
    number(
        "Held now",
        "Turns that wait at the gateway until their session has a place on a pod.",
        "0 when the fleet is large enough; some under peaks. Many for long: add pods.",
        "short",
        f"sum(cachewise_held_turns{{{GATEWAY}}})",
        ((None, "green"), (10, "orange"), (100, "red")),
        decimals=0,
    ),
    number(
        "Pods away",
        "Known pods that take no turns: lost, starting, or draining.",
        "0.",
        "short",
        f"sum(1 - max by (pod) (cachewise_pod_ready{{{POD}}}))",
        ((None, "green"), (1, "red")),
        decimals=0,
    ),
]

TURNS = [
    graph(
        "Turns by outcome",
        "How turns ended. `pod_error` is the pod's own error, passed through; `client_gone` a"
        " client that left.",
        "green throughout; a little blue where people interrupt their agents.",
        "reqps",
        (rate("cachewise_turns_total", GATEWAY, "outcome"), "{{outcome}}"),
        stacked=True,
        colours=OUTCOMES,
    ),
    graph(
        "Turn duration",
        "From a turn's arrival to its last byte, holds included.",
        "steady. A p99 that grows alone: some sessions wait or lost their cache; all grow: the"
        " fleet is full.",
        "s",
        *percentiles("cachewise_turn_duration_seconds", GATEWAY, 0.5, 0.9, 0.99),
        log=True,
    ),
    graph(
        "Time to first byte by pod, p90",
        "From a turn's arrival at the gateway to the first byte of the pod's answer.",
        "pods close together. One that stands out is overloaded or ill.",
        "s",
        (percentile(0.9, "cachewise_time_to_first_byte_seconds", POD, "pod"), "{{pod}}"),
        log=True,
    ),
    graph(
        "Time to first token in vLLM, p90",
        "What vLLM itself took, from its API server to the first token. The rest of the time to"
        " first byte was spent at the gateway, held.",
        "below what the gateway sees, and falling when the share of cached tokens rises.",
        "s",
        (percentile(0.9, "vllm:time_to_first_token_seconds", ENGINE, "pod"), "{{pod}}"),
        log=True,
    ),
    graph(
        "Requests in vLLM",
        "Requests that run in each pod, and that wait in its own queue.",
        "next to none waiting: with admission turns wait at the gateway, where it matters who is"
        " next.",
        "short",
        (f"sum by (pod) (vllm:num_requests_running{{{ENGINE}}})", "{{pod}} running"),
        (f"sum by (pod) (vllm:num_requests_waiting{{{ENGINE}}})", "{{pod}} waiting"),
    ),
    graph(
        "Generated tokens by pod",
        "Output tokens a second, as the pods report them.",
        "shared out evenly.",
        "short",
        (rate("cachewise_output_tokens_total", POD, "pod"), "{{pod}}"),
        stacked=True,
    ),
]

CACHE = [
    graph(
        "Prompt tokens",
        "Prompt tokens a second: found in a pod's cache, or computed.",
        "mostly green. What is computed is what GPUs are paid for.",
        "short",
        (rate("cachewise_cached_prompt_tokens_total", POD), "cached"),
        (
            f"{rate('cachewise_prompt_tokens_total', POD)}"
            f" - {rate('cachewise_cached_prompt_tokens_total', POD)}",
            "computed",
        ),
        stacked=True,
        colours={"cached": "green", "computed": "orange"},
    ),
    graph(
        "Prompt tokens from cache by pod",
        "Share of prompt tokens found in each pod's cache.",
        "above 80 % and alike. A new pod begins low and catches up.",
        "percentunit",
        (
            f"{rate('cachewise_cached_prompt_tokens_total', POD, 'pod')}"
            f" / {rate('cachewise_prompt_tokens_total', POD, 'pod')}",
            "{{pod}}",
        ),
        top=1,
    ),
    graph(
        "Tokens lost by cause",
        "Prompt tokens that were not cached, a second, by why. `first_turn` cannot be helped,"
        " `prefix_break` is the agent's own doing, the others are what the gateway is there to"
        " prevent.",
        "next to no `evicted`, `moved` and `pod_restart`.",
        "short",
        (rate("cachewise_lost_tokens_total", GATEWAY, "loss"), "{{loss}}"),
        stacked=True,
        colours=LOSSES,
    ),
    graph(
        "Evicted KV blocks by pod",
        "Cached blocks a second that each pod gave to others (pods with the engine patch).",
        "low. High while the share of cached tokens falls: more sessions than the caches hold.",
        "short",
        (rate("cachewise:evicted_blocks_total", ENGINE, "pod"), "{{pod}}"),
        stacked=True,
    ),
    graph(
        "Preemptions by pod",
        "Requests a second that vLLM threw out of its running batch for want of KV blocks.",
        "0. Above: lower `--max-num-seqs`, or give the pod more KV cache.",
        "short",
        (rate("vllm:num_preemptions_total", ENGINE, "pod"), "{{pod}}"),
    ),
    graph(
        "Where turns are sent",
        "Routing decisions a second by reason: `home` is where the session's KV is, `admitted`"
        " where a held session found a place.",
        "`home` for nearly all; `hashed` for new sessions; few `moved`; no `fallback`.",
        "reqps",
        (rate("cachewise_route_decisions_total", GATEWAY, "reason"), "{{reason}}"),
        stacked=True,
        colours={"home": "green", "moved": "orange", "fallback": "red", "hashed": "blue"},
    ),
]

HOLDS = [
    graph(
        "Held turns",
        "Turns that wait for a place, by gateway.",
        "0, with peaks. A level that stays: the fleet is too small for the sessions that are"
        " active.",
        "short",
        (f"sum by (instance) (cachewise_held_turns{{{GATEWAY}}})", "{{instance}}"),
        stacked=True,
    ),
    graph(
        "How long turns were held",
        "Of turns that were held and then released.",
        "p90 below a minute.",
        "s",
        *percentiles("cachewise_hold_seconds", f'{GATEWAY}, hold_end="released"', 0.5, 0.9, 0.99),
        limit=60,
    ),
    graph(
        "How holds ended",
        "Holds a second by how they ended; `queue_full` was turned away at once.",
        "all `released`; some `client_gone`. The others are errors that clients saw.",
        "reqps",
        (rate("cachewise_hold_seconds_count", GATEWAY, "hold_end"), "{{hold_end}}"),
        stacked=True,
        colours={
            "released": "green",
            "client_gone": "blue",
            "observed": "purple",
            "too_long": "orange",
            "queue_full": "red",
            "no_pod": "dark-red",
            "shutdown": "yellow",
            "failed": "dark-red",
        },
    ),
]

PODS = [
    states(
        "Pods that take turns",
        "Whether at least one gateway gives turns to the pod.",
        "green throughout.",
        (f"max by (pod) (cachewise_pod_ready{{{POD}}})", "{{pod}}"),
        {1: ("takes turns", "green"), 0: ("away", "red")},
    ),
    graph(
        "Turns in flight by pod",
        "Turns that the gateways have on each pod.",
        "shared out by where sessions live: not equal, and none idle while others are full.",
        "short",
        (f"sum by (pod) (cachewise_pod_in_flight_turns{{{POD}}})", "{{pod}}"),
        stacked=True,
    ),
    graph(
        "Sessions admitted by pod",
        "Sessions that have a place on each pod, whether a turn of theirs runs or not.",
        "steady while turns are held: places that change hands fast cost recomputation.",
        "short",
        (f"sum by (pod) (cachewise_pod_admitted_sessions{{{POD}}})", "{{pod}}"),
        stacked=True,
    ),
]
