"""One answer under way: the text of its tokens, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pe_onnx.server.scheduler import Event, Likelihoods, Work
from pe_onnx.tokenizer import TextStream


class Piece(NamedTuple):
    """What an event added to an answer."""

    text: str
    likelihoods: list[tuple[int, Likelihoods]]
    """Token ids and what was likely."""
    finish: str | None


@dataclass(eq=False)
class Choice:
    """The answer of one ``Work``."""

    index: int
    work: Work
    stream: TextStream
    echo: str
    """Text to begin with: the prompt, where it was asked for."""
    tokens: list[int] = field(default_factory=list)
    likelihoods: list[tuple[int, Likelihoods]] = field(default_factory=list)
    finish: str | None = None
    """``stop`` or ``length``; ``timeout``, ``error`` and ``closed`` are no answers."""
    message: str | None = None
    """Why there is none, for the log."""

    @property
    def text(self) -> str:
        return self.echo + self.stream.text

    def take(self, event: Event) -> Piece:
        """Add an event; nothing once the answer has ended, by a stop string for one."""
        if self.finish:
            return Piece("", [], None)
        text, likelihoods = "", []
        if event.token is not None:
            self.tokens.append(event.token)
            if event.token not in self.work.ends:
                text = self.stream.push(event.token)
                if event.likelihoods is not None:
                    likelihoods.append((event.token, event.likelihoods))
        if self.stream.stopped:
            self.finish = "stop"
        elif event.finish:
            self.finish, self.message = event.finish, event.message
            text += self.stream.finish()
            if self.stream.stopped:
                self.finish = "stop"
        self.likelihoods += likelihoods
        return Piece(text, likelihoods, self.finish)


def first_of_each_prompt(choices: Sequence[Choice]) -> list[Work]:
    """Of the answers to a prompt the first, which ran it; the others took over what it had computed."""
    first: dict[int, Work] = {}
    for choice in choices:
        first.setdefault(id(choice.work.prompt), choice.work)
    return list(first.values())
