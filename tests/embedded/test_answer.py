from hypothesis import given
from hypothesis import strategies as st

from gateway.embedded.answer import Answer, Delta
from gateway.embedded.prompt import BYTES_PER_TOKEN, Call, Message, render_body
from gateway.embedded.script import PlannedTurn

NAMES = st.text("abc_é", min_size=1, max_size=6)
MESSAGES = st.builds(
    Message,
    st.just("assistant"),
    st.text(max_size=30),
    st.text(max_size=30),
    st.lists(st.builds(Call, NAMES, st.just('{"path":"ä/b"}'.encode())), max_size=3).map(tuple),
)


def joined(deltas: list[Delta], kind: str, call: int = 0) -> str:
    return "".join(d.text for d in deltas if d.kind == kind and d.call == call)


@given(MESSAGES, st.lists(st.integers(1, 5), min_size=60, max_size=60))
def test_deltas_add_up_to_the_answer_however_the_tokens_come(
    message: Message, strides: list[int]
) -> None:
    answer = Answer(PlannedTurn(message), max_tokens=10_000)
    reader = answer.deltas()
    deltas: list[Delta] = []
    generated = 0
    for stride in [*strides, 10_000]:
        generated = min(generated + stride, answer.output_tokens)
        deltas += reader.advance(generated)
    assert answer.message() == message
    assert joined(deltas, "text") == message.text
    assert joined(deltas, "reasoning") == message.reasoning
    for index, call in enumerate(message.calls):
        assert joined(deltas, "name", index) == call.name
        assert joined(deltas, "arguments", index) == call.arguments.decode()
    assert sum(d.kind == "name" for d in deltas) == len(message.calls)
    assert answer.finish_reason == ("tool_calls" if message.calls else "stop")


@given(MESSAGES, st.integers(1, 40))
def test_a_cut_answer_shows_no_more_than_its_tokens(message: Message, max_tokens: int) -> None:
    answer = Answer(PlannedTurn(message), max_tokens)
    whole_tokens = len(render_body(message)) // BYTES_PER_TOKEN
    assert answer.output_tokens == min(whole_tokens, max_tokens)
    deltas = answer.deltas().advance(answer.output_tokens)
    cut = answer.message()
    assert joined(deltas, "text") == cut.text
    assert message.text.startswith(cut.text)
    assert message.calls[: len(cut.calls)] == cut.calls
    if max_tokens < whole_tokens:
        assert answer.finish_reason == "length"


@given(MESSAGES, st.integers(1, 200))
def test_output_tokens_lengthens_an_answer_to_that_many(message: Message, tokens: int) -> None:
    natural = Answer(PlannedTurn(message), 10_000).output_tokens
    answer = Answer(PlannedTurn(message, output_tokens=tokens), 10_000)
    assert answer.output_tokens == max(natural, tokens)
