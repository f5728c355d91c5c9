"""What is written, what is never written, and that nothing waits for the writer."""

import asyncio
import io
import json
import logging
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway import logs
from gateway.config import LogSettings
from gateway.logs import LogQueue, dropped_total, logging_to, turn_logged

turns = logging.getLogger("gateway.turn")
SECRET = "sk-very-secret-credential"


class Stuck(io.StringIO):
    """A terminal that accepts nothing until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.free.wait()
        return super().write(text)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    stream = Stuck()
    yield stream
    stream.free.set()


def written(settings: LogSettings, action: object) -> str:
    out = io.StringIO()
    with logging_to(settings, out):
        action()  # type: ignore[operator]
    return out.getvalue()


def test_a_turn_is_one_json_line_with_its_fields() -> None:
    text = written(
        LogSettings(format="json"),
        lambda: turn_logged(turns, session="s/1", pod="a:8000", status=200, ttft_s=0.25, held=None),
    )
    assert text.count("\n") == 1
    line = json.loads(text)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "gateway.turn",
        "message": "turn",
        "session": "s/1",
        "pod": "a:8000",
        "status": 200,
        "ttft_s": 0.25,
        "held": None,
    }


def test_a_turn_is_one_plain_line_whatever_its_fields_hold() -> None:
    text = written(
        LogSettings(),
        lambda: turn_logged(turns, session='a b\n"c"', pod="a:8000", ttft_s=0.123456789, tools=[]),
    )
    assert text.count("\n") == 1
    assert r'session="a b\n\"c\"" pod=a:8000 ttft_s=0.123457 tools=[]' in text


def test_a_field_cannot_stand_in_for_the_level_or_the_message() -> None:
    text = written(LogSettings(format="json"), lambda: turn_logged(turns, level="x", message="y"))
    line = json.loads(text)
    assert (line["level"], line["message"]) == ("info", "turn")


@pytest.mark.parametrize(
    ("level", "seen"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
def test_the_level_is_the_least_severe_written(level: str, seen: int) -> None:
    def all_levels() -> None:
        for severity in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger("gateway.relay").log(severity, "something")

    settings = LogSettings.model_validate({"level": level})
    assert written(settings, all_levels).count("\n") == seen


def test_foreign_libraries_are_heard_from_warning_on_and_their_first_line_only() -> None:
    def foreign() -> None:
        logging.getLogger("httpcore.http11").debug("send_request_headers %s", SECRET)
        logging.getLogger("asyncio").error("Task exception was never retrieved\n%s", SECRET)

    text = written(LogSettings(level="debug"), foreign)
    assert "Task exception was never retrieved" in text
    assert SECRET not in text


@pytest.mark.parametrize("form", ["plain", "json"])
def test_an_exception_is_logged_by_type_and_place_without_its_text(form: str) -> None:
    def fails() -> None:
        try:
            try:
                raise KeyError(SECRET)
            except KeyError as error:
                raise ExceptionGroup(SECRET, [ValueError(SECRET)]) from error
        except ExceptionGroup:
            logging.getLogger("gateway.relay").exception("the turn failed")

    text = written(LogSettings.model_validate({"format": form}), fails)
    assert text.count("\n") == 1
    assert "ExceptionGroup at tests/test_logs.py" in text
    assert "ValueError" in text
    assert "KeyError at tests/test_logs.py" in text
    assert SECRET not in text


def test_records_beyond_the_queue_are_dropped_and_counted_without_waiting(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "QUEUE_RECORDS", 10)
    monkeypatch.setattr(logs, "STOP_TIMEOUT_S", 0.05)
    with logging_to(LogSettings(), stuck):
        for number in range(100):  # would never end if a full queue were waited for
            turn_logged(turns, number=number)
        lost = dropped_total()
        assert lost in (89, 90)  # the writer may hold one
        stuck.free.set()
    assert 100 - lost - 1 <= stuck.getvalue().count("turn number=") <= 100 - lost


def test_closing_gives_up_on_a_stream_that_nobody_reads(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "STOP_TIMEOUT_S", 0.05)
    with logging_to(LogSettings(), stuck):
        turn_logged(turns, number=1)
    assert stuck.getvalue() == ""


def test_a_failed_write_is_counted_and_stops_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with logging_to(LogSettings(), Broken()) as handler:
        turn_logged(turns, credential_free=True)
        turn_logged(turns, credential_free=True)
    assert handler.dropped_total == 2
    assert capfd.readouterr().err == ""


def test_everything_is_put_back_on_exit() -> None:
    root, ours = logging.getLogger(), logging.getLogger("gateway")
    before = (root.level, ours.level, list(root.handlers))
    with logging_to(LogSettings(level="debug"), io.StringIO()):
        assert any(isinstance(handler, LogQueue) for handler in root.handlers)
    assert (root.level, ours.level, root.handlers) == before
    assert dropped_total() == 0


def test_handlers_that_uvicorn_set_up_before_write_nothing_beside_us() -> None:
    beside = io.StringIO()
    uvicorn_logger = logging.getLogger("uvicorn")
    theirs = logging.StreamHandler(beside)
    uvicorn_logger.addHandler(theirs)
    uvicorn_logger.propagate = False
    try:
        text = written(LogSettings(), lambda: logging.getLogger("uvicorn.error").error("failed"))
        assert uvicorn_logger.handlers == [theirs]
    finally:
        uvicorn_logger.removeHandler(theirs)
        uvicorn_logger.propagate = True
    assert "failed" in text
    assert beside.getvalue() == ""


@pytest.mark.parametrize("form", ["plain", "json"])
async def test_a_server_at_debug_level_never_logs_headers_bodies_or_exception_texts(
    form: str,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        if scope["path"] == "/fails":
            raise RuntimeError(f"{scope['headers']} {body!r}")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    out = io.StringIO()
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    settings = LogSettings.model_validate({"level": "debug", "format": form})
    with logging_to(settings, out):
        task = asyncio.create_task(server.serve(sockets=[listening]))
        async with httpx.AsyncClient(base_url=url) as client:
            headers = {"authorization": f"Bearer {SECRET}", "x-api-key": SECRET}
            answer = await client.post(f"/echo?key={SECRET}", headers=headers, content=SECRET)
            assert answer.text == SECRET
            failed = await client.post("/fails", headers=headers, content=SECRET)
            assert failed.status_code == 500
        server.should_exit = True
        await task
    text = out.getvalue()
    assert "Exception in ASGI application" in text
    assert "RuntimeError at" in text
    assert "Started server process" in text
    assert SECRET not in text
