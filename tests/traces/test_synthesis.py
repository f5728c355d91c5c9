"""Sessions made like those of a trace: that they are sessions, and how like they are."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.replay import traces as replayed
from bench.replay.sample import SAMPLE
from gateway.analysis import likeness
from gateway.analysis.reuse import reuse
from gateway.analysis.timeline import timeline
from gateway.trace_commands import Target
from gateway.traces import mooncake, synthesis
from gateway.traces.load import load
from gateway.traces.session import Call, Session, Turn
from gateway.traces.synthesis import Synthesizer
from tests.traces.sessions import chains, sessions

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def made_of(source: list[Session], count: int, seed: int = 1, **more: Any) -> list[Session]:
    return [s for family in Synthesizer(source, seed, **more).families(count) for s in family]


# -- what is made is a trace ---------------------------------------------------------------------


@settings(max_examples=80)
@given(sessions() | sessions(shared=True) | sessions(started_at=5.0), st.integers(0, 3))
def test_of_any_trace_valid_sessions_are_made(source: list[Session], seed: int) -> None:
    made = made_of(source, 6, seed)
    assert len(made) == 6
    assert made == made_of(source, 6, seed), "the same for the same seed"
    longest = max(turn.prompt_tokens for session in source for turn in session.turns)
    for session in made:
        prompts = chains(session)
        assert session.turns[0].shared == 0
        for k, (turn, prompt) in enumerate(zip(session.turns, prompts, strict=True)):
            assert 1 <= turn.back <= max(1, k)
            assert turn.shared <= (len(prompts[k - turn.back]) if k else 0)
            assert len(prompt) == turn.shared + turn.fresh_blocks
            whole, rest = divmod(turn.prompt_tokens, session.block_tokens)
            assert len(prompt) in (max(1, whole), whole + (rest > 0))
            assert len(set(prompt)) == len(prompt)
            assert 1 <= turn.prompt_tokens <= longest
            assert turn.output_tokens >= 1
        for before, turn in pairwise(session.turns):
            ended_s = before.at_s + (before.api_s or 0.0)
            assert turn.at_s >= ended_s + turn.gap_s - 0.002
    starts = [session.started_at or 0.0 for session in made]
    assert starts == sorted(starts)
    assert starts[0] == 0.0


@settings(max_examples=30)
@given(sessions())
def test_sessions_share_nothing_where_the_trace_shows_nothing_shared(
    source: list[Session],
) -> None:
    made = made_of(source, 5)
    ids = [set(chain.from_iterable(chains(session))) for session in made]
    assert sum(map(len, ids)) == len(set().union(*ids))


def varied(count: int = 120, seed: int = 1) -> list[Session]:
    """Sessions that differ: each with its own pace, tool, length of outputs and room; waits of
    people after answers, compactions where the room ends."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        session = Session(f"v{number}", started_at=1e9 + 60.0 * number, scope="all")
        pace, wordy = rng.gauss(0, 1.5), rng.gauss(5, 1)
        room, tool = rng.choice((60_000, 120_000)), rng.choice(("Bash", "Read"))
        head = 100 if tool == "Bash" else 150
        base, now_s = 10_000_000 * (number + 1), 0.0
        tokens, shared, previous = int(rng.uniform(15_000, 30_000)), 0, 0
        human = False
        for k in range(int(rng.lognormvariate(3.4, 0.6)) + 1):
            gap_s = round(rng.lognormvariate(4.5 if human else pace, 0.7), 3) if k else 0.0
            blocks = tokens // 64
            fresh: tuple[int, ...] = (base, blocks - shared)
            if not k:
                fresh = (1_000 if tool == "Bash" else 2_000, head, base, blocks - head)
            base += blocks
            output = int(rng.lognormvariate(wordy, 0.5)) + 1
            human = rng.random() < 0.1
            now_s = round(now_s + gap_s, 3)
            session.turns.append(
                Turn(
                    now_s, tokens, output, shared, fresh if fresh[-1] else (),
                    gap_s=gap_s, api_s=2.0,
                    idle_kind="human" if human else "tool",
                    calls=() if human else (Call("shell", tool, duration_s=gap_s),),
                )
            )  # fmt: skip
            now_s += 2.0
            previous, tokens = blocks, tokens + output + int(rng.expovariate(1 / 1_500))
            shared = previous
            if tokens > room:
                tokens, shared = tokens // 4, head
        found.append(session)
    return found


def test_what_sessions_share_at_their_beginnings_stays_shared() -> None:
    source = varied()
    made = made_of(source, 120)

    def first_from_others(found: list[Session]) -> float:
        seen = reuse(found, timeline(found).sent)
        return seen.first_from_others_tokens / seen.first_prompt_tokens

    assert first_from_others(source) > 0.2
    assert first_from_others(made) == pytest.approx(first_from_others(source), abs=0.03)
    assert len({chains(session)[0][0] for session in made}) == 2


def test_no_session_is_copied_and_no_long_run_of_one() -> None:
    source = varied(30)
    names = iter(range(10**6))
    for session in source:
        session.turns = [
            replace(turn, calls=(Call("shell", f"t{next(names)}", duration_s=1.0),))
            for turn in session.turns
        ]
    told = [[turn.calls[0].tool for turn in session.turns] for session in source]
    place = {tool: (i, k) for i, tools in enumerate(told) for k, tool in enumerate(tools)}
    for session in made_of(source, 200):
        tools = [turn.calls[0].tool for turn in session.turns]
        assert tools not in told or len(tools) == 1
        run = 0
        for before, tool in pairwise(tools):
            i, k = place[before]
            run = run + 1 if place[tool] == (i, k + 1) else 0
            assert run <= max(1, len(told[i]) // 2)


def test_sub_agents_come_where_they_came_and_are_named_by_the_call() -> None:
    source = []
    for number in range(8):
        root = Session(f"r{number}", started_at=100.0 * number, scope=f"r{number}")
        child = Session(
            f"r{number}/a", parent=root.id, agent_type="Explore", scope=root.id,
            started_at=100.0 * number + 1.5, start_s=1.5,
        )  # fmt: skip
        root.turns = [
            Turn(0.0, 640, 10, fresh=(0, 10), api_s=1.0, idle_kind="tool",
                 calls=(Call("agent", "Task", duration_s=4.0, child=child.id),)),
            Turn(5.0, 704, 10, shared=10, fresh=(10, 1), gap_s=4.0, api_s=1.0),
        ]  # fmt: skip
        child.turns = [
            Turn(0.0, 320, 5, fresh=(100, 5), api_s=1.0, idle_kind="tool"),
            Turn(1.5, 384, 5, shared=5, fresh=(105, 1), gap_s=0.5, api_s=1.0),
        ]
        source += [root, child]
    families = list(Synthesizer(source, 1).families(20))
    for root, child in families:
        assert (child.parent, child.agent_type) == (root.id, "Explore")
        assert root.scope == child.scope == root.id
        asked, after = root.turns
        assert [call.child for call in asked.calls] == [child.id]
        assert asked.at_s <= child.start_s
        assert child.start_s + child.ends_s <= after.at_s + 0.01, "it was waited for"
        assert root.started_at is not None
        assert child.started_at == pytest.approx(root.started_at + child.start_s)


def test_sub_agents_of_sub_agents_end_and_rings_and_orphans_are_sessions_of_their_own() -> None:
    def session(name: str, parent: str | None, scope: str = "s") -> Session:
        found = Session(name, parent=parent, scope=scope, agent_type="a" if parent else "")
        found.turns = [Turn(0.0, 640, 1, fresh=(0, 10)), Turn(9.0, 640, 1, shared=10, gap_s=9.0)]
        return found

    nested = [session("r", None), *(session(f"r{i}", "r") for i in range(3))]
    nested += [session(f"r{i}{k}", f"r{i}") for i in range(3) for k in range(2)]
    sizes = [len(family) for family in Synthesizer(nested).families(5)]
    assert all(1 < size <= 40 for size in sizes)
    strange = [session("x", "y", ""), session("y", "x", ""), session("z", "gone", "")]
    strange.append(session("self", "self", ""))
    families = list(Synthesizer(strange).families(8))
    assert [len(family) for family in families] == [1] * 8
    assert all(made.parent is None for (made,) in families)


# -- likeness ------------------------------------------------------------------------------------


def limit(row: likeness.Row) -> float:
    """How far what was made may be from its source."""
    if row.chance is not None:  # a tool's calls are of few sessions
        return max(0.07, (2.0 if row.name.startswith("duration") else 1.1) * row.chance)
    if "broken" in row.name:
        return 0.003 + 0.3 * row.source
    return 0.1 if "correlation" in row.name else 0.08 if "hits" in row.name else 0.03


def unlike(source: list[Session], made: list[Session]) -> list[str]:
    rows = likeness.compare(source, made)
    assert sum(row.kind == "distribution" for row in rows) >= 8
    assert sum("hits" in row.name for row in rows) >= 6
    return [f"{r.name}: {r.distance:.3f}" for r in rows if r.distance > limit(r)]


TRACES: list[tuple[str, Callable[[], list[Session]]]] = [
    ("made-up", lambda: load([SAMPLE]).sessions),
    ("varied", varied),
    ("kv-cache-tester", lambda: load([DATA / "weka-dev.jsonl.gz"]).sessions),
    (
        "turns",
        lambda: load([DATA / f"tool-{part}-dev.jsonl.gz" for part in ("turns", "calls")]).sessions,
    ),
]


@pytest.fixture(params=TRACES, ids=[name for name, _ in TRACES])
def source(request: pytest.FixtureRequest) -> list[Session]:
    name, read = request.param
    if name in ("kv-cache-tester", "turns") and not DATA.exists():
        pytest.skip("the data folder is not there")
    return [session for session in read() if session.turns]


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_made_is_like_its_source(source: list[Session], seed: int) -> None:
    count = sum(session.parent is None for session in source)
    assert not unlike(source, made_of(source, count, seed))


def independent(
    pool: Any, mother: int, length: int, prompts: Any, rng: random.Random
) -> Iterator[tuple[int, int]]:
    """Every turn drawn by itself."""
    for k in range(length):
        step = rng.choice([i for i in rng.choices(range(len(pool._all)), k=500)
                           if pool._last[i] == (k + 1 == length)])  # fmt: skip
        owner = pool._owner[step]
        yield owner, step - pool.starts[pool.place[owner]]


def test_independent_turns_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    source = varied()
    monkeypatch.setattr(synthesis._Pool, "walk", independent)
    found = unlike(source, made_of(source, len(source)))
    assert any(name.startswith("wait, mean of a session") for name in found)
    assert any(name.startswith("output, mean of a session") for name in found)
    assert any(name.startswith("correlation of a wait and the next") for name in found)


@pytest.mark.parametrize(
    ("by_kind", "missed"), [(False, "wait: tool"), (True, "wait, mean of a session")]
)
def test_shuffled_waits_are_found_out(by_kind: bool, missed: str) -> None:
    source = varied()
    made = made_of(source, len(source))
    waits: dict[Any, list[float]] = {}
    pairs = [(a, b) for session in made for a, b in pairwise(session.turns)]
    for before, turn in pairs:
        waits.setdefault(by_kind and before.idle_kind, []).append(turn.gap_s)
    for values in waits.values():
        random.Random(1).shuffle(values)
    for session in made:
        session.turns = session.turns[:1] + [
            replace(turn, gap_s=waits[by_kind and before.idle_kind].pop())
            for before, turn in pairwise(session.turns)
        ]
    assert any(name.startswith(missed) for name in unlike(source, made))


def test_broken_prefixes_that_are_left_out_are_found_out() -> None:
    source = varied()
    made = made_of(source, len(source))
    for session in made:
        grown = session.turns[:1]
        for turn in session.turns[1:]:
            tokens = max(turn.prompt_tokens, grown[-1].prompt_tokens)
            had = sum(len(g.fresh) and g.fresh_blocks for g in grown)
            fresh = (10**12 + had, max(0, tokens // 64 - had)) if tokens // 64 > had else ()
            grown.append(replace(turn, prompt_tokens=tokens, shared=had, fresh=fresh, back=1))
        session.turns = grown
    found = unlike(source, made)
    assert any(name.startswith("prompt:") for name in found)
    assert any(name.startswith("broken prefixes") for name in found)


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_the_distance_is_that_of_kolmogorov_and_smirnov(a: list[int], b: list[int]) -> None:
    apart = [
        abs(sum(v <= x for v in a) / len(a) - sum(v <= x for v in b) / len(b)) for x in range(10)
    ]
    assert likeness.distance(a, b) == pytest.approx(max(apart))


# -- starts, memory, the command -----------------------------------------------------------------


def test_starts_are_as_dense_as_in_the_trace_or_as_many_at_once_as_asked_for() -> None:
    source = varied()
    made = made_of(source, 200)
    assert (made[-1].started_at or 0.0) / 199 == pytest.approx(60.0, rel=0.01)
    seated = made_of(source, 200, seats=5)
    changes = sorted(
        (at, by)
        for s in seated
        for at, by in ((s.started_at or 0.0, 1), ((s.started_at or 0.0) + s.ends_s - 1e-3, -1))
    )
    alive = most = 0
    for _, by in changes:
        alive += by
        most = max(most, alive)
    assert most == 5


def test_no_more_sessions_are_held_than_go_on_at_the_same_time() -> None:
    taken = 0

    def counted() -> Iterator[Session]:
        nonlocal taken
        for (session,) in Synthesizer(varied(), seats=4).families(10**9):
            taken += 1
            yield session

    lines = [json.loads(line) for line in islice(mooncake.dump_in_order(counted()), 500)]
    assert [line["timestamp"] for line in lines] == sorted(line["timestamp"] for line in lines)
    assert taken <= len({line["session_id"] for line in lines}) + 5


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "gateway.cli", "trace", "synthesize", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("to", Target)
def test_the_command_writes_what_the_others_read(tmp_path: Path, to: Target, suffix: str) -> None:
    out = tmp_path / f"out.jsonl{suffix}"
    asked = ["--like", str(SAMPLE), "--sessions", "50", "--to", to, "--seed", "3"]
    done = command(*asked, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "turns a session" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("written: 50 sessions with ")
    found = {session.id: session for session in load([out]).sessions}
    wanted = {session.id: session for session in made_of(load([SAMPLE]).sessions, 50, 3)}
    assert set(found) == set(wanted)
    for key, session in wanted.items():
        assert [len(ids) for ids in chains(found[key])] == [len(ids) for ids in chains(session)]
        for there, turn in zip(found[key].turns, session.turns, strict=True):
            assert there.prompt_tokens == turn.prompt_tokens
            assert there.output_tokens == turn.output_tokens
            assert math.isclose(there.gap_s, turn.gap_s, abs_tol=1e-3)
            assert (there.shared, there.back) == (turn.shared, turn.back)
    assert len(replayed.load([out])) > 40


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = command("--like", str(tmp_path / "no"), "--sessions", "1", "--out", str(tmp_path / "o"))
    assert done.returncode == 2
    assert "no: there is no such file or directory" in done.stderr
    (tmp_path / "empty.jsonl").write_text("{}")
    done = command("--like", str(tmp_path), "--sessions", "1", "--out", str(tmp_path / "o"))
    assert "no session of a known format" in done.stderr
    done = command("--like", str(SAMPLE), "--sessions", "1", "--out", str(tmp_path / "a" / "b"))
    assert done.returncode == 2
    assert "--out: " in done.stderr
