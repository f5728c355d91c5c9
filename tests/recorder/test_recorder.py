"""The recorder in a real gateway: what is recorded, what never is, and what may go wrong."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.replay import traces as replay
from gateway.config import ConfigError, RecordSettings, Settings
from gateway.gateway import Gateway
from gateway.metrics import Metrics
from gateway.recorder import files
from gateway.recorder import recorder as module
from gateway.recorder.recorder import Recorder
from gateway.traces.load import load
from gateway.traces.session import Session
from tests.recorder.agents import Agent, recording, texts, written
from tests.recorder.notes import note_of
from tests.served import body_of, logged, until

BASH = {"name": "Bash", "arguments": {"command": "cd /src && pytest -q tests", "timeout": 60_000}}
READ = {"name": "Read", "arguments": {"file_path": "/src/app.py"}}
ROOT = Path(__file__).parents[2]


def chains(session: Session) -> list[list[int]]:
    return [chain.tolist() for chain in session.chains()]


def close(blocks: int, tokens: int, of: int) -> bool:
    """Whether blocks are so many tokens, as well as bytes can tell tokens in a prompt."""
    return abs(64 * blocks - tokens) <= 128 + 0.04 * of


# -- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["chat", "messages"])
async def test_what_was_sent_is_what_is_imported(tmp_path: Path, wire: str) -> None:
    async with recording(tmp_path) as gateway:
        agent = Agent(gateway, "one", wire, task="Fix the build. " * 300)
        for k in range(12):
            calls = [BASH, READ] if k % 3 == 1 else [BASH]
            durations = {"x-claude-code-prev-tool-durations": "Bash=40"} if k % 3 == 1 else {}
            await agent.turn(calls, **durations)
            await asyncio.sleep(0.03 * (k % 3))
            agent.results(*(f"line {k} of the output " * (40 + 30 * k) for _ in calls))
        await agent.turn()
        agent.says("Now document it. " * 50)
        await agent.turn()
        other = Agent(gateway, "two", wire, task="Something else. " * 200)
        await other.turn()
        known = next(s for s in gateway.gateway.sessions if s.key.endswith(":one"))
    trace = load([tmp_path])
    assert trace.problems.count == 0
    assert trace.formats == {"cachewise": 1}
    one, two = sorted(trace.sessions, key=lambda s: -len(s.turns))

    assert [(t.prompt_tokens, t.cached_tokens, t.output_tokens) for t in one.turns] == [
        (s.prompt_tokens, s.cached_tokens, s.output_tokens) for s in agent.sent
    ]
    for turn, sent in zip(one.turns, agent.sent, strict=True):
        assert turn.gap_known
        assert turn.gap_s == pytest.approx(sent.gap_s, abs=0.25), "but for the way to the gateway"
    gaps = [turn.gap_s for turn in one.turns[-len(known.gaps) :]]
    assert gaps == [round(gap.seconds, 4) for gap in known.gaps]
    for before, turn in zip(one.turns, one.turns[1:], strict=False):
        assert before.api_s is not None
        assert turn.at_s == pytest.approx(before.at_s + before.api_s + turn.gap_s, abs=0.001)
    kinds = [(t.idle_kind, t.stop) for t in one.turns]
    assert kinds == [("tool", "tool_use")] * 12 + [("human", "end_turn")] * 2
    assert [[c.program or c.tool for c in t.calls] for t in one.turns[:3]] == [
        ["pytest"],
        ["pytest", "Read"],
        ["pytest"],
    ]
    assert one.turns[0].calls[0].duration_s == 0.04

    for n, chain in enumerate(chains(one)):
        assert len(chain) == -(-agent.sent[n].prompt_tokens // 64)
    for n, turn in enumerate(one.turns[1:], 1):
        assert turn.back == 1
        assert close(turn.shared, agent.sent[n - 1].prompt_tokens, agent.sent[n].prompt_tokens)
    head = set(chains(one)[0]) & set(chains(two)[0])
    assert close(len(head), other.sent[0].cached_tokens, other.sent[0].prompt_tokens)
    assert one.scope == two.scope != ""
    assert close((one.tool_tokens + one.system_tokens) // 64, 64 * len(head), 4000)

    (piece,) = replay.load([tmp_path])
    assert len(piece) == 14
    assert [turn.idle_kind for turn in piece] == ["tool"] * 12 + ["human"] * 2


async def test_a_changed_history_breaks_the_prefix_where_it_was_changed(tmp_path: Path) -> None:
    async with recording(tmp_path) as gateway:
        agent = Agent(gateway, "one")
        for k in range(6):
            await agent.turn([BASH])
            agent.results(f"output {k} " * 400)
        agent.messages[6]["content"] = "[cleared] " * 300
        await agent.turn([BASH])
    (session,) = load([tmp_path]).sessions
    last = session.turns[-1]
    assert close(last.shared, agent.sent[-1].cached_tokens, last.prompt_tokens)
    assert last.shared < session.turns[-2].shared


async def test_a_file_stands_by_itself_and_a_restart_changes_no_name(tmp_path: Path) -> None:
    """The second gateway knows nothing of the first one but the salt in the directory."""
    messages: list[dict[str, Any]] = []
    for _ in range(2):
        async with recording(tmp_path) as gateway:
            agent = Agent(gateway, "one", messages=list(messages))
            agent.messages = messages or agent.messages
            for k in range(3):
                await agent.turn([BASH])
                agent.results(f"output {len(agent.messages)} {k} " * 300)
            messages = agent.messages
    assert load([tmp_path]).formats == {"cachewise": 2}
    (session,) = load([tmp_path]).sessions
    assert len(session.turns) == 6
    assert [turn.gap_known for turn in session.turns] == [True] * 3 + [False] + [True] * 2
    assert [turn.back for turn in session.turns] == [1] * 6
    for before, turn in zip(session.turns, session.turns[1:], strict=False):
        assert close(turn.shared, before.prompt_tokens, turn.prompt_tokens)


async def test_sub_agents_and_failed_turns_are_told_apart(tmp_path: Path) -> None:
    async with recording(tmp_path) as gateway:
        parent = Agent(gateway, "one")
        await parent.turn([{"name": "Task", "arguments": {"subagent_type": "explore"}}])
        child = Agent(gateway, "two", headers={"x-cachewise-parent-session-id": "one"})
        await child.turn()
        script = json.dumps({"turns": [{"text": "x", "fail": {"status": 500}}]})
        headers = {"x-cachewise-session-id": "one", "x-embedded-script": script}
        await gateway.post("chat", body_of("chat", "embedded"), headers=headers)
    by_parent = {session.parent is None: session for session in load([tmp_path]).sessions}
    assert by_parent[False].parent == by_parent[True].id
    assert len(by_parent[True].turns) == 1
    assert by_parent[False].turns[0].idle_kind == "ended"
    assert b'"outcome":"pod_error"' in texts(tmp_path)


# -- loses nothing, costs little -----------------------------------------------------------------


async def test_nothing_is_lost_at_200_turns_a_second(tmp_path: Path) -> None:
    metrics = Metrics()
    recorder = Recorder(RecordSettings(directory=tmp_path), metrics, 0.0)
    turns, per_s = 800, 200
    async with recorder.running():
        began = time.monotonic()
        for number in range(turns):
            recorder.keep(note_of(f"s{number % 50}", number // 50, segments=200))
            await asyncio.sleep(max(0.0, began + (number + 1) / per_s - time.monotonic()))
    assert sum(child._value.get() for child in metrics.recording_lost.values()) == 0
    assert metrics.recorded_turns._value.get() == turns
    trace = load([tmp_path])
    assert trace.problems.count == 0
    assert sum(len(session.turns) for session in trace.sessions) == turns


async def test_a_gateway_records_as_fast_as_it_serves(tmp_path: Path) -> None:
    async with recording(tmp_path) as gateway:

        async def work(worker: int) -> int:
            served = 0
            until_s = time.monotonic() + 3
            while time.monotonic() < until_s:
                body = body_of("chat", "embedded")
                headers = {"x-cachewise-session-id": f"{worker}.{served // 10}"}
                reply = await gateway.post("chat", body, headers=headers)
                served += reply.status == 200
            return served

        served = sum(await asyncio.gather(*map(work, range(8))))
        await written(gateway, served)
        assert await gateway.metric('cachewise_recording_lost_turns_total{lost_to="queue"}') == 0
    assert sum(len(session.turns) for session in load([tmp_path]).sessions) == served > 100


async def test_what_does_not_fit_the_queue_is_lost_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED", 10)
    metrics = Metrics()
    recorder = Recorder(RecordSettings(directory=tmp_path), metrics, 0.0)
    for number in range(25):
        recorder.keep(note_of("s", number))
    async with recorder.running():
        pass
    assert metrics.recorded_turns._value.get() == 10
    assert metrics.recording_lost["queue",]._value.get() == 15
    (session,) = load([tmp_path]).sessions
    assert len(session.turns) == 10


async def test_a_fault_in_the_recorder_harms_no_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with recording(tmp_path) as gateway:
        agent = Agent(gateway, "one")
        await agent.turn([BASH])
        agent.results("ok")
        with monkeypatch.context() as broken:
            broken.setattr(module, "noted", lambda *_: 1 / 0)
            await agent.turn([BASH])
        assert await gateway.metric('cachewise_degraded_total{stage="record"}') == 1
        agent.results("ok")
        note = note_of("broken", 0, pod=object())  # type: ignore[arg-type]
        assert gateway.gateway.recorder is not None
        gateway.gateway.recorder.keep(note)
        await agent.turn()
    (session,) = load([tmp_path]).sessions
    assert len(session.turns) == 2
    assert gateway.gateway.metrics.recording_lost["fault",]._value.get() == 1


# -- the disk ------------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[None]:
    """A file system of so many kilobytes; where none can be mounted, files may be no longer."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if mounted:
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (path / "filler").touch()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(path: Path) -> None:
    with (path / "filler").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            pass


def make_space(path: Path) -> None:
    (path / "filler").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == 1024:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


async def test_with_a_full_disk_it_stops_and_says_so_and_traffic_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.05)
    monkeypatch.setattr(module, "RETRY_S", 0.3)
    disk = tmp_path / "disk"
    with small_disk(disk, 256), logged() as log:
        async with recording(disk) as gateway:
            agent = Agent(gateway, "one")

            async def turn() -> None:
                await agent.turn([BASH])
                agent.results(f"output {len(agent.messages)} " * 20)

            await turn()
            await written(gateway, 1)
            fill(disk)
            recording_now = gateway.gateway.metrics.recording._value
            turns = 1
            while recording_now.get():
                await turn()
                turns += 1
                await asyncio.sleep(0.01)
            for _ in range(20):
                await turn()
                turns += 1
                await asyncio.sleep(0.05)
            assert await gateway.metric("cachewise_recording") == 0
            lost = gateway.gateway.metrics.recording_lost["disk",]._value
            assert lost.get() >= 15
            said = [e for e in log.errors if "not recorded any more" in e]
            assert len(said) == 1, "once, however often it is tried again"
            assert str(disk) in said[0]
            assert "free space" in said[0]
            make_space(disk)

            async def again() -> None:
                nonlocal turns
                while not recording_now.get():
                    await turn()
                    turns += 1
                    await asyncio.sleep(0.05)

            await asyncio.wait_for(again(), 20)
            await turn()
            turns += 1
            assert len(agent.sent) == turns
        recorded = gateway.gateway.metrics.recorded_turns._value.get()
        assert recorded + lost.get() == turns
        (session,) = load([disk]).sessions
        assert len(session.turns) == recorded


@pytest.mark.parametrize("place", ["file", "below"])
def test_a_directory_that_cannot_be_used_is_an_error_of_configuration(
    tmp_path: Path, place: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    directory = file if place == "file" else file / "below"
    with pytest.raises(ConfigError, match=r"record\.directory: '.*' cannot be used .*; allowed:"):
        Gateway(Settings(record=RecordSettings(directory=directory)))


async def test_a_directory_that_is_taken_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.01)
    monkeypatch.setattr(files, "FILE_S", 0.0)
    metrics = Metrics()
    directory = tmp_path / "recordings"
    recorder = Recorder(RecordSettings(directory=directory), metrics, 0.0)
    async with recorder.running():
        shutil.rmtree(directory)
        recorder.keep(note_of("s", 0))
    assert len(load([directory]).sessions) == 1


async def test_a_fault_of_the_packer_ends_the_file_and_the_next_turns_go_into_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.01)
    metrics = Metrics()
    recorder = Recorder(RecordSettings(directory=tmp_path), metrics, 0.0)
    lost, recorded = metrics.recording_lost["fault",]._value, metrics.recorded_turns._value
    async with recorder.running():
        recorder.keep(note_of("s", 0))
        await until(lambda: recorded.get() == 1)
        with monkeypatch.context() as broken:
            broken.setattr(files.File, "flush", lambda *_: 1 / 0)
            recorder.keep(note_of("s", 1))
            await until(lambda: lost.get() == 1)
        recorder.keep(note_of("s", 2))
    (session,) = load([tmp_path]).sessions
    assert [turn.at_s for turn in session.turns] == [0.0, 20.0]


def test_nothing_of_it_is_imported_where_it_is_off() -> None:
    code = "import sys, gateway.gateway as g; from gateway.config import Settings;"
    code += (
        "assert g.Gateway(Settings()).recorder is None; print('gateway.recorder' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# -- killed --------------------------------------------------------------------------------------


def test_of_a_gateway_that_is_killed_what_was_flushed_is_read_and_the_torn_tail_counted(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "recordings"
    env = {"CACHEWISE_RECORD__DIRECTORY": str(directory), "CACHEWISE_FORECAST__STATE_FILE": "off"}
    command = [str(Path(sys.executable).with_name("cachewise")), "serve", "--port", "0"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--log-format", "json"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | env,
            cwd=ROOT,
        )
        try:
            url = address(log)
            served: list[float] = []
            with httpx.Client(base_url=url) as client:
                began = time.monotonic()
                while time.monotonic() < began + 3.5:
                    body = body_of("chat", "embedded")
                    headers = {"x-cachewise-session-id": f"s{len(served) // 10}"}
                    answer = client.post("/v1/chat/completions", json=body, headers=headers)
                    assert answer.status_code == 200
                    served.append(time.monotonic())
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    trace = load([directory])
    found = sum(len(session.turns) for session in trace.sessions)
    due = sum(at < began + 1.5 for at in served)
    assert 0 < due <= found <= len(served)
    assert trace.problems.count == 1
    assert "torn" in trace.problems.named[0]

    (file,) = directory.glob("*.zst")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    torn = load([directory])
    assert torn.problems.count >= 1
    assert 0 < sum(len(session.turns) for session in torn.sessions) <= found


def address(log: Path) -> str:
    """Where the gateway listens, once pods take turns."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for word in log.read_text().split():
            if word.startswith("http://127.0.0.1:"):
                url = word.strip("\",'").removesuffix("/health").rstrip("/")
                url = "/".join(url.split("/")[:3])
                try:
                    if httpx.get(f"{url}/ready").status_code == 200:
                        return url
                except httpx.HTTPError:
                    pass
        time.sleep(0.1)
    raise TimeoutError(log.read_text())


# -- privacy -------------------------------------------------------------------------------------

LETTERS = {
    "mixed": string.ascii_letters + string.digits,
    "lower": string.ascii_lowercase + string.digits,
    "letters": string.ascii_lowercase,
    "hex": "0123456789abcdef",
    "digits": string.digits,
    "marked": string.ascii_letters + string.digits + "-_.:/+=",
    "words": string.ascii_lowercase + "     ",
}


class Secrets:
    """Random strings of many kinds, and a list of all that were given out."""

    def __init__(self) -> None:
        self._rng = random.Random(7)
        self.all: list[str] = []

    def __call__(self, kind: str = "mixed", chars: int = 32) -> str:
        made = "".join(self._rng.choices(LETTERS[kind], k=chars))
        self.all.append(made)
        return made


def secret_calls(secret: Secrets) -> list[dict[str, Any]]:
    s = secret
    commands = [
        f"export TOKEN={s()} && curl -H 'Authorization: Bearer {s()}' https://{s('lower')}.com/{s()}",
        f"cat /home/{s()}/{s('words', 40)}/notes.md | grep {s()} > /tmp/{s('hex')}",
        f"{s('mixed')} --password {s()}",
        f"/opt/{s('lower')}/bin/{s('mixed')} {s()}",
        f"npm run {s('mixed')} -- {s('digits')}",
        f"git commit -m '{s('words', 60)}' && make {s('lower', 24)}",
        f'bash -c "psql postgres://{s()}:{s()}@db/{s()}"',
        f"python -m {s('mixed')} <<EOF\n{s('words', 200)}\nEOF",
        f"sleep {s('digits', 9)}; timeout {s('digits', 9)} {s('marked')}",
        f"PASSWORD='{s('marked')}' ssh {s()}@{s('hex')} '{s('words', 50)}'",
        f"$({s('mixed')}) `{s('lower')}` ; {s('hex', 40)}",
        f"cat > .env <<\\EOF\n{s('letters', 12)} {s('words', 60)}\nEOF",
        f"tee a <<'THE END' | cat\n{s('letters', 12)} {s('words', 60)}\nTHE END",
        f"names=({s('letters', 12)} {s('letters', 12)}); {s('letters', 12)} --now",
        f"case $x in\n  {s('letters', 12)}) ls;; esac; npm run {s('letters', 12)}",
        f"make {s('letters', 12)}; python -m {s('letters', 12)}",
    ]
    calls = [{"name": "Bash", "arguments": {"command": command}} for command in commands]
    return [
        *calls,
        {"name": "Bash", "arguments": {"command": ["sh", "-c", f"echo {s()}"], s(): s()}},
        {"name": "Read", "arguments": {"file_path": f"/home/{s()}/{s('words', 30)}.py"}},
        {"name": "Write", "arguments": {"file_path": s(), "content": s("words", 500)}},
        {"name": "Task", "arguments": {"subagent_type": s(), "prompt": s("words", 300)}},
        {"name": "Skill", "arguments": {"skill": s("lower"), "command": s()}},
        {"name": "WebFetch", "arguments": {"url": f"https://{s()}/?key={s('marked')}"}},
        {"name": "Bash", "arguments": {"command": "ls", "timeout": int(s("digits", 9))}},
        {"name": "BashOutput", "arguments": {"bash_id": s(), "chars": s()}},
        {"name": f"mcp__{s()}__{s('lower')}", "arguments": {"q": s()}},
        {"name": f"odd {s()} name/{s('words', 20)}.bash", "arguments": {"command": s()}},
        {"name": f"{s('lower')}.Bash", "arguments": {"command": s()}},
        {"name": s("hex"), "arguments": {"q": s("words", 100)}},
        {"name": "tool_call", "arguments": {"name": s(), "arguments": {"a": s()}}},
    ]  # fmt: skip


def raw(directory: Path) -> bytes:
    """The bytes of all files in a directory, and their names."""
    return b"".join(path.name.encode() + path.read_bytes() for path in directory.iterdir())


async def leaked(directory: Path, wire: str) -> set[str]:
    """All eight characters of a secret that a recording of the same secrets has in it."""
    secret = Secrets()
    keys = {"acme": secret("lower", 40), secret("lower", 20): secret("lower", 40)}
    access = {"api_keys": keys, "admin_token": secret()}
    turns = 0
    async with recording(directory, access=access) as gateway:
        for tenant, key in keys.items():
            agent = Agent(
                gateway,
                secret(),
                wire,
                task=secret("words", 2000),
                system=secret("words", 2000) + tenant,
                headers={
                    "authorization": f"Bearer {key}",
                    "user-agent": f"agent/{secret()}",
                    "x-request-id": secret(),
                    "x-secret": secret("marked"),
                    "x-cachewise-parent-session-id": secret(),
                    "cookie": f"session={secret()}",
                },
            )
            calls = secret_calls(secret)
            for first in range(0, len(calls), 4):
                asked = calls[first : first + 4]
                durations = ";".join(f"{secret()}={secret('digits', 9)}" for _ in asked)
                await agent.turn(
                    asked,
                    text=secret("words", 300),
                    **{"x-claude-code-prev-tool-durations": durations},
                )
                agent.results(*(secret("words", 400) for _ in asked))
                turns += 1
            agent.says(secret("words", 200))
            await agent.turn()
            turns += 1
        await written(gateway, turns)
    plain = texts(directory)
    assert plain.count(b'"type":"turn"') == turns
    assert len(secret.all) > 150
    assert b"curl" in plain, "what is made to be kept is"
    everything = (plain + raw(directory)).lower()
    return {
        text[i : i + 8]
        for text in secret.all
        for i in range(len(text) - 7)
        if text[i : i + 8].lower().encode() in everything
    }


@pytest.mark.parametrize("wire", ["chat", "messages"])
async def test_no_eight_characters_of_a_secret_reach_the_disk(tmp_path: Path, wire: str) -> None:
    """Eight digits of a salted hash are a secret's by chance once in a thousand recordings;
    what leaks does so under every salt.
    """
    assert await leaked(tmp_path / "one", wire) & await leaked(tmp_path / "two", wire) == set()
