"""*Gateway*: whether the gateway itself is well."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.panels import (
    GATEWAY,
    GOOD_IS_NONE,
    WINDOW,
    board,
    graph,
    heat,
    number,
    percentile,
    percentiles,
    rate,
)

REPLICA = "{{replica}} {{instance}}"
"""`replica` is there where the chart's ServiceMonitor scrapes."""
STATUSES = {
    "400": "blue",
    "401": "purple",
    "404": "green",
    "429": "yellow",
    "500": "dark-red",
    "502": "red",
    "503": "orange",
    "504": "yellow",
}


def make() -> Dashboard:
    return board(
        "cachewise-gateway",
        "CacheWise / Gateway",
        "CPU, memory, errors, event-loop lag and overhead of the gateways themselves.",
        {
            "": NOW,
            "Overhead": OVERHEAD,
            "Process": PROCESS,
            "Errors": ERRORS,
            "Replicas": REPLICAS,
            "Recording": RECORDING,
        },
    )


def own(metric: str) -> str:
    """A series of the Python process, of gateways only: vLLM has series of the same name."""
    return f"{metric} and on (job, instance) cachewise_held_turns{{{GATEWAY}}}"


NOW = [
    number(
        "Gateways",
        "Replicas that are scraped.",
        "as many as you run.",
        "short",
        f"count(cachewise_held_turns{{{GATEWAY}}})",
        ((None, "red"), (1, "green")),
        decimals=0,
    ),
    number(
        "Overhead, p99",
        "From a turn's whole request to its being sent to a pod, holds excluded: parsing, session,"
        " routing, admission.",
        "below 25 ms.",
        "s",
        percentile(0.99, "cachewise_overhead_seconds", GATEWAY),
        ((None, "green"), (0.025, "orange"), (0.1, "red")),
        decimals=2,
    ),
    number(
        "Event-loop lag",
        "How late the event loop was, at the worst of the last ten seconds and of all replicas.",
        "below 50 ms: the whole gateway stands still meanwhile.",
        "s",
        f"max(cachewise_event_loop_lag_seconds{{{GATEWAY}}})",
        ((None, "green"), (0.05, "orange"), (0.25, "red")),
        decimals=2,
    ),
    number(
        "CPU a turn",
        "CPU time of all replicas for each turn.",
        "a few milliseconds; long streams and large bodies cost more.",
        "s",
        f"sum({own(f'rate(process_cpu_seconds_total[{WINDOW}])')})"
        f" / {rate('cachewise_turns_total', GATEWAY)}",
        ((None, "green"), (0.05, "orange"), (0.2, "red")),
        decimals=2,
    ),
    number(
        "Errors of the gateway (5xx)",
        "Share of turns that the gateway itself answered with a 5xx.",
        "0.",
        "percentunit",
        f"""({rate("cachewise_gateway_errors_total", f'{GATEWAY}, status=~"5.."')} or vector(0))"""
        f" / {rate('cachewise_turns_total', GATEWAY)}",
        GOOD_IS_NONE,
    ),
    number(
        "Degraded",
        "Faults of the clever part a second that turns survived as plain relays.",
        "0. Each is a bug; the log says where.",
        "short",
        rate("cachewise_degraded_total", GATEWAY),
        ((None, "green"), (0.000001, "red")),
        decimals=2,
    ),
]

OVERHEAD = [
    graph(
        "Overhead",
        "From a turn's whole request to its being sent to a pod, holds excluded.",
        "p50 below 5 ms, p99 below 25 ms.",
        "s",
        *percentiles("cachewise_overhead_seconds", GATEWAY, 0.5, 0.9, 0.99),
        limit=0.025,
        log=True,
    ),
    heat(
        "Overhead, all turns",
        "How many turns fell into each range.",
        "one dark band at the bottom.",
        "s",
        "cachewise_overhead_seconds",
        GATEWAY,
    ),
    graph(
        "Event-loop lag",
        "How late the event loop woke a timer, at the worst of the last ten.",
        "below 50 ms. Above with CPU near one core: add replicas. Above with idle CPU: something"
        " blocks.",
        "s",
        (f"cachewise_event_loop_lag_seconds{{{GATEWAY}}}", REPLICA),
        limit=0.25,
    ),
]

PROCESS = [
    graph(
        "CPU",
        "Cores that each replica uses. A gateway is one process with one event loop.",
        "below 0.7; the autoscaler adds replicas there.",
        "short",
        (own(f"rate(process_cpu_seconds_total[{WINDOW}])"), REPLICA),
        limit=1,
    ),
    graph(
        "Memory",
        "Resident memory of each replica.",
        "levels off: everything kept is bounded.",
        "bytes",
        (own("process_resident_memory_bytes"), REPLICA),
    ),
    graph(
        "Open files",
        "Sockets above all, as a share of what the process may open.",
        "far below 100 %: a turn takes two.",
        "percentunit",
        (own("process_open_fds / process_max_fds"), REPLICA),
    ),
    graph(
        "Garbage collections",
        "Collections a second by generation. A full one (2) stops the event loop.",
        "generation 2 next to never.",
        "short",
        (
            f"sum by (generation) ({own(f'rate(python_gc_collections_total[{WINDOW}])')})",
            "generation {{generation}}",
        ),
    ),
    graph(
        "Uptime",
        "Time since each replica started.",
        "only rises, but for your own roll-outs.",
        "s",
        (f"time() - ({own('process_start_time_seconds')})", REPLICA),
    ),
    graph(
        "Log lines dropped",
        "Log lines a second given up because the log could not be written fast enough.",
        "0.",
        "short",
        (rate("cachewise_log_lines_dropped_total", GATEWAY), "dropped"),
        colours={"dropped": "red"},
    ),
]

ERRORS = [
    graph(
        "Errors by status",
        "Errors a second that the gateway itself answered. 4xx are the client's, 429 is a full"
        " queue, 502 a pod that could not be reached, 503 no pod or a hold that took too long,"
        " 504 a silent pod.",
        "some 4xx, no 5xx.",
        "reqps",
        (rate("cachewise_gateway_errors_total", GATEWAY, "status"), "{{status}}"),
        stacked=True,
        colours=STATUSES,
        span=6,
    ),
    graph(
        "Turns sent again",
        "Turns a second that were given to another pod, or the same once more, before their first"
        " byte.",
        "0 but for pods that come and go.",
        "reqps",
        (rate("cachewise_retries_total", GATEWAY, "reason"), "{{reason}}"),
        stacked=True,
        span=6,
    ),
    graph(
        "Faults survived",
        "Faults of the clever part a second, by stage; the turn went on as a plain relay.",
        "0.",
        "reqps",
        (rate("cachewise_degraded_total", GATEWAY, "stage"), "{{stage}}"),
        stacked=True,
        span=6,
    ),
    graph(
        "Discovery failures",
        "Times a second that discovery could not ask where the pods are. What is known stands.",
        "0.",
        "reqps",
        (rate("cachewise_discovery_failures_total", GATEWAY), "failures"),
        colours={"failures": "red"},
        span=6,
    ),
]
RECORDING = [
    graph(
        "Turns recorded",
        "Turns a second written into recordings, and those that were lost: the disk was too slow"
        " (queue), is full or cannot be written (disk). Zero without `record.directory`.",
        "as many as turns end; none lost.",
        "reqps",
        (rate("cachewise_recorded_turns_total", GATEWAY), "recorded"),
        (rate("cachewise_recording_lost_turns_total", GATEWAY, "lost_to"), "lost: {{lost_to}}"),
        colours={"recorded": "green"},
        span=6,
    ),
    graph(
        "Recording",
        "Replicas that record. It stops by itself on a full disk, and goes on by itself.",
        "all of yours, or 0 if it is off.",
        "short",
        (f"sum(cachewise_recording{{{GATEWAY}}})", "replicas"),
        span=6,
    ),
    graph(
        "Bytes recorded",
        "What recordings take on the disk, a second; `record.max_bytes` bounds the whole.",
        "a hundred bytes a turn or so.",
        "Bps",
        (rate("cachewise_recorded_bytes_total", GATEWAY), "written"),
        span=6,
    ),
]
REPLICAS = [
    graph(
        "Replicas that hear of one another",
        "Gateways that each one knows of through the store, itself included, and whether the store"
        " answers. No data without a store.",
        "as many as run, and 1.",
        "short",
        (f"min(cachewise_replicas{{{GATEWAY}}})", "replicas"),
        (f"min(cachewise_store_up{{{GATEWAY}}})", "store answers"),
        span=6,
    ),
    graph(
        "Sessions looked for in the store",
        "Lookups a second of sessions that a replica has not seen.",
        "`hit` after a replica was lost, else `miss`; no `late`, no `failed`.",
        "reqps",
        (rate("cachewise_store_reads_total", GATEWAY, "read_result"), "{{read_result}}"),
        stacked=True,
        colours={"hit": "green", "miss": "blue", "late": "orange", "failed": "red"},
        span=6,
    ),
    graph(
        "Writes to the store",
        "Writes a second, and news that was given up because the store was away too long.",
        "a steady `ok`; nothing `failed`, nothing given up.",
        "reqps",
        (rate("cachewise_store_writes_total", GATEWAY, "result"), "{{result}}"),
        (rate("cachewise_store_dropped_total", GATEWAY), "given up"),
        colours={"ok": "green", "failed": "red", "given up": "orange"},
        span=6,
    ),
    graph(
        "Lessons shared",
        "Gaps a second whose lessons were told to other replicas or taken from them.",
        "both about as many as gaps end.",
        "short",
        (rate("cachewise_shared_gaps_total", GATEWAY, "direction"), "{{direction}}"),
        span=6,
    ),
]
