"""The proof of an encoder-decoder: the decoder's proof (``models/proof.py``) over sources of its own.

Each row of the decoder's trials has a random source that its prompt's tokens name; the first is longer than every
bucket of distances and than a chunk of the encoder, the second is padded in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pe_onnx.contract import CacheShape, Target
from pe_onnx.models.attention import LayerCache
from pe_onnx.models.proof import STEPS, Feed, Proof

CrossedCache = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys and values of a layer's own cache, then of its cross cache."""

LONG = 300
"""Tokens of a long source."""

Encode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Sources and their mask, int64 ``[B, S]``, to ``[B, S, C]``."""
Decode = Callable[..., tuple[torch.Tensor, list[CrossedCache]]]
"""``(input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values)``."""


class Seq2SeqProof:
    """What the reference gives for the trials of an encoder-decoder."""

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        crossed: Sequence[CacheShape],
        vocab_size: int,
        encode: Callable[[torch.Tensor], torch.Tensor],
        decode: Callable[[torch.Tensor, torch.Tensor, Sequence[int], list[LayerCache]], list[torch.Tensor]],
        reaches: Sequence[int],
    ) -> None:
        """shapes, crossed: K and D of each layer's own and cross cache. encode: a source ``[S]`` to ``[S, C]``.
        decode: ``(hidden, row, ends, past)`` to the logits of each run. reaches: tokens of the farthest bucket."""
        self.crossed = list(crossed)
        self.vocab_size = vocab_size
        self.hidden: dict[tuple[int, ...], torch.Tensor] = {}

        def reference(row: torch.Tensor, prompt: int, past: list[LayerCache]) -> list[torch.Tensor]:
            hidden = encode(self.source(row[:prompt]))
            self.hidden[tuple(row[:prompt].tolist())] = hidden.float()
            return decode(hidden, row, [prompt + i for i in range(STEPS + 1)], past)

        self.proof = Proof([(K, D, D) for K, D in shapes], vocab_size, reference, reaches=reaches)
        self.spread = float(torch.cat([x.reshape(-1) for x in self.hidden.values()]).std())

    def source(self, prompt: torch.Tensor) -> torch.Tensor:
        """The source that goes with a row's prompt ``[n]``."""
        length = LONG if len(prompt) % 2 == 0 else 3 * len(prompt)
        return torch.randint(0, self.vocab_size, (length,), generator=torch.Generator().manual_seed(int(prompt.sum())))

    @property
    def description(self) -> str:
        """The trials in words."""
        lengths = sorted(len(hidden) for hidden in self.hidden.values())
        return f"sources of {', '.join(str(n) for n in lengths)} tokens, {self.proof.description}"

    @torch.no_grad()
    def error(
        self, encode: Encode, decode: Decode, target: Target, sizes: Sequence[CacheShape], dtype: torch.dtype
    ) -> float:
        """The greatest difference of an encoder's output or of a logit, each of its own spread."""
        request = _Request(self, encode, decode, dtype)
        error = self.proof.error(request, target, sizes, dtype)
        return max(error, request.worst / self.spread)


class _Request:
    """Runs the two halves as the decoder's proof runs a decoder; a prompt begins a new request."""

    def __init__(self, proof: Seq2SeqProof, encode: Encode, decode: Decode, dtype: torch.dtype) -> None:
        self.proof, self.encode, self.decode, self.dtype = proof, encode, decode, dtype
        self.worst = 0.0
        self.hidden = self.mask = torch.zeros(0)
        self.crossed: list[Any] = []

    def __call__(self, feed: Feed, past: list[LayerCache]) -> tuple[torch.Tensor, list[LayerCache]]:
        B, T = feed.input_ids.shape
        first = T > 1
        if first:
            self._begin(feed)
            self.crossed = [(torch.zeros(B, K, 0, D, dtype=self.dtype),) * 2 for K, D in self.proof.crossed]
        caches = [(*own, *other) for own, other in zip(past, self.crossed, strict=True)]
        logits, presents = self.decode(feed.input_ids, feed.attention_mask, self.hidden, self.mask, caches)
        if first:
            self.crossed = [present[2:] for present in presents]
        return logits, [present[:2] for present in presents]

    def _begin(self, feed: Feed) -> None:
        prompts = [ids[valid] for ids, valid in zip(feed.input_ids, feed.valid, strict=True)]
        sources = [self.proof.source(prompt) for prompt in prompts]
        S = max(len(source) for source in sources)
        ids, self.mask = torch.zeros(2, len(sources), S, dtype=torch.int64)
        for b, source in enumerate(sources):  # in front, where slots are not positions
            ids[b, S - len(source) :], self.mask[b, S - len(source) :] = source, 1
        self.hidden = self.encode(ids, self.mask)
        for b, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
            want = self.proof.hidden[tuple(prompt.tolist())]
            difference = float((self.hidden[b, S - len(source) :].float() - want).abs().max())
            self.worst = max(self.worst, difference if difference < float("inf") else float("inf"))
