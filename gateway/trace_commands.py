"""``cachewise trace``: carry recorded sessions into other formats, make more like them."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gateway.config import ConfigError
from gateway.traces.session import Session

app = typer.Typer(help="Recorded sessions.", no_args_is_help=True)


class Target(StrEnum):
    """Formats that are written."""

    cachewise = "cachewise"
    mooncake = "mooncake"
    kv_cache_tester = "kv-cache-tester"


@app.command("convert")
def convert(
    path: Annotated[list[Path], typer.Argument(help="Traces of any format.", metavar="PATH…")],
    to: Annotated[Target, typer.Option(help="The format to write.")],
    out: Annotated[
        Path,
        typer.Option(help="The file to write; for kv-cache-tester the directory."),
    ],
) -> None:
    """Write traces in another format (docs/traces.md says what each can hold)."""
    from gateway.traces import cachewise, kv_cache_tester, mooncake
    from gateway.traces.lines import TraceError
    from gateway.traces.load import load

    try:
        trace = load(path)
    except TraceError as error:
        raise ConfigError(f"trace convert: {error}") from None
    if not trace.sessions:
        raise ConfigError("trace convert: no session of a known format (docs/traces.md)")
    try:
        if to is not Target.kv_cache_tester:
            dump = mooncake.dump if to is Target.mooncake else cachewise.dump
            with out.open("wb") as file:
                file.writelines(dump(trace.sessions))
        else:
            out.mkdir(parents=True, exist_ok=True)
            for number, (_, text) in enumerate(kv_cache_tester.dump(trace.sessions), 1):
                (out / f"trace_{number:04}.json").write_bytes(text)
    except OSError as error:
        raise ConfigError(f"--out: {error.filename}: {error.strerror}") from None
    print(f"written: {len(trace.sessions)} sessions to {out}")
    if trace.problems.count:
        print(f"{trace.problems.count} records could not be read: {trace.problems.named[0]}, …")


@app.command("synthesize")
def synthesize(
    like: Annotated[
        list[Path],
        typer.Option(help="A trace of any format; may be given again.", metavar="PATH"),
    ],
    sessions: Annotated[int, typer.Option(help="Sessions to make.", min=1, max=1_000_000)],
    out: Annotated[
        Path,
        typer.Option(help="The file to write, packed if it ends in .gz or .zst; for"
                     " kv-cache-tester the directory."),
    ],
    to: Annotated[Target, typer.Option(help="The format to write.")] = Target.cachewise,
    seed: Annotated[int, typer.Option(help="Equal seeds make equal sessions.")] = 1,
    concurrent: Annotated[
        int | None,
        typer.Option(
            help="Sessions at once. As in the trace; 32 if it has no wall-clock times.",
            min=1, max=100_000,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Make sessions like those of a trace, as many as wanted, and say how like they are.

    Holds no more of them in memory than go on at the same time (docs/traces.md).
    """
    from gateway.analysis import likeness
    from gateway.traces.lines import TraceError
    from gateway.traces.load import load
    from gateway.traces.synthesis import Synthesizer

    try:
        source = [session for session in load(like).sessions if session.turns]
    except TraceError as error:
        raise ConfigError(f"trace synthesize: {error}") from None
    if not source:
        raise ConfigError("trace synthesize: no session of a known format (docs/traces.md)")
    synthesizer = Synthesizer(source, seed, concurrent)
    kept: list[Session] = []
    turns = 0

    def counted(progress: Progress) -> Iterator[list[Session]]:
        nonlocal turns
        for family in progress.track(
            synthesizer.families(sessions), sessions, description="sessions"
        ):
            if len(kept) < len(source):
                kept.extend(family)
            turns += sum(len(session.turns) for session in family)
            yield family

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        try:
            _write(counted(progress), to, out)
        except OSError as error:
            raise ConfigError(f"--out: {error.filename or out}: {error.strerror}") from None
    table = Table(title="How like the trace it is", caption=likeness.CAPTION)
    for name in ("", "trace", "made", "distance", "by chance"):
        table.add_column(name, justify="left" if not name else "right")
    for row in likeness.compare(source, kept):
        table.add_row(*row.cells)
    if table.rows:
        Console().print(table)
    print(f"written: {sessions} sessions with {turns} turns to {out}")


def _write(families: Iterator[list[Session]], to: Target, out: Path) -> None:
    """Sessions that come in the order of their starts, one after another."""
    from gateway.traces import cachewise, kv_cache_tester, mooncake
    from gateway.traces.lines import writing

    if to is Target.kv_cache_tester:
        out.mkdir(parents=True, exist_ok=True)
        for number, family in enumerate(families, 1):
            ((_, text),) = kv_cache_tester.dump(family)
            (out / f"trace_{number:06}.json").write_bytes(text)
    else:
        dump = {Target.cachewise: cachewise.dump, Target.mooncake: mooncake.dump_in_order}[to]
        with writing(out) as file:
            for line in dump(chain.from_iterable(families)):
                file.write(line)
