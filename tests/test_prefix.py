"""The prefix index: what counts as the same, what is parsed, why it broke, who can be found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.dialects.turn import TurnRequest
from gateway.prefix import HEAD_SEGMENTS, Prefix, TailIndex, advance, raw_hashes, seed_of
from tests.requests_made import BASH, answer, chat, request, result, system, user


def prefix_of(made: TurnRequest) -> Prefix:
    return advance(None, made)[0]


def same(a: TurnRequest, b: TurnRequest) -> bool:
    first, second = prefix_of(a), prefix_of(b)
    if first.chain == second.chain:
        assert first.end_bytes == second.end_bytes
        return True
    return False


# -- what counts as the same ----------------------------------------------------------------------

TEXT = {"type": "text", "text": "fix it"}
CACHED = {"cache_control": {"type": "ephemeral"}}
BILLING = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.330.44e;"}
TOOL = {"name": "Bash", "input_schema": {"type": "object"}}


def messages(*content: Any, **body: Any) -> TurnRequest:
    return request("messages", messages=[{"role": "user", "content": c} for c in content], **body)


def tool_result(content: Any, **more: Any) -> list[Any]:
    return [{"type": "tool_result", "tool_use_id": "t", "content": content, **more}]


def responses(*items: Any, **body: Any) -> TurnRequest:
    return request("responses", input=list(items), **body)


EQUIVALENT = {
    "cache_control moves": (
        messages([TEXT | CACHED], "b"),
        messages([TEXT], [TEXT | {"text": "b"} | CACHED]),
    ),
    "cache_control on a tool": (messages("a", tools=[TOOL]), messages("a", tools=[TOOL | CACHED])),
    "cache_control on the system": (
        messages("a", system=[TEXT | CACHED]),
        messages("a", system=[TEXT]),
    ),
    "cache_control on a tool result": (
        messages(tool_result("x")),
        messages(tool_result("x", **CACHED)),
    ),
    "cache_control inside a tool result": (
        messages(tool_result([TEXT])),
        messages(tool_result([TEXT | CACHED])),
    ),
    "a string is one text block": (messages("fix it"), messages([TEXT])),
    "a string is one text block in a tool result": (
        messages(tool_result("fix it")),
        messages(tool_result([TEXT])),
    ),
    "a string is one text block in the system": (
        messages("a", system="fix it"),
        messages("a", system=[TEXT]),
    ),
    "the attribution block": (
        messages("a", system=[BILLING, TEXT]),
        messages("a", system=[BILLING | {"text": BILLING["text"] + " other"}, TEXT]),
    ),
    "no attribution block": (messages("a", system=[BILLING, TEXT]), messages("a", system=[TEXT])),
    "no system": (messages("a", system=None), messages("a")),
    "an empty system": (messages("a", system=[BILLING]), messages("a", system="")),
    "no tools": (messages("a", tools=[]), messages("a", tools=None)),
    "key order": (
        messages("a", tools=[{"name": "n", "input_schema": {}}]),
        messages("a", tools=[{"input_schema": {}, "name": "n"}]),
    ),
    "chat blocks": (chat(user("hi")), chat(user([{"type": "text", "text": "hi"}]))),  # type: ignore[arg-type]
    "chat cache_control": (chat(user("hi") | CACHED), chat(user("hi"))),
    "chat without content": (
        chat({"role": "assistant", "content": None}),
        chat({"role": "assistant"}),
    ),
    "chat functions": (
        request("chat", messages=[], functions=[BASH]),
        request("chat", messages=[], tools=[BASH]),
    ),
    "item ids and statuses": (
        responses({"type": "function_call", "call_id": "c", "id": "fc_1", "status": "completed"}),
        responses({"type": "function_call", "call_id": "c"}),
    ),
    "an item's type may be left out": (
        responses({"role": "user", "content": "a"}),
        responses({"type": "message", "role": "user", "content": "a"}),
    ),
    "input and output text": (
        responses({"role": "user", "content": [{"type": "input_text", "text": "a"}]}),
        responses({"role": "user", "content": "a"}),
    ),
    "annotations": (
        responses(
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "a", "annotations": []}],
            }
        ),
        responses({"role": "assistant", "content": "a"}),
    ),
    "input as a string": (
        request("responses", input="a"),
        responses({"role": "user", "content": "a"}),
    ),
    "sampling fields": (chat(user("hi"), temperature=1, max_tokens=3), chat(user("hi"))),
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_equal_meaning_gives_equal_chains(name: str) -> None:
    one, other = EQUIVALENT[name]
    assert same(one, other)


DIFFERENT = {
    "the text": (chat(user("hi")), chat(user("hi "))),
    "the role": (chat(user("hi")), chat(answer("hi"))),
    "the model": (chat(user("hi")), chat(user("hi"), model="other")),
    "a tool": (chat(user("hi")), chat(user("hi"), tools=False)),
    "a call's id": (chat(answer("", "a")), chat(answer("", "b"))),
    "a result's call": (chat(result("a")), chat(result("b"))),
    "two blocks are not one": (
        messages([TEXT, TEXT]),
        messages([TEXT | {"text": "fix itfix it"}]),
    ),
    "two messages are not one": (messages([TEXT, TEXT]), messages([TEXT], [TEXT])),
    "attribution beside other text": (
        messages("a", system="x x-anthropic-billing-header: 1"),
        messages("a", system="x x-anthropic-billing-header: 2"),
    ),
    "an error of a tool": (messages(tool_result("x")), messages(tool_result("x", is_error=True))),
    "instructions": (responses(instructions="a"), responses(instructions="b")),
    "reasoning": (
        responses({"type": "reasoning", "encrypted_content": "a"}),
        responses({"type": "reasoning", "encrypted_content": "b"}),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_meaning_gives_another_chain(name: str) -> None:
    one, other = DIFFERENT[name]
    assert not same(one, other)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
ids = st.sampled_from(["a", "b", "c"])
chat_messages = st.one_of(
    texts.map(user),
    texts.map(system),
    st.builds(answer, texts, ids),
    st.builds(answer, texts),
    st.builds(result, ids, texts),
)
histories = st.lists(chat_messages, min_size=1, max_size=8)


@given(histories, histories)
@settings(max_examples=100, deadline=None)
def test_chains_agree_exactly_as_far_as_the_histories_do(
    one: list[dict[str, Any]], other: list[dict[str, Any]]
) -> None:
    first, second = prefix_of(chat(*one)), prefix_of(chat(*one[: len(one) // 2], *other))
    mine, theirs = one, [*one[: len(one) // 2], *other]
    common = 0
    while common < min(len(mine), len(theirs)) and mine[common] == theirs[common]:
        common += 1
    shared = sum(a == b for a, b in zip(first.chain, second.chain, strict=False))
    assert shared == HEAD_SEGMENTS + common


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every string in a JSON value."""
    if isinstance(value, dict):
        return [p for key, inner in value.items() for p in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [p for i, inner in enumerate(value) for p in leaves(inner, (*path, i))]
    return [path] if isinstance(value, str) else []


@given(histories, st.data())
@settings(max_examples=100, deadline=None)
def test_a_change_of_any_string_of_a_message_changes_the_chain_from_there_on(
    history: list[dict[str, Any]], data: st.DataObject
) -> None:
    *path, last = data.draw(st.sampled_from(leaves(history)))
    changed = copy.deepcopy(history)
    parent: Any = changed
    for step in path:
        parent = parent[step]
    parent[last] += "!"
    before, after = prefix_of(chat(*history)), prefix_of(chat(*changed))
    at = HEAD_SEGMENTS + (path[0] if path else last)
    assert before.chain[:at] == after.chain[:at]
    assert all(a != b for a, b in zip(before.chain[at:], after.chain[at:], strict=True))


# -- only what changed is parsed ------------------------------------------------------------------


class Counting(TurnRequest):
    """A request that notes which segments are looked into."""

    def item(self, index: int) -> Any:
        looked.append(index)
        return super().item(index)


looked: list[int] = []


def counting(made: TurnRequest) -> TurnRequest:
    looked.clear()
    return Counting(made.wire, made.model, made.stream, made.segments, made.look, made.ids)


def test_a_turn_parses_only_its_new_messages() -> None:
    history = [system(), user("a"), answer("", "c1"), result("c1")]
    before, _ = advance(None, chat(*history))
    now, change = advance(before, counting(chat(*history, answer("", "c2"), result("c2"))))
    assert looked == [6, 7]
    assert (change.same, change.cause, change.lost_bytes) == (6, None, 0)
    assert change.same_bytes == before.total_bytes
    assert change.total_bytes == now.total_bytes > before.total_bytes


def test_a_moved_cache_control_costs_parsing_but_breaks_nothing() -> None:
    first = messages("a", [TEXT | CACHED])
    before = prefix_of(first)
    now, change = advance(before, counting(messages("a", [TEXT], [TEXT | CACHED])))
    assert looked == [3, 4]
    assert (change.same, change.cause) == (4, None)
    assert now.chain[:4] == before.chain


@given(st.lists(histories, min_size=2, max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_advancing_equals_starting_anew(
    parts: list[list[dict[str, Any]]], data: st.DataObject
) -> None:
    history: list[dict[str, Any]] = []
    prefix: Prefix | None = None
    for part in parts:
        edit = data.draw(st.sampled_from(["append", "cut", "replace", "insert", "tools", "model"]))
        at = data.draw(st.integers(0, len(history)))
        match edit:
            case "cut" if at:
                history = history[:at]
            case "replace":
                history = [*history[:at], part[0], *history[at + 1 :]]
            case "insert":
                history = [*history[:at], *part, *history[at:]]
            case _:
                history = history + part
        made = chat(
            *history, tools=edit != "tools", **({"model": "other"} if edit == "model" else {})
        )
        before = prefix
        prefix, change = advance(before, made)
        fresh = prefix_of(made)
        assert prefix.chain == fresh.chain
        assert prefix.end_bytes == fresh.end_bytes
        assert prefix.raw == fresh.raw
        assert change.total_bytes == fresh.total_bytes
        if before is None:
            assert change.same == 0
            continue
        agree = sum(a == b for a, b in zip(before.chain, fresh.chain, strict=False))
        assert change.same == agree
        assert change.same_bytes == (fresh.end_bytes[agree - 1] if agree else 0)
        assert (change.cause is None) == (agree == len(before))
        if change.cause is not None:
            assert change.lost_bytes == before.total_bytes - change.same_bytes


# -- why it broke ---------------------------------------------------------------------------------

LONG = [system(), *(m for i in range(8) for m in (user(f"q{i}"), answer(f"a{i}")))]


@pytest.mark.parametrize(
    ("cause", "before", "after"),
    [
        (None, chat(*LONG), chat(*LONG, user("next"))),
        (None, chat(*LONG), chat(*LONG)),
        ("model", chat(*LONG), chat(*LONG, model="other")),
        ("tools", chat(*LONG), chat(*LONG, tools=False)),
        ("system", messages("a", system="s"), messages("a", system="t")),
        ("system", responses(instructions="s"), responses(instructions="t")),
        ("truncation", chat(*LONG), chat(*LONG[:5])),
        ("edit", chat(*LONG), chat(*LONG[:-1], answer("other"))),
        ("edit", chat(*LONG), chat(system(), user("other"), *LONG[2:])),
        ("edit", chat(system(), user("a"), answer("b")), chat(system(), user("x"), answer("b"))),
        ("compaction", chat(*LONG), chat(system(), user("The story so far."))),
        ("compaction", chat(*LONG), chat(system(), user("So far."), answer("Go on."), user("go"))),
    ],
)
def test_the_cause_of_a_break(cause: str | None, before: TurnRequest, after: TurnRequest) -> None:
    _, change = advance(prefix_of(before), after)
    assert change.cause == cause
    assert (change.lost_bytes > 0) == (cause is not None)


# -- chains are found by their tails --------------------------------------------------------------

Q = [system(), user("q")]


def test_a_chain_is_found_by_a_request_that_extends_it() -> None:
    index = TailIndex(limit=100)
    index.register(1, prefix_of(chat(*Q)), "k")
    longer = prefix_of(chat(*Q, answer("a"), user("b")))
    assert list(index.find(1, longer)) == [("k", 4), ("k", 3)]
    rewritten = prefix_of(chat(system(), user("q without a reminder"), answer("a"), user("b")))
    assert list(index.find(1, rewritten)) == [("k", 3)]
    assert list(index.find(1, prefix_of(chat(user("q"), answer("a"))))) == []


def test_another_scope_finds_nothing() -> None:
    index = TailIndex(limit=100)
    index.register(1, prefix_of(chat(*Q)), "k")
    assert list(index.find(2, prefix_of(chat(*Q, answer("a"))))) == []
    index.forget(2, prefix_of(chat(*Q)), "k")
    assert len(index) == TailIndex.LINKS


def test_several_owners_latest_first_and_few() -> None:
    index = TailIndex(limit=100)
    prefix = prefix_of(chat(*Q))
    for number in range(TailIndex.MAX_OWNERS + 3):
        index.register(1, prefix, f"k{number}")
    whole = [key for key, shared in index.find(1, prefix) if shared == len(prefix)]
    assert whole == ["k6", "k5", "k4", "k3"]


def test_the_oldest_links_leave_first() -> None:
    index = TailIndex(limit=2 * TailIndex.LINKS)
    prefixes = [prefix_of(chat(system(str(i)), user("q"))) for i in range(4)]
    for number, prefix in enumerate(prefixes):
        index.register(1, prefix, f"k{number}")
    assert len(index) == 2 * TailIndex.LINKS
    assert [bool(list(index.find(1, prefix))) for prefix in prefixes] == [False, False, True, True]


@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), st.sampled_from("abcdef"), histories), max_size=12)
)
@settings(max_examples=60, deadline=None)
def test_forgetting_leaves_nothing(steps: list[tuple[int, str, list[dict[str, Any]]]]) -> None:
    index = TailIndex(limit=1000)
    held: dict[tuple[int, str], Prefix] = {}
    for scope, key, history in steps:
        if (scope, key) in held:
            index.forget(scope, held[scope, key], key)
        prefix = held[scope, key] = prefix_of(chat(*history))
        index.register(scope, prefix, key)
        assert (key, len(prefix)) in list(index.find(scope, prefix))
    for (scope, key), prefix in held.items():
        index.forget(scope, prefix, key)
        assert all(k != key for k, _ in index.find(scope, prefix))
    assert len(index) == 0


def test_two_prefixes_of_different_models_share_nothing() -> None:
    one, other = prefix_of(chat(*Q)), prefix_of(chat(*Q, model="other"))
    assert not set(one.chain) & set(other.chain)


def test_a_request_that_extends_another_byte_for_byte_is_found_without_parsing() -> None:
    index = TailIndex(limit=100)
    index.register(1, prefix_of(chat(*Q)), "k")
    longer = chat(*Q, answer("a"), user("more"))
    assert index.find_raw(1, seed_of(longer), raw_hashes(longer)) == ("k", 2 + len(Q))
    assert not longer._items
    assert index.find_raw(2, seed_of(longer), raw_hashes(longer)) is None
    index.register(1, prefix_of(chat(*Q)), "twin")
    assert index.find_raw(1, seed_of(longer), raw_hashes(longer)) is None, "which of the two?"
