"""What OpenAI's clients read: whole answers, and the chunks of streamed ones."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pe_onnx.server.choices import Choice, Piece, first_of_each_prompt
from pe_onnx.server.scheduler import Likelihoods
from pe_onnx.tokenizer import Tokenizer

Json = dict[str, Any]
Told = Sequence[tuple[int, Likelihoods]]


class Answers(ABC):
    """The form of the answers to one request."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice]) -> Json:
        """The answer of a request that does not stream."""
        listed = [self._whole(choice) for choice in choices]
        return {**self._head, "object": self.whole_object, "choices": listed, "usage": usage(choices)}

    def chunk(self, choice: Choice, piece: Piece) -> Json:
        """What a piece of text adds."""
        return self._chunk([self._piece(choice, piece)])

    def opening(self, choice: Choice) -> Json | None:
        """What comes before the first piece, if anything."""
        return None

    def closing(self, choices: Sequence[Choice]) -> Json:
        """The chunk behind the last, with the usage."""
        return self._chunk([]) | {"usage": usage(choices)}

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    @abstractmethod
    def _whole(self, choice: Choice) -> Json: ...

    @abstractmethod
    def _piece(self, choice: Choice, piece: Piece) -> Json: ...


class CompletionAnswers(Answers):
    """Of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(model, tokenizer)
        self._offsets: dict[int, int] = {}
        """Of each choice the characters of its tokens so far."""

    def opening(self, choice: Choice) -> Json | None:
        if not choice.echo:
            return None
        return self._chunk([{"index": choice.index, "text": choice.echo, "logprobs": None, "finish_reason": None}])

    def _whole(self, choice: Choice) -> Json:
        logprobs = self._logprobs(choice, choice.likelihoods) if choice.work.top_logprobs is not None else None
        return {"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish}

    def _piece(self, choice: Choice, piece: Piece) -> Json:
        logprobs = self._logprobs(choice, piece.likelihoods) if piece.likelihoods else None
        return {"index": choice.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, choice: Choice, told: Told) -> Json:
        texts, offsets = [self._text(token) for token, _ in told], []
        offset = self._offsets.get(choice.index, len(choice.echo))
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[choice.index] = offset
        tops: list[dict[str, float]] = [{} for _ in told]
        for top, (_, likely) in zip(tops, told, strict=True):
            for token, value in likely.top:
                top.setdefault(self._text(token), value)
        return {
            "tokens": texts,
            "token_logprobs": [likely.chosen for _, likely in told],
            "top_logprobs": tops if choice.work.top_logprobs else None,
            "text_offset": offsets,
        }


class ChatAnswers(Answers):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, choice: Choice) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _whole(self, choice: Choice) -> Json:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.likelihoods) if choice.work.top_logprobs is not None else None,
            "finish_reason": choice.finish,
        }

    def _piece(self, choice: Choice, piece: Piece) -> Json:
        return {
            "index": choice.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.likelihoods) if piece.likelihoods else None,
            "finish_reason": piece.finish,
        }

    def _logprobs(self, told: Told) -> Json:
        content = [
            self._entry(token, likely.chosen) | {"top_logprobs": [self._entry(*one) for one in likely.top]}
            for token, likely in told
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self._text(token)
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if "\ufffd" in text else list(text.encode()),  # part of a character has no bytes of its own
        }


def usage(choices: Sequence[Choice]) -> Json:
    """Tokens of a request; prompts count once, however many answers they have."""
    prompts = first_of_each_prompt(choices)
    prompt_tokens = sum(len(work.prompt) for work in prompts)
    new = sum(len(choice.tokens) for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": sum(work.reused_tokens for work in prompts)},
    }
