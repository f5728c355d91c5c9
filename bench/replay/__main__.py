"""Replay agents' sessions through vLLM's real scheduler, behind the gateway's real policies.

    python -m bench.replay TRACE… --sessions 30 --sessions 40 --seed 1 --seed 2 --seed 3
    python -m bench.replay --real

Needs vLLM (`make test-engine` installs it into .venv-engine); no GPU, no model. Prints a table and
what it means, writes JSON and a plot. The second runs real vLLM on the CPU behind the real gateway
(`real`).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.engine.roofline import DENSE_32B, Roofline
from bench.replay import report, traces
from bench.replay.answer import answer
from bench.replay.forecasts import by_class, oracle
from bench.replay.sample import SAMPLE
from bench.replay.traces import BLOCK_TOKENS
from gateway.analysis import capacity

RESULTS = Path(__file__).resolve().parents[1] / "results"
KV_TOKENS = 700_000
POLICIES = {
    "stock": "vLLM behind round robin",
    "affinity": "vLLM behind session affinity",
    "paper": "patched vLLM (order and eviction by forecast) behind session affinity",
    "unpatched": "CacheWise with vLLM as it is",
    "cachewise": "CacheWise with the patch",
    "oracle": "CacheWise with the patch and perfect forecasts",
}
ABLATIONS = {
    "no-hints": "patched vLLM behind session affinity, no hints",
    "paper-oracle": "paper with perfect forecasts",
}
REAL = ("stock", "cachewise")
WORKING_SETS = 2.5
"""What the sessions need, over what the pods' caches hold, with `--real`."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    help="Replay sessions under each policy: in virtual time through vLLM's scheduler, or with"
    " --real in real time through whole vLLM servers on the CPU."
)
def main(
    trace: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Traces of any format: files, or directories to look through; the made-up sample"
            " without.",
            metavar="PATH…",
        ),
    ] = None,
    sessions: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Concurrent sessions a pod; may be repeated. Half, all and twice of what fits,"
            " --real: 6.",
        ),
    ] = None,
    pods: Annotated[int | None, typer.Option(min=1, max=64, help="1, --real: 2.")] = None,
    seed: Annotated[list[int], typer.Option(help="May be repeated.")] = [1],  # noqa: B006
    policy: Annotated[list[str] | None, typer.Option(help=", ".join(POLICIES | ABLATIONS))] = None,
    model: Annotated[
        str | None, typer.Option(help=f"{', '.join(m.name for m in capacity.MODELS)}; or a part.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help=f"{', '.join(g.name for g in capacity.GPUS)}; or a part.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, max=64, help="Of a pod.")] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(min=1024, help="Of a pod's KV cache. What model and GPUs leave; 700,000."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Path of the results, without suffix.")] = None,
    real: Annotated[
        bool, typer.Option("--real", help="Real vLLM, real time, scaled down.")
    ] = False,
    tokens_by: Annotated[float, typer.Option(min=1, help="--real: divides lengths.")] = 20.0,
    gaps_by: Annotated[float, typer.Option(min=1, help="--real: divides gaps.")] = 10.0,
    turns: Annotated[int, typer.Option(min=2, help="--real: of a session, at most.")] = 6,
) -> None:
    """Replay sessions under each policy."""
    trace = trace or [SAMPLE]
    if real:
        replay_real(
            trace,
            (sessions or [6])[-1],
            pods or 2,
            seed[-1],
            policy or list(REAL),
            out or RESULTS / "replay-real",
            (tokens_by, gaps_by, turns),
        )
        return
    fleet = fleet_of(model, gpu, gpus, kv_tokens, pods or 1)
    replay_virtually(
        trace, sessions or [], fleet, seed, policy or list(POLICIES), out or RESULTS / "replay"
    )


@dataclass(frozen=True)
class Fleet:
    """The pods of a replay."""

    name: str
    pods: int
    kv_tokens: int
    roofline: Roofline


def fleet_of(
    model: str | None, gpu: str | None, gpus: int | None, kv_tokens: int | None, pods: int
) -> Fleet:
    """Without a model and GPUs that of the published figures."""
    if model is None and gpu is None and gpus is None:
        return Fleet(capacity.USUAL.name, pods, kv_tokens or KV_TOKENS, DENSE_32B)
    least_tokens = traces.MAX_PROMPT_TOKENS if kv_tokens is None else 0
    try:
        pod = capacity.pod_of(model, gpu, gpus, least_tokens)
    except ValueError as error:
        fail(str(error))
    return Fleet(pod.name, pods, kv_tokens or pod.kv_tokens, Roofline.of(pod))


def loads(pieces: list[traces.Session], fleet: Fleet) -> list[int]:
    """Half as many sessions a pod as fit, as many, and twice as many, as far as there are so many:
    of a session counts what its turns' prompts hold on average."""
    tokens = fmean(BLOCK_TOKENS * fmean(len(turn.blocks) for turn in piece) for piece in pieces)
    fit = fleet.kv_tokens / tokens
    most = len(pieces) // fleet.pods
    wanted = dict.fromkeys(max(1, round(fit * part)) for part in (0.5, 1, 2))
    return [n for n in wanted if n <= most] or [most]


def replay_virtually(
    trace: list[Path],
    sessions: list[int],
    fleet: Fleet,
    seed: list[int],
    policy: list[str],
    out: Path,
) -> None:
    """In virtual time, through vLLM's scheduler and block pool."""
    pods, kv_tokens = fleet.pods, fleet.kv_tokens
    pieces = prepare(trace, policy, POLICIES | ABLATIONS, max(sessions, default=1) * pods)
    sessions = sessions or loads(pieces, fleet)
    longest = max(
        BLOCK_TOKENS * len(turn.blocks) + turn.output_tokens for piece in pieces for turn in piece
    )
    if longest > kv_tokens:
        fail(f"--kv-tokens {kv_tokens}: the longest turn alone needs {longest:,}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.disable(logging.WARNING)
    from bench.replay.world import Setup, World

    by_gap_class = by_class(pieces)
    setups = {
        "stock": Setup("stock", "round_robin", "off", False, None),
        "affinity": Setup("affinity", "session_hash", "off", False, None),
        "paper": Setup("paper", "session_hash", "off", True, by_gap_class),
        "paper-oracle": Setup("paper-oracle", "session_hash", "off", True, oracle),
        "no-hints": Setup("no-hints", "session_hash", "off", True, None),
        "unpatched": Setup("unpatched", "expected_ttft", "enforce", False, by_gap_class),
        "cachewise": Setup("cachewise", "expected_ttft", "enforce", True, by_gap_class),
        "oracle": Setup("oracle", "expected_ttft", "enforce", True, oracle),
    }
    console = Console(width=200 if not sys.stdout.isatty() else None)
    rows: list[dict[str, Any]] = []
    gc.freeze()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("turns"),
        TimeElapsedColumn(), console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        for per_pod in sessions:
            for number in seed:
                chosen = traces.sample(pieces, per_pod * pods, number)
                turns = sum(len(session) for session in chosen)
                for name in policy:
                    task = progress.add_task(f"{name}, {per_pod} a pod, seed {number}", total=turns)

                    def advance(n: int, task: Any = task) -> None:
                        progress.advance(task, n)

                    started = time.process_time()
                    world = World(chosen, setups[name], pods, kv_tokens, advance, fleet.roofline)
                    outcome = world.run()
                    progress.remove_task(task)
                    rows.append(
                        {"policy": name, "per_pod": per_pod, "pods": pods, "seed": number}
                        | report.figures(outcome)
                        | {"ran_s": time.process_time() - started}
                    )
    report.compare(rows, "stock")
    title = f"{pods} pod{'s' * (pods > 1)} of {kv_tokens:,} tokens, {len(seed)} seed(s)"
    console.print(report.table(rows, f"{fleet.name}: {title}"))
    said = answer(rows)
    about = {"pod": fleet.name, "pods": pods, "kv_tokens": kv_tokens, "sessions": len(pieces)}
    results = {"answer": said, "fleet": about, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    report.plot(rows, out.with_suffix(".png"), said)
    console.print(f"written: {out.with_suffix('.json')}, {out.with_suffix('.png')}")
    console.print(said, highlight=False)


def replay_real(
    trace: list[Path],
    sessions: int,
    pods: int,
    seed: int,
    policy: list[str],
    out: Path,
    scaling: tuple[float, float, int],
) -> None:
    """In real time, through vLLM servers on the CPU behind `cachewise serve`."""
    from bench.replay.scaled import kv_tokens as cache_for
    from bench.replay.scaled import scale

    tokens_by, gaps_by, turns = scaling
    allowed = ("stock", "affinity", "unpatched", "cachewise")
    pieces = prepare(trace, policy, allowed, sessions * pods)
    from bench.replay import real
    from tests.engine.pods import BLOCK_SIZE_TOKENS

    chosen = [
        scale(piece, tokens_by, gaps_by, turns)
        for piece in traces.sample(pieces, sessions * pods, seed)
    ]
    kv_tokens = cache_for(chosen, pods, WORKING_SETS, BLOCK_SIZE_TOKENS)
    load = real.Load(chosen, pods, kv_tokens)
    console = Console(width=200 if not sys.stdout.isatty() else None)
    rows: list[dict[str, Any]] = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("turns"),
        TimeElapsedColumn(), console=Console(stderr=True),
    ) as progress:  # fmt: skip
        for name in policy:
            task = progress.add_task(name, total=sum(map(len, chosen)))

            def advance(task: Any = task) -> None:
                progress.advance(task)

            def say(text: str, task: Any = task) -> None:
                progress.update(task, description=text)

            rows.append(real.run(load, name, advance, say))
    real.compare(rows)
    about = real.describe(load, tokens_by, gaps_by)
    title = (
        f"{pods} x vLLM of {kv_tokens:,} KV tokens, {about['sessions']} sessions of"
        f" {about['working_set_tokens']:,} tokens, {about['cpus']} cores"
    )
    console.print(real.table(rows, title))
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {"load": about | {"seed": seed}, "policies": rows}
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    real.plot(rows, out.with_suffix(".png"))
    console.print(f"written: {out.with_suffix('.json')}, {out.with_suffix('.png')}")


def prepare(
    trace: list[Path], policy: list[str], allowed: Iterable[str], needed: int
) -> list[traces.Session]:
    """The traces' sessions; ends the program where policy, vLLM or sessions are missing."""
    unknown = [name for name in policy if name not in allowed]
    if unknown:
        fail(f"--policy {unknown[0]}: allowed are {', '.join(allowed)}")
    if find_spec("vllm") is None:
        fail(
            "it runs vLLM's own scheduler, and vLLM is not installed: `make test-engine` puts it"
            " into .venv-engine, or pip install 'cachewise-gateway[engine-cpu,analyze]' (no GPU is"
            " needed)"
        )
    if find_spec("matplotlib") is None:
        fail("it draws with matplotlib: pip install 'cachewise-gateway[analyze]'")
    try:
        pieces = traces.load(trace)
    except traces.TraceError as error:
        fail(str(error))
    if len(pieces) < needed:
        more = (
            f"; `cachewise trace synthesize --like {trace[0]} --sessions {4 * needed} --out FILE`"
            " makes more like them"
        )
        fail(
            f"{len(pieces)} sessions of at least {traces.MIN_TURNS} turns without a wait over"
            f" {traces.MAX_GAP_S:.0f} s in the traces, {needed} are needed (--sessions x --pods)"
            f"{more if pieces else ''}"
        )
    return pieces


def fail(message: str) -> NoReturn:
    print(f"replay: {message}", file=sys.stderr)
    raise SystemExit(2)


def run(arguments: list[str] | None = None, name: str | None = None) -> NoReturn:
    """The command. Its process ends at once: triton, which vLLM loads, would else list its own
    objects on the terminal."""
    status: Any = 0
    try:
        app(arguments, prog_name=name)
    except SystemExit as ended:
        status = ended.code
    if "triton" not in sys.modules or not isinstance(status, int | None):
        raise SystemExit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    run()
