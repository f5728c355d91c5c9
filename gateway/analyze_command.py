"""``cachewise analyze``: what recorded sessions look like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from gateway.config import ConfigError


def analyze(
    path: Annotated[
        list[Path],
        typer.Argument(help="Traces: files, or directories to look through.", metavar="PATH…"),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write the report as one page.", metavar="FILE")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures.", metavar="FILE")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the report as Markdown.", metavar="FILE")
    ] = None,
    concurrent: Annotated[
        int | None,
        typer.Option(
            help="Lay so many sessions beside one another instead of where they were recorded.",
            min=1,
            max=10_000,
        ),
    ] = None,
) -> None:
    """Show what recorded sessions look like, and what a prefix cache makes of them.

    Reads the gateway's own recordings, transcripts of Claude Code (~/.claude/projects) and Codex
    (~/.codex/sessions), kv-cache-tester sessions, TraceLab rounds, Mooncake traces and turn
    records (docs/traces.md). Without --html, --json and --markdown the report is printed.
    """
    # numpy and what needs it: the other commands do without.
    from gateway.analysis import report
    from gateway.analysis.figures import figures
    from gateway.traces.lines import TraceError, printable
    from gateway.traces.load import files_of, load

    if html is not None:
        try:
            from gateway.analysis.html import page
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise ConfigError(
                "--html: the plots need matplotlib; pip install 'cachewise-gateway[analyze]'"
            ) from None
    errors = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        console=errors, transient=True, disable=not errors.is_terminal,
    ) as progress:  # fmt: skip
        try:
            files = files_of(path)
            size = sum(file.stat().st_size for file in files)
            reading = progress.add_task("reading", total=size or None)
            trace = load(files, lambda read: progress.advance(reading, read))
        except (TraceError, OSError) as error:
            raise ConfigError(f"analyze: {error}") from None
        trace.problems.tell()
        if not any(session.turns for session in trace.sessions):
            names = ", ".join(map(str, path))
            raise ConfigError(
                f"analyze: no session of a known format in {names} ({len(files)} files); known"
                " formats: docs/traces.md"
            )
        turns = sum(len(session.turns) for session in trace.sessions)
        counting = progress.add_task("counting", total=turns)
        found = figures(trace, concurrent, lambda: progress.advance(counting))
        if json_file is not None:
            # orjson: where JSON has no such number, as of nan, it writes null.
            layout = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
            _write("--json", json_file, orjson.dumps(found, option=layout))
        if markdown is not None:
            _write("--markdown", markdown, report.markdown(found).encode())
        if html is not None:
            progress.add_task("drawing", total=None)
            _write("--html", html, page(found).encode())
    written = [printable(file) for file in (json_file, markdown, html) if file is not None]
    if written:
        print("written: " + ", ".join(written))
    else:
        Console().print(Markdown(report.markdown(found)))


def _write(option: str, file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{option}: {file}: {error.strerror}") from None
