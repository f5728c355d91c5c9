"""``cachewise trace``: carry recorded sessions into other formats."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gateway.config import ConfigError

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
