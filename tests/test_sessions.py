"""Which session a turn belongs to, and where each session stands."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.dialects.turn import ToolCall, TurnOutcome, TurnRequest
from gateway.identity import MAX_KEY_CHARS, Named, classify, named_by_body, named_by_headers
from gateway.prefix import TailIndex
from gateway.sessions import (
    BACKGROUND_KEPT,
    GAPS_KEPT,
    MAX_ID_CHARS,
    RESPONSES_KEPT,
    Session,
    SessionStore,
    Turn,
)
from tests.requests_made import answer, chat, outcome, request, result, system, user

TENANT, SCOPE = "tenant", 7


def store(max_sessions: int = 100, ttl_s: float = 3600.0) -> SessionStore:
    return SessionStore(max_sessions, ttl_s)


def begin(
    sessions: SessionStore,
    made: TurnRequest,
    now: float = 0.0,
    scope: int = SCOPE,
    **headers: str,
) -> Turn:
    raw = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return sessions.begin(raw, made, f"tenant-{scope}", scope, now)


def whole_turn(
    sessions: SessionStore, made: TurnRequest, *calls: str | ToolCall, now: float = 0, **more: Any
) -> Turn:
    turn = begin(sessions, made, now, **more)
    sessions.end(turn, outcome(*calls), now)
    return turn


# -- the session that a request names -------------------------------------------------------------

HEADERS: list[tuple[dict[str, str], tuple[str, str, str | None]]] = [
    ({"x-cachewise-session-id": "s"}, ("s", "s", None)),
    ({"x-cachewise-session-id": "s", "x-cachewise-parent-session-id": "p"}, ("p", "s", "p")),
    ({"x-dynamo-session-id": "s", "x-dynamo-parent-session-id": "p"}, ("p", "s", "p")),
    ({"x-claude-code-session-id": "s"}, ("s", "s", None)),
    ({"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a"}, ("s", "s/a", "s")),
    (
        {
            "x-claude-code-session-id": "s",
            "x-claude-code-agent-id": "b",
            "x-claude-code-parent-agent-id": "a",
        },
        ("s", "s/b", "s/a"),
    ),
    ({"thread-id": "t", "session-id": "s"}, ("s", "t", None)),
    (
        {"thread-id": "t", "session-id": "s", "x-codex-parent-thread-id": "p"},
        ("s", "t", "p"),
    ),
    ({"thread-id": "t"}, ("t", "t", None)),
    ({"x-session-id": "c", "x-parent-session-id": "p"}, ("p", "c", "p")),
    ({"x-session-id": "c", "x-session-affinity": "c"}, ("c", "c", None)),
    *(
        ({name: "s"}, ("s", "s", None))
        for name in (
            "x-session-affinity",
            "x-opencode-session",
            "agent-session-id",
            "goose-session-id",
            "session-id",
            "session_id",
            "conversation_id",
            "x-conversation-id",
            "x-task-id",
            "x-roo-task-id",
            "x-litellm-session-id",
            "x-litellm-trace-id",
        )
    ),
]
BODIES: list[tuple[str, dict[str, Any], str, tuple[str, str, str | None]]] = [
    (
        "metadata.user_id",
        {"metadata": {"user_id": '{"device_id":"d","session_id":"s"}'}},
        "messages",
        ("s", "s", None),
    ),
    (
        "metadata.user_id",
        {"metadata": {"user_id": "user_ab12_account__session_0123-4567-89ab"}},
        "messages",
        ("0123-4567-89ab", "0123-4567-89ab", None),
    ),
    ("metadata.session_id", {"metadata": {"session_id": "s"}}, "chat", ("s", "s", None)),
    (
        "metadata.cursorConversationId",
        {"metadata": {"cursorConversationId": "s"}},
        "chat",
        ("s", "s", None),
    ),
    ("conversation", {"conversation": "s"}, "responses", ("s", "s", None)),
    ("conversation", {"conversation": {"id": "s"}}, "responses", ("s", "s", None)),
    ("session_id", {"session_id": "s"}, "completions", ("s", "s", None)),
    (
        "agent_hint.session_id",
        {"agent_hint": {"session_id": "s", "parent_session_id": "p"}},
        "chat",
        ("p", "s", "p"),
    ),
    (
        "client_metadata.thread_id",
        {"client_metadata": {"session_id": "s", "thread_id": "t"}},
        "responses",
        ("s", "t", None),
    ),
    ("prompt_cache_key", {"prompt_cache_key": "s"}, "responses", ("s", "s", None)),
]


def encoded(headers: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in headers.items()}


@pytest.mark.parametrize(("headers", "expected"), HEADERS)
def test_each_header_names_group_chain_and_parent(
    headers: dict[str, str], expected: tuple[str, str, str | None]
) -> None:
    named = named_by_headers(encoded(headers))
    assert named is not None
    assert named.source == next(iter(headers))
    assert (named.group, named.chain, named.parent) == expected


def test_headers_are_believed_in_the_order_of_their_table() -> None:
    for at, (stronger, _) in enumerate(HEADERS):
        for weaker, _ in HEADERS[at + 1 :]:
            both = {k: f"weak-{v}" for k, v in weaker.items()} | stronger
            named = named_by_headers(encoded(both))
            assert named is not None
            assert named.source == next(iter(stronger))
            assert not named.chain.startswith("weak")


@pytest.mark.parametrize(("source", "fields", "wire", "expected"), BODIES)
def test_each_field_names_group_chain_and_parent(
    source: str, fields: dict[str, Any], wire: str, expected: tuple[str, str, str | None]
) -> None:
    named = named_by_body(request(wire, messages=[], **fields))
    assert named == Named(source, *expected)


def test_fields_are_believed_in_the_order_of_their_table() -> None:
    in_chat = [(source, fields) for source, fields, _, _ in BODIES]
    for at, (source, stronger) in enumerate(in_chat):
        for _, weaker in in_chat[at + 1 :]:
            both = weaker | stronger
            if stronger.keys() == weaker.keys() == {"metadata"}:
                both = {"metadata": weaker["metadata"] | stronger["metadata"]}
            named = named_by_body(request("chat", messages=[], **both))
            assert named is not None
            assert named.source == source


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"metadata": None},
        {"metadata": "x"},
        {"metadata": {"user_id": 5}},
        {"metadata": {"user_id": "someone"}},
        {"metadata": {"user_id": "{not json"}},
        {"metadata": {"user_id": '{"session_id":null}'}},
        {"metadata": {"user_id": '["session_id"]'}},
        {"metadata": {"session_id": " "}},
        {"metadata": {"pad": "x" * 70_000, "session_id": "s"}},
        {"conversation": {"id": 7}},
        {"prompt_cache_key": ""},
        {"session_id": ["s"]},
        {"user": "u", "safety_identifier": "u"},
    ],
    ids=str,
)
def test_odd_fields_name_nothing(fields: dict[str, Any]) -> None:
    assert named_by_body(request("chat", messages=[], **fields)) is None


@pytest.mark.parametrize("name", ["x-client-request-id", "x-request-id", "user-agent", "host"])
def test_other_headers_name_nothing(name: str) -> None:
    assert named_by_headers({name.encode(): b"s"}) is None
    assert named_by_headers({b"x-session-id": b"  "}) is None


def test_an_over_long_key_is_shortened_and_stays_distinct() -> None:
    a = named_by_headers({b"x-session-id": b"a" * 5_000})
    b = named_by_headers({b"x-session-id": b"a" * 5_001})
    assert a is not None
    assert b is not None
    assert a.chain != b.chain
    assert len(a.chain) <= MAX_KEY_CHARS


def test_the_operators_header_can_end_a_session() -> None:
    sessions = store()
    headers = {"x_cachewise_session_id": "s", "x_cachewise_session_final": "true"}
    turn = whole_turn(sessions, chat(user("a")), "call", **headers)
    assert turn.session.state == "ended"


@pytest.mark.parametrize(
    ("expected", "headers", "made"),
    [
        ("main", {}, chat(user("a"))),
        ("subagent", {"x-session-id": "c", "x-parent-session-id": "p"}, chat(user("a"))),
        ("compaction", {"x-claude-code-compaction": "auto"}, chat(user("a"))),
        ("auxiliary", {"x-claude-code-request-class": "auxiliary"}, chat(user("a"))),
        ("compaction", {"x-codex-turn-metadata": '{"request_kind":"compaction"}'}, chat(user("a"))),
        ("compaction", {}, chat(user("Your task is to create a detailed summary of it all"))),
        ("auxiliary", {}, chat(system("You are a title generator. Do"), user("a"), tools=False)),
        ("main", {}, chat(system("You are a title generator. Do"), user("a"))),
        ("auxiliary", {"thread-id": "t"}, chat(user("a"), tools=False)),
        ("main", {"x-task-id": "t"}, chat(user("a"), tools=False)),
    ],
)
def test_the_class_of_a_request(expected: str, headers: dict[str, str], made: TurnRequest) -> None:
    raw = encoded(headers)
    assert classify(raw, made, named_by_headers(raw)) == expected


# -- the same session again -----------------------------------------------------------------------


def test_turns_with_one_id_are_one_session() -> None:
    sessions = store()
    first = whole_turn(sessions, chat(user("a")), "c1", x_session_id="s")
    second = whole_turn(sessions, chat(user("a"), answer("", "c1"), result("c1")), x_session_id="s")
    assert second.session is first.session
    assert (second.identified_by, second.session.turns, len(sessions)) == ("x-session-id", 2, 1)
    assert sessions.by_sid(first.session.sid) is first.session
    assert second.change.cause is None
    assert second.same_tokens > 0


def test_without_an_id_the_relayed_tool_call_id_tells_identical_runs_apart() -> None:
    sessions = store()
    start = [system(), user("fix it")]
    a = whole_turn(sessions, chat(*start), "call-a")
    b = whole_turn(sessions, chat(*start), "call-b")
    assert a.session is not b.session
    again_b = begin(sessions, chat(*start, answer("", "call-b"), result("call-b")))
    again_a = begin(sessions, chat(*start, answer("", "call-a"), result("call-a")))
    assert (again_a.session, again_b.session) == (a.session, b.session)
    assert again_a.identified_by == "tool_call_id"


def test_an_id_given_to_two_sessions_names_neither() -> None:
    sessions = store()
    a = whole_turn(sessions, chat(system("one"), user("a")), "functions.bash:0")
    b = whole_turn(sessions, chat(system("two"), user("b")), "functions.bash:0")
    stray = begin(
        sessions, chat(user("x"), answer("", "functions.bash:0"), result("functions.bash:0"))
    )
    assert stray.session not in (a.session, b.session)
    grown = chat(
        system("one"), user("a"), answer("", "functions.bash:0"), result("functions.bash:0")
    )
    again = begin(sessions, grown)
    assert (again.session, again.identified_by) == (a.session, "prefix")


def test_an_id_of_an_older_turn_does_not_name_the_session() -> None:
    sessions = store()
    history = [user("a"), answer("", "c1"), result("c1")]
    first = whole_turn(sessions, chat(user("a")), "c1")
    whole_turn(sessions, chat(*history), "c2")
    stray = begin(sessions, chat(user("other"), answer("", "c1"), result("c1")))
    assert stray.session is not first.session


def test_a_text_conversation_is_followed_by_its_prefix() -> None:
    sessions = store()
    first = whole_turn(sessions, chat(system(), user("hi"), tools=False))
    second = begin(sessions, chat(system(), user("hi"), answer("yes"), user("go"), tools=False))
    assert second.session is first.session
    assert second.identified_by == "prefix"


def test_a_rewritten_last_message_is_forgiven() -> None:
    sessions = store()
    first = whole_turn(sessions, chat(system(), user("hi\n\nRemember the rules."), tools=False))
    grown = chat(
        system(), user("hi"), answer("yes"), user("go\n\nRemember the rules."), tools=False
    )
    second = begin(sessions, grown)
    assert second.session is first.session
    assert second.change.cause == "edit"


def test_a_common_system_prompt_makes_no_session_of_two() -> None:
    """As after a restart of the gateway: the second conversation is known to nobody."""
    sessions = store()
    first = whole_turn(sessions, chat(system(), user("fix the parser")), "c1")
    other = begin(sessions, chat(system(), user("write docs"), answer("", "z"), result("z")))
    assert other.session is not first.session


def test_the_same_first_request_again_is_another_session() -> None:
    sessions = store()
    first = whole_turn(sessions, chat(user("hi")))
    assert begin(sessions, chat(user("hi"))).session is not first.session
    assert begin(sessions, chat(user("hi"), user("there"))).session is not first.session


def test_of_two_that_fit_the_one_at_rest_goes_on() -> None:
    sessions = store()
    resting = whole_turn(sessions, chat(user("hi"), tools=False), now=1)
    begin(sessions, chat(user("hi"), tools=False), now=2)
    grown = begin(sessions, chat(user("hi"), answer("yes"), user("go"), tools=False), now=3)
    assert grown.session is resting.session


def test_a_response_id_names_its_session() -> None:
    sessions = store()
    turn = begin(sessions, request("responses", input="hi"))
    sessions.end(turn, outcome(response_id="resp_1"), 1)
    assert sessions.of_response(SCOPE, "resp_1") is turn.session
    assert sessions.of_response(SCOPE + 1, "resp_1") is None
    made = request("responses", input="more", previous_response_id="resp_1")
    assert begin(sessions, made).session is turn.session


def test_only_the_latest_responses_are_kept() -> None:
    sessions = store()
    for number in range(RESPONSES_KEPT + 2):
        turn = begin(sessions, chat(user("a")), x_session_id="s")
        sessions.end(turn, outcome(response_id=f"r{number}"), 1)
    assert sessions.of_response(SCOPE, "r1") is None
    assert sessions.of_response(SCOPE, "r2") is turn.session
    assert len(sessions._responses) == RESPONSES_KEPT


def test_tenants_never_mix() -> None:
    sessions = store()
    history = [user("a"), answer("", "c1"), result("c1")]
    mine = begin(sessions, chat(user("a")), x_session_id="s")
    sessions.end(mine, outcome("c1", response_id="r"), 0)
    others = [
        begin(sessions, chat(user("a")), scope=8, x_session_id="s"),
        begin(sessions, chat(*history), scope=8),
        begin(sessions, chat(*history, answer("x"), user("y")), scope=9),
        begin(sessions, request("responses", input="a", previous_response_id="r"), scope=8),
    ]
    assert all(turn.session is not mine.session for turn in others)
    assert all(turn.session.sid != mine.session.sid for turn in others)
    assert all(turn.session.tenant != mine.session.tenant for turn in others)
    assert all(turn.session.group != mine.session.group for turn in others)
    assert others[0].forked_from is None


# -- ids that are none ----------------------------------------------------------------------------


def grow(turns: int) -> list[TurnRequest]:
    history = [system(), user("start")]
    made = []
    for number in range(turns):
        made.append(chat(*history))
        history += [answer(f"a{number}"), user(f"q{number}")]
    return made


def test_an_id_that_is_new_with_every_request_is_not_believed_for_long() -> None:
    sessions = store()
    turns = [
        whole_turn(sessions, made, now=i, x_session_id=f"random-{i}")
        for i, made in enumerate(grow(8))
    ]
    sids = [turn.session.sid for turn in turns]
    assert len(set(sids[:4])) == 4
    assert set(sids[4:]) == {sids[3]}
    assert turns[-1].identified_by == "prefix"
    other = whole_turn(sessions, chat(user("z")), x_session_id="s", user_agent="opencode/1")
    assert other.identified_by == "x-session-id"  # another client's are


def test_ids_that_come_back_stay_believed() -> None:
    sessions = store()
    for number in range(10):  # forks of a first turn, each going on under its own id
        base = chat(system(), user(f"task {number}"))
        grown = chat(system(), user(f"task {number}"), answer("a"), user("b"))
        whole_turn(sessions, base, x_session_id=f"base-{number}")
        fork = whole_turn(sessions, grown, x_session_id=f"fork-{number}")
        assert fork.identified_by == "x-session-id"
        whole_turn(sessions, base, x_session_id=f"base-{number}")


def test_conversations_unknown_after_a_restart_keep_their_ids() -> None:
    sessions = store()
    whole_turn(sessions, chat(system(), user("new here")), x_session_id="first")
    for number in range(6):
        history = chat(system(), user(f"task {number}"), answer("a"), user("b"))
        turn = whole_turn(sessions, history, x_session_id=f"old-{number}")
        assert turn.identified_by == "x-session-id"
        assert turn.forked_from is None


# -- relatives ------------------------------------------------------------------------------------


def test_a_new_id_with_a_known_prefix_is_a_fork() -> None:
    sessions = store()
    history = [system(), user("a" * 400)]
    origin = whole_turn(sessions, chat(*history), x_claude_code_session_id="one")
    fork = begin(sessions, chat(*history, answer("b"), user("c")), x_claude_code_session_id="two")
    assert fork.session is not origin.session
    assert fork.session.forked_from == origin.session.sid
    assert fork.session.tokens_per_byte == origin.session.tokens_per_byte
    assert fork.forked_from is not None
    sid, tokens = fork.forked_from
    assert sid == origin.session.sid
    assert 0 < tokens <= fork.prompt_tokens


def test_a_subagent_shares_the_group_and_ends_with_its_answer() -> None:
    sessions = store()
    main = whole_turn(sessions, chat(user("a")), "task", x_claude_code_session_id="s")
    child = begin(
        sessions,
        chat(user("sub")),
        x_claude_code_session_id="s",
        x_claude_code_agent_id="x",
    )
    assert child.session.group == main.session.group == main.session.sid
    assert child.session.parent == main.session.sid
    assert child.request_class == "subagent"
    sessions.end(child, outcome("c"), 1)
    assert child.session.idle_kind == "tool"
    again = begin(
        sessions,
        chat(user("sub"), answer("", "c"), result("c")),
        2,
        x_claude_code_session_id="s",
        x_claude_code_agent_id="x",
    )
    sessions.end(again, outcome(), 3)
    assert child.session.state == "ended"
    assert main.session.idle_kind == "tool"


def test_an_aside_is_a_chain_of_its_own_and_ended_at_once() -> None:
    sessions = store()
    main = whole_turn(sessions, chat(user("a")), "c", x_task_id="s")
    aside = begin(sessions, chat(user("Name it."), tools=False), x_task_id="s")
    assert aside.request_class == "auxiliary"
    assert aside.session is not main.session
    assert (aside.session.parent, aside.session.group) == (main.session.sid, main.session.group)
    sessions.end(aside, outcome("even with a call"), 1)
    assert aside.session.state == "ended"
    assert main.session.idle_kind == "tool"
    assert main.session.breaks == 0


# -- lifecycle ------------------------------------------------------------------------------------


def call(name: str, arguments: str = "{}", call_id: str = "c1") -> ToolCall:
    return ToolCall.of(call_id, name, arguments)


@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        ([], "human"),
        ([call("bash")], "tool"),
        ([call("AskUserQuestion")], "human"),
        ([call("bash"), call("ExitPlanMode", call_id="c2")], "human"),
        ([call("Bash", '{"run_in_background": true}')], "tool"),
    ],
)
def test_what_a_session_waits_for(calls: list[ToolCall], kind: str) -> None:
    sessions = store()
    turn = begin(sessions, chat(user("a")), 5)
    assert (turn.session.state, turn.session.idle_kind) == ("running", None)
    sessions.end(turn, outcome(*calls), 9)
    assert (turn.session.state, turn.session.idle_kind, turn.session.idle_since) == (
        "idle",
        kind,
        9,
    )
    assert turn.session.waiting_for == tuple(c.name for c in calls)


@pytest.mark.parametrize(
    ("calls", "back", "kind"),
    [
        (["c"], [result("c")], "tool"),
        (["c"], [result("c"), user("stop!")], "human"),
        ([call("AskUserQuestion", call_id="c")], [result("c")], "human"),
        ([], [user("next")], "human"),
        ([], [user("<task-notification><task-id>1</task-id></task-notification>")], "background"),
    ],
)
def test_a_gap_runs_from_the_response_to_the_next_request(
    calls: list[Any], back: list[dict[str, Any]], kind: str
) -> None:
    sessions = store()
    first = begin(sessions, chat(user("a")), 10, x_task_id="s")
    assert first.gap is None
    sessions.end(first, outcome(*calls), 15)
    second = begin(sessions, chat(user("a"), answer("", "c"), *back), 22, x_task_id="s")
    assert second.gap is not None
    assert (second.gap.seconds, second.gap.kind, second.gap.at) == (7, kind, 22)
    assert list(second.session.gaps) == [second.gap]


def test_after_an_abort_no_gap_is_measured() -> None:
    sessions = store()
    turn = begin(sessions, chat(user("a")), 1, x_task_id="s")
    sessions.end(turn, None, 2)
    assert (turn.session.in_flight, turn.session.state) == (0, "idle")
    assert begin(sessions, chat(user("a")), 3, x_task_id="s").gap is None


def test_a_turn_that_overlapped_another_leaves_no_false_gap() -> None:
    sessions = store()
    a, b = (begin(sessions, chat(user("a")), 1, x_task_id="s") for _ in range(2))
    sessions.end(a, outcome("c"), 2)
    c = begin(sessions, chat(user("a")), 3, x_task_id="s")  # b is still running
    assert c.gap is None
    sessions.end(b, None, 4)
    sessions.end(c, None, 5)
    assert begin(sessions, chat(user("a")), 60, x_task_id="s").gap is None


STARTED = "Command running in background with ID: bash_1"


def test_a_command_in_the_background_is_waited_for_until_it_is_reported() -> None:
    sessions = store()
    history = [user("a")]
    turn = begin(sessions, chat(*history), 0, x_task_id="s")
    sessions.end(turn, outcome(call("Bash", '{"run_in_background":true}', "bg")), 1)
    history += [answer("", "bg"), result("bg", STARTED)]
    session = whole_turn(sessions, chat(*history), now=2, x_task_id="s").session
    assert session.idle_kind == "background"
    note = "<task-notification><tool-use-id>bg</tool-use-id></task-notification>"
    history += [answer("it runs"), user(note)]
    turn = begin(sessions, chat(*history), 30, x_task_id="s")
    assert turn.gap is not None
    assert (turn.gap.kind, turn.gap.seconds) == ("background", 28)
    sessions.end(turn, outcome(), 31)
    assert session.idle_kind == "human"
    assert not session.background


def test_a_background_command_that_was_refused_is_not_waited_for() -> None:
    sessions = store()
    turn = begin(sessions, request("messages", messages=[user("a")]), x_task_id="s")
    sessions.end(turn, outcome(call("Bash", '{"run_in_background":true}', "bg")), 1)
    refused = {"type": "tool_result", "tool_use_id": "bg", "is_error": True, "content": "no"}
    messages = [user("a"), answer(), {"role": "user", "content": [refused]}]
    whole_turn(sessions, request("messages", messages=messages), now=2, x_task_id="s")
    assert turn.session.idle_kind == "human"


def test_a_person_who_comes_back_cancels_planned_wake_ups() -> None:
    sessions = store()
    turn = begin(sessions, chat(user("a")), x_task_id="s")
    sessions.end(turn, outcome(call("ScheduleWakeup", '{"delaySeconds":60}', "w")), 1)
    history = [user("a"), answer("", "w"), result("w")]
    session = whole_turn(sessions, chat(*history), now=2, x_task_id="s").session
    assert session.idle_kind == "background"
    whole_turn(sessions, chat(*history, answer(), user("hello?")), now=9, x_task_id="s")
    assert session.idle_kind == "human"


def test_background_calls_are_few_and_short() -> None:
    sessions = store()
    results = [result(f"b{i}", STARTED) for i in range(2 * BACKGROUND_KEPT)]
    turn = begin(sessions, chat(*results, result("x" * 10_000, STARTED)))
    assert len(turn.session.background) == BACKGROUND_KEPT
    many = [call("Monitor", call_id=f"m{i}") for i in range(2 * BACKGROUND_KEPT)]
    sessions.end(turn, outcome(*many, call("Monitor", call_id="y" * 10_000)), 1)
    assert len(turn.session.background) == BACKGROUND_KEPT
    assert max(map(len, turn.session.background)) <= MAX_ID_CHARS


def test_tokens_are_reckoned_at_the_rate_the_pod_reported() -> None:
    sessions = store()
    turn = whole_turn(sessions, chat(user("a" * 4_000)), x_task_id="s")
    assert turn.session.tokens_per_byte == pytest.approx(1000 / turn.change.total_bytes)
    again = begin(sessions, chat(user("a" * 4_000)), x_task_id="s")
    assert again.prompt_tokens == again.same_tokens == 1000
    broken = begin(sessions, chat(user("b" * 4_000)), x_task_id="s")
    assert (broken.session.breaks, broken.change.cause) == (1, "edit")
    assert broken.session.lost_tokens == broken.lost_tokens > 900


# -- bounds ---------------------------------------------------------------------------------------


def test_the_least_recently_seen_idle_session_leaves_first() -> None:
    sessions = store(max_sessions=3)
    running = begin(sessions, chat(user("0")), 0, x_task_id="s0")
    for number in (1, 2):
        whole_turn(sessions, chat(user("x")), now=number, x_task_id=f"s{number}")
    whole_turn(sessions, chat(user("x")), now=3, x_task_id="s1")
    whole_turn(sessions, chat(user("x")), now=4, x_task_id="s4")
    assert [s.key.split(":")[1] for s in sessions] == ["s0", "s1", "s4"]
    assert sessions.evicted_total == 1
    sessions.end(running, outcome(), 5)


def test_sessions_in_flight_are_never_evicted_even_beyond_the_bound() -> None:
    sessions = store(max_sessions=1)
    turns = [begin(sessions, chat(user(str(i))), i, x_task_id=f"s{i}") for i in range(4)]
    assert len(sessions) == 4
    for turn in turns:
        sessions.end(turn, outcome("c"), 9)
    last = whole_turn(sessions, chat(user("z")), now=10, x_task_id="z")
    assert list(sessions) == [last.session]
    assert len(sessions._tails) == 2  # of a request with one message
    assert len(sessions._by_sid) == 1


def test_a_long_turn_does_not_keep_older_sessions_from_expiring() -> None:
    sessions = store(ttl_s=10)
    long = begin(sessions, chat(user("a")), 0, x_task_id="long")
    short = whole_turn(sessions, chat(user("a")), now=1, x_task_id="short")
    assert sessions.expire(10.5) == []
    assert sessions.expire(12) == [short.session]
    sessions.end(long, outcome(), 20)
    assert sessions.expire(25) == []
    assert sessions.expire(30) == [long.session]
    assert len(sessions) == 0


names = st.sampled_from(["a", "b", "c", "d", "e", None])
call_ids = st.lists(st.sampled_from([f"call-{i}" for i in range(8)]), max_size=3, unique=True)


class Store(RuleBasedStateMachine):
    """Begins, ends, aborts, expiry and eviction in any order: the books stay right."""

    MAX = 4
    TTL_S = 50.0

    def __init__(self) -> None:
        super().__init__()
        self.sessions = SessionStore(self.MAX, self.TTL_S)
        self.now = 0.0
        self.turns: list[Turn] = []
        self.histories: dict[int, list[dict[str, Any]]] = {}
        self.rested: dict[int, float] = {}
        """When a session's last response ended cleanly with no arrival since."""
        self.kept: list[Session] = []
        """All sessions seen, so that no id() is used twice."""
        self.number = 0

    def running(self, session: Session) -> int:
        return sum(turn.session is session for turn in self.turns)

    @rule(name=names, scope=st.integers(1, 2), tools=st.booleans(), kind=st.integers(0, 3))
    def begin(self, name: str | None, scope: int, tools: bool, kind: int) -> None:
        headers = {b"x-session-id": name.encode()} if name is not None else {}
        if name is not None and kind == 3:
            headers[b"x-parent-session-id"] = b"a"
        self.number += 1
        history = [system(), user(f"task {self.number if kind == 1 else 0}")]
        self._begin(headers, chat(*history, tools=tools), history, scope)

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), anonymous=st.booleans())
    def go_on(self, data: st.DataObject, anonymous: bool) -> None:
        session = data.draw(st.sampled_from(self.kept))
        history = list(self.histories[id(session)])
        history.append(answer("done", *session.calls))
        history += [result(call_id) for call_id in session.calls] or [user("next")]
        headers = {}
        if not anonymous and session.source == "x-session-id":
            headers[b"x-session-id"] = session.key.split(":", 1)[1].split("#")[0].encode()
        self._begin(headers, chat(*history), history, session.scope)

    def _begin(
        self,
        headers: dict[bytes, bytes],
        made: TurnRequest,
        history: list[dict[str, Any]],
        scope: int,
    ) -> None:
        turn = self.sessions.begin(headers, made, f"tenant-{scope}", scope, self.now)
        session = turn.session
        assert session.scope == scope
        rested = self.rested.pop(id(session), None)
        if rested is None or self.running(session):
            assert turn.gap is None
        else:
            assert turn.gap is not None
            assert turn.gap.seconds == self.now - rested
        self.turns.append(turn)
        if all(known is not session for known in self.kept):
            self.kept.append(session)
        self.histories[id(session)] = history
        in_flight = sum(s.in_flight > 0 for s in self.sessions)
        assert len(self.sessions) <= max(self.MAX, in_flight)

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), ids=call_ids, response=st.none() | st.integers(0, 9))
    def end(self, data: st.DataObject, ids: list[str], response: int | None) -> None:
        turn = self.turns.pop(data.draw(st.integers(0, len(self.turns) - 1)))
        response_id = f"resp-{response}" if response is not None else None
        self.sessions.end(turn, outcome(*ids, response_id=response_id), self.now)
        self.rested[id(turn.session)] = self.now

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        turn = self.turns.pop(data.draw(st.integers(0, len(self.turns) - 1)))
        failed: TurnOutcome | None = None
        self.sessions.end(turn, failed, self.now)

    @rule(seconds=st.sampled_from([0.5, 7.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        for session in self.sessions.expire(self.now):
            assert not session.in_flight
            assert session.seen_at <= self.now - self.TTL_S
        assert all(s.in_flight or s.seen_at > self.now - self.TTL_S for s in self.sessions)

    @invariant()
    def the_books_are_right(self) -> None:
        store = self.sessions
        keys = set(store._sessions)
        for session in self.kept:
            assert session.in_flight == self.running(session) >= 0
            assert len(session.gaps) <= GAPS_KEPT
        for turn in self.turns:
            assert store._sessions.get(turn.session.key) is turn.session
        assert store._by_sid == {s.sid: s.key for s in store}
        seen = [s.seen_at for s in store]
        assert seen == sorted(seen)
        assert len(store._issued) <= 4 * self.MAX
        for place, key in store._issued.items():
            assert key is None or place.split(":", 1)[1] in store._sessions[key].calls
        assert set(store._responses.values()) <= keys
        assert len(store._responses) <= RESPONSES_KEPT * len(store)
        owners = store._tails._owners
        assert {key for found in owners.values() for key in found} <= keys
        assert len(owners) <= TailIndex.LINKS * len(store)
        assert len(store._distrust) <= 1024

    def teardown(self) -> None:
        for turn in self.turns:
            self.sessions.end(turn, None, self.now)
        self.sessions.expire(self.now + self.TTL_S)
        store = self.sessions
        assert len(store) == len(store._by_sid) == len(store._tails) == len(store._responses) == 0
        assert not any(store._issued.values())
        assert all(session.in_flight == 0 for session in self.kept)


Store.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestStore = Store.TestCase


def test_a_session_is_small() -> None:
    """10,000 sessions of 100k tokens must fit 300 MB: arrays of numbers, not texts."""
    sessions = store()
    history = [user("x" * 2_000) for _ in range(200)]
    turn = whole_turn(sessions, chat(*history), x_task_id="s")
    prefix = turn.session.prefix
    assert prefix is not None
    numbers = (prefix.raw, prefix.chain, prefix.end_bytes)
    assert sum(array.buffer_info()[1] * array.itemsize for array in numbers) <= 20 * 210
    assert len(orjson.dumps(turn.session.last_user_text)) <= 210


# -- several replicas of the gateway ---------------------------------------------------------------


def history(turns: int, first: str = "mend it") -> list[dict[str, Any]]:
    """A conversation of so many answered turns, each with a call ``<first>-<n>``."""
    messages = [system(), user(first)]
    for n in range(turns):
        messages += [answer("", f"{first}-{n}"), result(f"{first}-{n}")]
    return messages


def test_replicas_call_a_named_session_alike() -> None:
    turns = [begin(store(), chat(user("hi")), x_session_id="s") for _ in range(2)]
    (one, other) = (turn.session for turn in turns)
    assert one.sid == other.sid == one.affinity == other.affinity


def test_replicas_call_an_unnamed_session_alike_whichever_turn_they_see_first() -> None:
    turns = [begin(store(), chat(*history(n))) for n in range(4)]
    assert len({turn.session.affinity for turn in turns}) == 1
    assert len({turn.session.sid for turn in turns}) == 4
    other_words = begin(store(), chat(*history(1, "break it")))
    other_scope = begin(store(), chat(*history(1)), scope=SCOPE + 1)
    names = {t.session.affinity for t in (turns[0], other_words, other_scope)}
    assert len(names) == 3


@pytest.mark.parametrize("named", [{}, {"x_session_id": "s"}])
def test_a_session_that_another_replica_has_served_is_resumed(named: dict[str, str]) -> None:
    sessions = store()
    assert not begin(store(), chat(*history(0)), **named).resumed
    assert begin(sessions, chat(*history(3)), **named).resumed
    assert not whole_turn(store(), chat(*history(0)), "mend it-0", **named).resumed


def test_a_turn_served_elsewhere_in_between_is_noticed() -> None:
    sessions = store()
    for n in range(2):
        assert not whole_turn(sessions, chat(*history(n)), f"mend it-{n}", x_session_id="s").resumed
    assert whole_turn(sessions, chat(*history(3)), "mend it-3", x_session_id="s").resumed
    assert not whole_turn(sessions, chat(*history(4)), x_session_id="s").resumed


def test_a_turn_sent_again_or_broken_off_is_not_taken_for_one_served_elsewhere() -> None:
    sessions = store()
    whole_turn(sessions, chat(*history(0)), "mend it-0", x_session_id="s")
    for _ in range(2):
        turn = begin(sessions, chat(*history(1)), x_session_id="s")
        assert not turn.resumed
        sessions.end(turn, None, 0)


def test_a_fork_is_not_resumed() -> None:
    sessions = store()
    whole_turn(sessions, chat(*history(1)), "mend it-1", x_session_id="s")
    fork = begin(sessions, chat(*history(2)), x_session_id="t")
    assert fork.forked_from is not None
    assert not fork.resumed
