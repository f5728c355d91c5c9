"""Recordings on the disk: they follow one another, stay within a bound, and share a directory."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import RecordSettings
from gateway.metrics import Metrics
from gateway.recorder import files, prompts
from gateway.recorder import recorder as module
from gateway.recorder.files import Directory, File
from gateway.recorder.names import Salted, kept_tool
from gateway.recorder.prompts import Prompts
from gateway.recorder.recorder import Recorder
from gateway.traces.cachewise import BLOCK_BYTES, _first
from gateway.traces.load import load
from gateway.traces.session import expand
from tests.recorder.notes import note_of

MIB = 1 << 20


def recordings(path: Path) -> list[Path]:
    return sorted(path.glob(files.PATTERN))


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in recordings(path))


async def test_the_bound_holds_and_what_is_left_are_the_latest_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSHED_RECORDS", 8)
    monkeypatch.setattr(module, "FLUSH_S", 0.01)
    metrics = Metrics()
    recorder = Recorder(RecordSettings(directory=tmp_path, max_bytes=MIB), metrics, 0.0)
    largest = 0
    turns = 600
    async with recorder.running():
        for number in range(turns):
            recorder.keep(note_of(f"s{number}", 0, segments=500))
            if number % 50 == 0:
                while metrics.recorded_turns._value.get() < number:
                    await module.asyncio.sleep(0.01)
                largest = max(largest, size_of(tmp_path))
    assert metrics.recorded_bytes._value.get() > 2 * MIB
    assert MIB // 2 < max(largest, size_of(tmp_path)) <= MIB
    assert len(recordings(tmp_path)) >= 4
    trace = load([tmp_path])
    assert trace.problems.count == 0
    assert 0 < len(trace.sessions) < turns
    latest = Salted((tmp_path / "salt").read_bytes()).session(f"s{turns - 1}")
    assert trace.sessions[-1].id == latest


async def test_two_gateways_in_one_directory_share_names_and_take_nothing_from_one_another(
    tmp_path: Path,
) -> None:
    a, b = (Recorder(RecordSettings(directory=tmp_path), Metrics(), 0.0) for _ in range(2))
    async with a.running(), b.running():
        for number in range(40):
            (a if number % 2 else b).keep(note_of("one", number))
    assert len(recordings(tmp_path)) == 2
    trace = load([tmp_path])
    assert trace.problems.count == 0
    (session,) = trace.sessions
    assert len(session.turns) == 40
    assert [turn.at_s for turn in session.turns] == [10.0 * number for number in range(40)]
    assert all(turn.shared > 0 for turn in session.turns[1:])


def test_a_file_that_is_written_is_no_old_file_to_others(tmp_path: Path) -> None:
    here = Directory(tmp_path, MIB)
    active, done = File(here, 0.0), File(here, 0.0)
    noise = random.Random(1).randbytes(400_000)
    active.flush(noise)
    done.flush(noise)
    done.close()
    here.make_room(MIB - 500_000)
    assert recordings(tmp_path) == [active.path]
    with pytest.raises(OSError, match="used up by files that are written"):
        here.make_room(MIB)
    active.close()
    here.make_room(MIB)
    assert recordings(tmp_path) == []


def test_files_are_for_their_owner_alone_and_so_is_the_salt(tmp_path: Path) -> None:
    here = Directory(tmp_path / "a" / "b", MIB)
    assert here.salt() == here.salt()
    file = File(here, 0.0)
    file.close()
    for path in (file.path, here.path / "salt"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert here.path.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in here.path.iterdir() if "part" in path.name] == []


def test_names_differ_between_directories(tmp_path: Path) -> None:
    salts = [Salted(Directory(tmp_path / name, MIB).salt()) for name in "ab"]
    assert len({salted.session("s") for salted in salts}) == 2
    assert len({salted.block(7) for salted in salts}) == 2
    assert len({salted.tenant(5) for salted in salts}) == 2
    assert salts[0].session("5") != salts[0].tenant(5)


def test_a_damaged_salt_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "salt").write_bytes(b"short")
    with pytest.raises(OSError, match="is not of 32 bytes"):
        Directory(tmp_path, MIB).salt()


def test_a_file_that_cannot_be_written_keeps_what_was_flushed(tmp_path: Path) -> None:
    file = File(Directory(tmp_path, MIB), 0.0)
    file.flush(b'{"a":1}\n')
    size = file.size
    os.close(file._fd)
    file._fd = os.open(file.path, os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.flush(b'{"a":2}\n')
    assert file.path.stat().st_size == size


# -- prompts -------------------------------------------------------------------------------------

SEGMENTS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 1500)), min_size=1, max_size=12)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("ab"), SEGMENTS), min_size=1, max_size=12), st.data())
def test_what_is_shared_and_fresh_makes_up_every_prompt(
    turns: list[tuple[str, list[tuple[int, int]]]], data: st.DataObject
) -> None:
    """Prompts that extend, change and return to one another; some states forgotten in between."""
    salted = Salted(bytes(32))
    kept = Prompts()
    read: dict[str, tuple[int, ...]] = {}
    for sid, segments in turns:
        if data.draw(st.booleans()):
            kept.forget(sid)
        told = kept.of(sid)
        if told is None:
            told, read[sid] = kept.begin(sid, sid), ()
        chain, ends = chained(segments)
        shared, fresh = kept.share(sid, told, chain, ends, salted)
        read[sid] = (*_first(read[sid], shared), *fresh)
        whole = expand(read[sid]).tolist()
        assert len(whole) == -(-ends[-1] // BLOCK_BYTES)
        anew = Prompts()
        _, runs = anew.share("x", anew.begin("x", "x"), chain, ends, salted)
        assert expand(tuple(runs)).tolist() == whole
    assert kept._segments == sum(len(told.chain) for told in kept._told.values())


def chained(segments: list[tuple[int, int]]) -> tuple[prompts.array[int], prompts.array[int]]:
    chain, ends = prompts.array("Q"), prompts.array("I")
    link = end = 0
    for content, size in segments:
        link = hash((link, content, size)) & (1 << 64) - 1
        end += size
        chain.append(link)
        ends.append(end)
    return chain, ends


def test_prompts_are_forgotten_beyond_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    salted = Salted(bytes(32))
    monkeypatch.setattr(prompts, "MAX_SESSIONS", 3)
    monkeypatch.setattr(prompts, "MAX_SEGMENTS", 100)
    kept = Prompts()
    for number in range(10):
        sid = f"s{number}"
        kept.share(sid, kept.begin(sid, sid), *chained([(number, 300)] * 20), salted)
    assert len(kept) == 3
    kept.share("long", kept.begin("long", ""), *chained([(1, 300)] * 90), salted)
    assert len(kept) == 1


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("Bash", "Bash"),
        ("str_replace_based_edit_tool", "str_replace_based_edit_t"),
        ("getWeatherForCity", "getWeatherForCity"),
        ("mcp__github__create_issue", "mcp__github__create_issue"),
        ("mcp__k8s__list", "*"),
        ("qXvKzPtRw", "*"),
        ("antidisestablishmentarianism", "*"),
        ("s3cr3tpassword", "*"),
        ("hunter.Bash2", "*"),
        ("tool_call", "*"),
        ("", "*"),
    ],
)
def test_names_of_tools_are_kept_if_they_are_made_of_words(asked: str, kept: str) -> None:
    from gateway.dialects.turn import ToolCall
    from gateway.predictor.features import features_of

    words, _ = features_of(ToolCall.of("id", asked, '{"name": "abcdefgh"}'))
    assert kept_tool(asked, words.tool) == kept
