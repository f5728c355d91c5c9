"""``cachewise trace``: carry recorded sessions into other formats, make more like them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        typer.Option(help="The file to write, packed if it ends in .gz or .zst; for"
                     " kv-cache-tester the directory."),
    ],
) -> None:  # fmt: skip
    """Write traces in another format (docs/traces.md says what each can hold)."""
    from gateway.traces.lines import printable

    sessions = _read("convert", path)
    _write([sessions], to, out)
    print(f"written: {len(sessions)} sessions to {printable(out)}")


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
    from gateway.traces.lines import printable
    from gateway.traces.synthesis import Synthesizer

    source = [session for session in _read("synthesize", like) if session.turns]
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
        _write(counted(progress), to, out, in_order=True)
    table = Table(title="How like the trace it is", caption=likeness.CAPTION)
    for name in ("", "trace", "made", "distance", "by chance"):
        table.add_column(name, justify="left" if not name else "right")
    for row in likeness.compare(source, kept):
        table.add_row(*row.cells)
    if table.rows:
        Console().print(table)
    print(f"written: {sessions} sessions with {turns} turns to {printable(out)}")


def _read(command: str, paths: list[Path]) -> list[Session]:
    """The sessions of traces; says what could not be read."""
    from gateway.traces.lines import TraceError
    from gateway.traces.load import load

    try:
        trace = load(paths)
    except TraceError as error:
        raise ConfigError(f"trace {command}: {error}") from None
    trace.problems.tell()
    if not any(session.turns for session in trace.sessions):
        raise ConfigError(f"trace {command}: no session of a known format (docs/traces.md)")
    return trace.sessions


def _write(
    families: Iterable[list[Session]], to: Target, out: Path, in_order: bool = False
) -> None:
    """Writes sessions; those that belong together are of one family. ``in_order``: as
    `gateway.traces.mooncake.dump_in_order` takes them, so that few are held at once."""
    from gateway.traces import cachewise, kv_cache_tester, mooncake
    from gateway.traces.lines import writing

    try:
        if to is Target.kv_cache_tester:
            out.mkdir(parents=True, exist_ok=True)
            texts = (text for family in families for _, text in kv_cache_tester.dump(family))
            for number, text in enumerate(texts, 1):
                (out / f"trace_{number:06}.json").write_bytes(text)
        else:
            requests = mooncake.dump_in_order if in_order else mooncake.dump
            dump = {Target.cachewise: cachewise.dump, Target.mooncake: requests}[to]
            with writing(out) as file:
                for line in dump(chain.from_iterable(families)):
                    file.write(line)
    except OSError as error:
        raise ConfigError(f"--out: {error.filename or out}: {error.strerror}") from None
