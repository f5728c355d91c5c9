"""An answer as tokens, and as the pieces a client sees while they are generated."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gateway.embedded.prompt import (
    BYTES_PER_TOKEN,
    CALL,
    END_OF_MESSAGE,
    END_THINK,
    THINK,
    Call,
    Message,
    TokenSequence,
    block_hashes,
    render_body,
)
from gateway.embedded.script import PlannedTurn

FinishReason = Literal["stop", "length", "tool_calls"]
Kind = Literal["reasoning", "text", "name", "arguments"]
_FILLER = "the embedded pod counts tokens and blocks as the engine does "


class Delta(NamedTuple):
    """A part of the answer that became visible; `call` numbers the tool calls from 0."""

    kind: Kind
    text: str
    call: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    kind: Kind
    data: bytes
    start: int
    call: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class Answer:
    """A planned answer, cut to `max_tokens`."""

    def __init__(self, turn: PlannedTurn, max_tokens: int) -> None:
        message = _lengthen(turn.message, turn.output_tokens)
        whole = render_body(message)
        self.body = whole[: max_tokens * BYTES_PER_TOKEN]
        self.output_tokens = len(self.body) // BYTES_PER_TOKEN
        self.reasoning_tokens = min(
            len(message.reasoning.encode()) // BYTES_PER_TOKEN, self.output_tokens
        )
        self._pieces = list(_pieces(message))
        self.finish_reason: FinishReason = (
            "length" if len(self.body) < len(whole) else "tool_calls" if message.calls else "stop"
        )

    def tokens(self, prompt: bytes, block_size_tokens: int) -> TokenSequence:
        """Prompt and answer for the engine."""
        return TokenSequence(
            len(prompt) // BYTES_PER_TOKEN,
            self.output_tokens,
            block_hashes(prompt + self.body, block_size_tokens),
        )

    def deltas(self) -> Reader:
        return Reader(self._pieces)

    def message(self) -> Message:
        """The answer as far as it was generated; a call that was cut short is left out."""
        texts: dict[Kind, str] = {"reasoning": "", "text": ""}
        names: list[str] = []
        calls: list[Call] = []
        for piece in self._pieces:
            if piece.kind in texts:
                cut = piece.data[: max(0, len(self.body) - piece.start)]
                texts[piece.kind] = cut.decode(errors="ignore")
            elif piece.kind == "name":
                names.append(piece.data.decode())
            elif piece.end <= len(self.body):
                calls.append(Call(names[piece.call], piece.data))
        return Message("assistant", texts["text"], texts["reasoning"], tuple(calls))


class Reader:
    """Turns the growing number of generated tokens into deltas, each character once and whole."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self._pieces = pieces
        self._at = 0
        self._sent = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def advance(self, generated_tokens: int) -> list[Delta]:
        """What `generated_tokens` tokens show beyond what was shown before."""
        reached = generated_tokens * BYTES_PER_TOKEN
        deltas: list[Delta] = []
        while self._at < len(self._pieces):
            piece = self._pieces[self._at]
            complete = reached >= piece.end
            if reached <= piece.start or (piece.kind == "name" and not complete):
                break
            shown = max(0, self._sent - piece.start)
            text = self._decoder.decode(piece.data[shown : reached - piece.start], complete)
            if text:
                deltas.append(Delta(piece.kind, text, piece.call))
            self._sent = min(reached, piece.end)
            if not complete:
                break
            self._at += 1
        return deltas


def _pieces(message: Message) -> Iterator[_Piece]:
    """The visible parts of `render_body(message)`, with their places in it."""
    at = 0
    if message.reasoning:
        data = message.reasoning.encode(errors="replace")
        at += len(THINK)
        yield _Piece("reasoning", data, at)
        at += len(data) + len(END_THINK)
    if message.text:
        data = message.text.encode(errors="replace")
        yield _Piece("text", data, at)
        at += len(data)
    for index, call in enumerate(message.calls):
        name = call.name.encode(errors="replace")
        at += len(CALL)
        yield _Piece("name", name, at, index)
        at += len(name) + 1
        yield _Piece("arguments", call.arguments, at, index)
        at += len(call.arguments)


def _lengthen(message: Message, output_tokens: int | None) -> Message:
    if output_tokens is None:
        return message
    missing = (output_tokens * BYTES_PER_TOKEN) - len(render_body(message))
    if message.text == "" and missing <= 0:
        return message
    # render_body pads: the text may grow by the padding and still take the same tokens.
    padding = len(render_body(message).rpartition(END_OF_MESSAGE)[2])
    missing += padding
    filler = (_FILLER * (max(0, missing) // len(_FILLER) + 1))[: max(0, missing)]
    return message._replace(text=message.text + filler)
