"""What is kept on disk: whole or not at all, and nobody's secrets."""

import io
import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.dialects.turn import ToolCall
from gateway.predictor import Context, Predictor, store
from gateway.predictor.store import Snapshot, load, merge
from gateway.predictor.table import STATS, N
from tests.predictor.test_shell import LEAKY, SECRETS
from tests.yardstick import cpu_s, plain_python_s


def taught() -> Predictor:
    predictor = store.priors()
    call = ToolCall.of("", "Bash", '{"command": "just zap"}')
    for number in range(40):
        forecast = predictor.forecast([call], "tool", Context(number // 10, "acme", "codex"))
        predictor.observe(forecast, 77.0, [76.8])
    return predictor


CALL = ToolCall.of("", "Bash", '{"command": "just zap"}')


def test_what_was_learned_survives(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "forecast.npz"
    before = taught()
    Snapshot(before).write(path)
    after = load(path)
    new = Context("another", "acme", "codex")
    wanted, found = (p.forecast([CALL], "tool", new) for p in (before, after))
    assert found.median_s == pytest.approx(wanted.median_s, rel=0.02)
    assert found.p_return == pytest.approx(wanted.p_return)
    assert found.offset_s == pytest.approx(wanted.offset_s)
    assert after.observed_total == 40
    assert after.correction is not None
    assert [each.name for each in path.parent.iterdir()] == ["forecast.npz"]
    assert path.stat().st_mode & 0o077 == 0


def test_sessions_are_not_kept(tmp_path: Path) -> None:
    before = taught()
    sessions = sum(not isinstance(key, tuple) for key, _ in before.table)
    Snapshot(before).write(tmp_path / "s")
    after = store.read(tmp_path / "s")
    assert sessions > 0
    assert len(after.table) == len(before.table) - sessions


def unpacked(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return b"\n".join(archive.read(name) for name in archive.namelist())


def test_no_byte_of_a_secret_reaches_the_file(tmp_path: Path) -> None:
    predictor = store.priors()
    for secret in SECRETS:
        for command in LEAKY:
            text = command.replace("{s}", secret)
            for call in (
                ToolCall.of("", "Bash", json.dumps({"command": text, "description": secret})),
                ToolCall.of("", "exec_command", json.dumps({"cmd": text, "workdir": secret})),
                ToolCall.of("", "Edit", json.dumps({"file_path": secret, "new_string": text})),
                ToolCall.of("", "Agent", json.dumps({"subagent_type": secret, "prompt": text})),
                ToolCall.of("", "Skill", json.dumps({"skill": secret})),
                ToolCall.of("", "bash", text),
            ):
                forecast = predictor.forecast([call], "tool", Context(secret, "acme"))
                predictor.observe(forecast, 1.0)
    path = tmp_path / "state"
    Snapshot(predictor).write(path)
    kept = unpacked(path).lower()
    for secret in SECRETS:
        assert secret.lower().encode() not in kept


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: b"", "corrupt"),
        (lambda data: data[: len(data) // 2], "corrupt"),
        (lambda data: b"\x00" * len(data), "corrupt"),
        (lambda data: data[:200] + b"\xff" * 64 + data[264:], "corrupt"),
        (lambda data: b"PK\x03\x04" + b"junk" * 100, "corrupt"),
    ],
)
def test_a_damaged_file_is_set_aside_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, word: str
) -> None:
    path = tmp_path / "forecast.npz"
    Snapshot(taught()).write(path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING, "gateway.predictor"):
        predictor = load(path)
    assert predictor.forecast([CALL], "tool", Context("s")).median_s > 0
    assert "set aside" in caplog.text
    aside = [each.name for each in tmp_path.iterdir()]
    assert len(aside) == 1
    assert word in aside[0]


def rewritten(path: Path, change: object) -> None:
    with np.load(path) as arrays:
        parts = dict(arrays)
    header = orjson.loads(parts["header"].tobytes())
    change(header, parts)  # type: ignore[operator]
    parts["header"] = np.frombuffer(orjson.dumps(header), np.uint8)
    out = io.BytesIO()
    np.savez(out, **parts)
    path.write_bytes(out.getvalue())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda header, parts: header.update(format=99), "newer"),
        (lambda header, parts: header.update(keys=[]), "corrupt"),
        (lambda header, parts: header.update(keys=[3] * len(header["keys"])), "corrupt"),
        (lambda header, parts: header.update(edges_s=[1.0]), "corrupt"),
        (lambda header, parts: header.pop("returns"), "corrupt"),
        (lambda header, parts: header.update(warps={"shell": [1]}), "corrupt"),
        (lambda header, parts: parts.update(stats=parts["stats"] * np.nan), "corrupt"),
        (lambda header, parts: parts.update(counts=-parts["counts"] - 1), "corrupt"),
        (lambda header, parts: parts.pop("counts"), "corrupt"),
    ],
)
def test_a_newer_or_wrong_file_is_set_aside(tmp_path: Path, change: object, word: str) -> None:
    path = tmp_path / "forecast.npz"
    Snapshot(taught()).write(path)
    rewritten(path, change)
    assert load(path).observed_total == 0
    assert [word in each.name for each in tmp_path.iterdir()] == [True]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_damage_makes_loading_raise(data: st.DataObject, tmp_path_factory: object) -> None:
    blob = bytearray(STATE)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at : at + 4] = data.draw(st.binary(max_size=8))
    path = tmp_path_factory.mktemp("fuzz") / "state"  # type: ignore[attr-defined]
    path.write_bytes(bytes(blob))
    assert load(path).forecast([CALL], "tool", Context("s")).median_s > 0


STATE = Snapshot(taught()).dump()


def test_a_state_that_cannot_be_read_or_moved_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "is-a-folder").mkdir()
    assert load(tmp_path / "is-a-folder").observed_total == 0
    assert load(tmp_path / "missing").observed_total == 0


def test_a_hundred_thousand_nodes_load_within_a_second(tmp_path: Path) -> None:
    predictor = Predictor()
    for number in range(100_000):
        row = predictor.table.touch(("sub", "Bash", f"program{number}", "sub"))
        predictor.table.data[row, N] = 1
        predictor.table.data[row, STATS + 3] = 1
    path = tmp_path / "state"
    Snapshot(predictor).write(path)
    assert len(store.read(path).table) == 100_000
    assert cpu_s(lambda: store.read(path), times=3) < 1000 * plain_python_s()


def test_two_states_merge() -> None:
    one, other = taught(), taught()
    key = ("sub", "Bash", "just", "zap")
    row = one.table.touch(key)
    one.table.normalise(row)
    weight = float(one.table.stats[row, N])
    merge(one, other)
    assert float(one.table.stats[row, N]) == pytest.approx(2 * weight)
    assert one.observed_total == 80
