"""From a request to what the scheduler runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pe_onnx.errors import InputError
from pe_onnx.sampling import Sampler, SamplingOptions
from pe_onnx.server.choices import Choice
from pe_onnx.server.options import ServerOptions
from pe_onnx.server.protocol import INT64, Asked, ChatRequest, CompletionRequest
from pe_onnx.server.scheduler import Work
from pe_onnx.tokenizer import TextStream, Tokenizer

DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16
"""Both as OpenAI's reference has them."""


class ParameterError(InputError):
    """A parameter of a request that is out of range, or goes with no other."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


class Asking:
    """Checks requests against a model and a server's limits.

    max_length: tokens of a slot. Methods raise InputError, ParameterError among them.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_length: int | None, options: ServerOptions) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.options = options

    def completion(self, request: CompletionRequest) -> list[Choice]:
        """One choice, or ``n``, for each prompt."""
        given = request.prompt
        prompts: Sequence[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        if request.echo and request.logprobs is not None:
            raise ParameterError("echo", "with logprobs is not supported: the prompt's logits are not kept")
        tokens = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
        limit = self.options.max_new_tokens or DEFAULT_COMPLETION_TOKENS
        wanted = request.max_tokens or min(DEFAULT_COMPLETION_TOKENS, limit)
        echoes = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts] if request.echo else None
        return self._choices(request, "prompt", tokens, wanted, request.logprobs, echoes)

    def chat(self, request: ChatRequest) -> list[Choice]:
        """One choice, or ``n``."""
        if request.top_logprobs is not None and not request.logprobs:
            raise ParameterError("top_logprobs", "needs logprobs = true")
        if self.tokenizer.chat_template is None:
            raise ParameterError("messages", "this model has no chat template; ask /v1/completions")
        text = self.tokenizer.apply_chat_template([message.plain for message in request.messages])
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        top = (request.top_logprobs or 0) if request.logprobs else None
        return self._choices(
            request, "messages", [tokens], request.max_completion_tokens or request.max_tokens, top, None
        )

    def _choices(
        self,
        request: Asked,
        param: str,
        prompts: Sequence[list[int]],
        wanted: int | None,
        top_logprobs: int | None,
        echoes: Sequence[str] | None,
    ) -> list[Choice]:
        n, most = request.n or 1, self.options.slots + self.options.max_queue
        if len(prompts) * n > most:
            raise ParameterError("n" if n > 1 else param, f"{len(prompts) * n} answers at once; at most {most}")
        for prompt in prompts:
            self._check_prompt(param, prompt)
        limit = self.options.max_new_tokens
        if wanted is not None and limit is not None and wanted > limit:
            name = "max_completion_tokens" if getattr(request, "max_completion_tokens", None) else "max_tokens"
            raise ParameterError(name, f"{wanted} is more than the {limit} that this server gives")
        temperature = request.temperature
        sampler = Sampler(
            SamplingOptions(
                temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
                top_k=request.top_k or 0,
                top_p=1.0 if request.top_p is None else request.top_p,
                min_p=request.min_p or 0.0,
                repetition_penalty=request.repetition_penalty or 1.0,
                seed=None if request.seed is None else request.seed % (INT64 + 1),
            ),
            len(prompts) * n,
        )
        bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
        if bias and max(bias) >= self.vocab_size:
            raise ParameterError("logit_bias", f"token id {max(bias)} must be in 0..{self.vocab_size - 1}")
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        ends = frozenset() if request.ignore_eos else self.tokenizer.eos_token_ids
        deadline = time.monotonic() + self.options.timeout_s
        choices = []
        for index in range(len(prompts) * n):
            prompt = prompts[index // n]
            room = (self.max_length or 2**62) - len(prompt) + 1  # the token after the last that fits is still chosen
            work = Work(
                prompt,
                min(room, wanted or limit or room),
                sampler,
                index,
                ends,
                top_logprobs,
                bias,
                request.presence_penalty or 0.0,
                request.frequency_penalty or 0.0,
                deadline,
            )
            text = TextStream(self.tokenizer, stop, prompt=prompt)
            choices.append(Choice(index, work, text, echoes[index // n] if echoes else ""))
        return choices

    def _check_prompt(self, param: str, prompt: list[int]) -> None:
        if not prompt:
            raise ParameterError(param, "has no tokens; give at least one")
        for limit in (self.options.max_prompt_tokens, self.max_length):
            if limit is not None and len(prompt) > limit:
                raise ParameterError(param, f"{len(prompt)} tokens are more than the {limit} that this server takes")
        if max(prompt) >= self.vocab_size:
            raise ParameterError(param, f"token id {max(prompt)} must be in 0..{self.vocab_size - 1}")
