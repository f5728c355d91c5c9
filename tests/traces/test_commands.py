"""What the commands `analyze` and `trace` write, and what they say of files they cannot read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.analysis import figures
from gateway.cli import app
from gateway.traces.load import load
from tests.traces.sessions import TURN, jsonl

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMMANDS = {
    "analyze": ["analyze", "{}", "--json", "{}.out"],
    "convert": ["trace", "convert", "{}", "--to", "cachewise", "--out", "{}.out"],
    "synthesize": ["trace", "synthesize", "--like", "{}", "--sessions", "1", "--out", "{}.out"],
}


def cachewise(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway.cli", *words]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False,
        timeout=60, env=os.environ | environment,
    )  # fmt: skip


def of(command: str, path: Path) -> list[str]:
    return [word.format(path) for word in COMMANDS[command]]


# -- files that cannot be read -------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_where_nothing_can_be_read_it_is_said_of_which_file(tmp_path: Path, command: str) -> None:
    path = tmp_path / "t.jsonl.zst"
    path.write_bytes(b"garbage garbage")
    done = cachewise(*of(command, path))
    assert done.returncode == 2
    told, named, error = done.stderr.splitlines()
    assert told == "1 record could not be read:"
    assert named == f"  {path}:1: the file is damaged"
    assert "no session of a known format" in error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("bad", "told"), [(1, "1 record"), (9, "9 records")])
def test_every_command_says_on_stderr_which_records_could_not_be_read(
    tmp_path: Path, command: str, bad: int, told: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(jsonl(TURN) + b"{half a li\n" * bad)
    done = cachewise(*of(command, path))
    assert done.returncode == 0, done.stderr
    named = [f"  {path}:{number}: no JSON" for number in range(2, bad + 2)]
    lines = done.stderr.splitlines()
    assert lines[: 1 + min(bad, 5)] == [f"{told} could not be read:", *named[:5]]
    assert done.stderr.count("no JSON") == min(bad, 5)
    assert "could not be read" not in done.stdout


# -- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["cachewise", "mooncake"])
@pytest.mark.parametrize(
    ("suffix", "magic"),
    [("", b"{"), (".gz", b"\x1f\x8b"), (".zst", b"\x28\xb5\x2f\xfd")],
    ids=["plain", "gzip", "zstd"],
)
def test_what_is_converted_is_packed_by_its_suffix(
    tmp_path: Path, to: str, suffix: str, magic: bytes
) -> None:
    path, out = tmp_path / "t.jsonl", tmp_path / f"out.jsonl{suffix}"
    path.write_bytes(jsonl(TURN, TURN))
    done = cachewise("trace", "convert", str(path), "--to", to, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(magic)
    trace = load([out])
    assert trace.formats == {to: 1}
    assert [len(session.turns) for session in trace.sessions] == [2]


def test_figures_are_json_even_where_one_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "t.jsonl", tmp_path / "r.json"
    path.write_bytes(jsonl(TURN))
    told = {"infinite": float("inf"), "none": float("nan"), "one": 1.5}
    monkeypatch.setattr(figures, "figures", lambda *_: told)
    done = CliRunner().invoke(app, ["analyze", str(path), "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_bytes()) == {"infinite": None, "none": None, "one": 1.5}


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--json", ["analyze", "{}"]),
        ("--markdown", ["analyze", "{}"]),
        ("--html", ["analyze", "{}"]),
        ("--out", ["trace", "convert", "{}", "--to", "mooncake"]),
        ("--out", ["trace", "synthesize", "--like", "{}", "--sessions", "1"]),
    ],
    ids=["json", "markdown", "html", "convert", "synthesize"],
)
def test_a_file_that_cannot_be_written_is_named(
    tmp_path: Path, option: str, words: list[str]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(jsonl(TURN))
    done = cachewise(*(word.format(path) for word in words), option, str(FULL))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"cachewise: {option}: {FULL}: No space left on device"
    assert "Traceback" not in done.stderr


# -- encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [{}, ASCII, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}],
    ids=["usual", "C locale", "latin-1", "ascii"],
)
def test_reports_and_files_do_not_depend_on_the_locale(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(jsonl(TURN | {"agent": "größer–"}))
    printed = cachewise("analyze", str(path), **environment)
    assert printed.returncode == 0, printed.stderr
    assert "What LRU throws away" in printed.stdout
    kinds = ("html", "markdown", "json")
    options = [word for kind in kinds for word in (f"--{kind}", str(tmp_path / kind))]
    done = cachewise("analyze", str(path), *options, **environment)
    assert done.returncode == 0, done.stderr
    for kind in kinds:
        assert "größer–" in (tmp_path / kind).read_bytes().decode("utf-8")
    made = cachewise(*of("synthesize", path), **environment)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("environment", [{}, ASCII], ids=["usual", "C locale"])
def test_a_file_name_that_is_not_utf8_is_escaped(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    request = {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}
    path.write_bytes(jsonl(request) + b"{half a li\n")
    for kind in ("html", "markdown", "json"):
        done = cachewise("analyze", str(path), f"--{kind}", str(tmp_path / kind), **environment)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / kind).read_bytes().decode("utf-8")
        shown = r"caf\\xe9.jsonl:2" if kind == "json" else r"caf\xe9.jsonl:2"
        assert shown in text
        assert r"caf\xe9.jsonl:2" in done.stderr
    for command in ("convert", "synthesize"):
        done = cachewise(*of(command, path), **environment)
        assert done.returncode == 0, done.stderr
        assert r"caf\xe9.jsonl.out" in done.stdout
