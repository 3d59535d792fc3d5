"""What one forward pass knows of tokens, cache and mask: three steps with one interface.

``PlainStep`` is PyTorch's reference without a cache, ``CompactStep`` the ``ort`` target's attention over compact rows,
``MaskedStep`` the ``portable`` target's over any padding. A model asks its step for positions and attention and does
not know which one it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pe_onnx.custom_ops import cached_attention, masked_attention
from pe_onnx.errors import ConfigError

LayerCache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each ``[B, K, P, D]``."""


class Heads(NamedTuple):
    """What an attention layer is made of, beside its tensors."""

    num_heads: int
    kv_heads: int
    scale: float
    softcap: float
    window: int
    chunk: int


class Step(ABC):
    """One forward pass: T new tokens after a past, in every layer."""

    query_positions: torch.Tensor
    """int64 ``[B, T]``."""
    key_positions: torch.Tensor | None
    """int64 ``[B, S]``; None for 0 .. key_length - 1 in every row."""
    key_length: int
    """S."""
    presents: list[LayerCache]
    """The caches after the step, filled in layer by layer."""

    def every_key_position(self) -> torch.Tensor:
        """int64 ``[B or 1, S]``, written out also where keys stand at 0 .. key_length - 1."""
        if self.key_positions is not None:
            return self.key_positions
        return torch.arange(self.key_length, device=self.query_positions.device)[None]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        num_heads: int,
        kv_heads: int,
        scale: float,
        bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        softcap: float = 0.0,
        window: int = -1,
        chunk: int = 0,
    ) -> torch.Tensor:
        """Packed query ``[B, T, H*D]``, key and value ``[B, T, K*D]`` to output ``[B, T, H*D]``.

        bias: ``[B or 1, H or 1, T, S]``, added to the scores after the soft-cap. sinks: ``[H]``, a score that takes
        part in the softmax and has no value. softcap: c of c tanh(score / c), 0 for none. window: tokens that a query
        sees, itself included; -1 for all. chunk: tokens of a chunk, beyond which a query sees none; 0 for no chunks.
        """
        heads = Heads(num_heads, kv_heads, scale, softcap, window, chunk)
        return self._attend(layer, query, key, value, bias, sinks, heads)

    @abstractmethod
    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        heads: Heads,
    ) -> torch.Tensor: ...

    @abstractmethod
    def last_token(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to ``[B, 1, C]``: for each row the last new token that is no padding."""


class CompactStep(Step):
    """Rows that hold their tokens in the first slots; only the sum of the mask is read. Needs D % 16 == 0."""

    def __init__(self, attention_mask: torch.Tensor, new_tokens: int, past: Sequence[LayerCache]) -> None:
        self.past = past
        self.presents: list[LayerCache] = [past[0]] * len(past)
        self.key_length = attention_mask.shape[1]
        self.lengths = attention_mask.sum(1)  # [B]
        device = attention_mask.device
        new = torch.arange(new_tokens, new_tokens + 1, device=device)  # [1]; a size that CUDA has without a copy
        self.start = (self.lengths - new).clamp(min=0)  # [B], slot and position of the first new token
        self.query_positions = self.start[:, None] + torch.arange(new_tokens, device=device)
        self.key_positions = None
        self.last_slots = (self.lengths - 1).to(torch.int32)
        self.total_length = torch.full((1,), self.key_length, dtype=torch.int32, device=device)
        self._in_chunk: dict[int, torch.Tensor] = {}

    def in_chunk(self, chunk: int) -> torch.Tensor:
        """bool ``[B, 1, T, S]``: keys from the beginning of the query's chunk on."""
        if chunk not in self._in_chunk:
            slots = torch.arange(self.key_length, device=self.lengths.device)
            self._in_chunk[chunk] = (slots >= (self.query_positions // chunk * chunk)[..., None])[:, None]
        return self._in_chunk[chunk]

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        heads: Heads,
    ) -> torch.Tensor:
        if heads.chunk:
            zero = torch.zeros((), dtype=query.dtype, device=query.device)
            bias = torch.where(self.in_chunk(heads.chunk), zero if bias is None else bias, float("-inf"))
        output, present_key, present_value = cached_attention(
            query,
            key,
            value,
            *self.past[layer],
            self.last_slots,
            self.total_length,
            bias,
            *heads[:5],
            sinks,
        )
        self.presents[layer] = (present_key, present_value)
        return output

    def last_token(self, hidden: torch.Tensor) -> torch.Tensor:
        return _take(hidden, self.lengths - 1 - self.start)


class MaskedStep(Step):
    """Any padding: a token's position is the number of valid tokens before it, and invalid keys are not seen."""

    def __init__(self, attention_mask: torch.Tensor, new_tokens: int, past: Sequence[LayerCache]) -> None:
        self.past = past
        self.presents: list[LayerCache] = [past[0]] * len(past)
        self.valid = attention_mask != 0  # [B, S]
        self.key_length = attention_mask.shape[1]
        self.positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
        self.key_positions = self.positions
        self.query_positions = self.positions[:, self.key_length - new_tokens :]
        self.new_tokens = new_tokens
        self._seen: dict[tuple[int, int], torch.Tensor] = {}

    def seen(self, window: int, chunk: int = 0) -> torch.Tensor:
        """bool ``[B, 1, T, S]``; a query always sees its own slot, so that no row is all masked."""
        if (window, chunk) not in self._seen:
            slots = torch.arange(self.key_length, device=self.valid.device)  # [S]
            queries = slots[self.key_length - self.new_tokens :, None]  # [T, 1]
            seen = (slots <= queries) & self.valid[:, None, None, :]  # [B, 1, T, S]
            if window >= 0:  # of tokens: padding between them does not count
                distance = self.query_positions[:, :, None] - self.positions[:, None, :]
                seen = seen & (distance < window)[:, None]
            if chunk:
                first = self.query_positions // chunk * chunk  # [B, T]
                seen = seen & (self.positions[:, None, :] >= first[:, :, None])[:, None]
            self._seen[window, chunk] = seen | (slots == queries)
        return self._seen[window, chunk]

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        heads: Heads,
    ) -> torch.Tensor:
        mask = self.seen(heads.window, heads.chunk)
        if bias is not None:
            mask = torch.where(mask, bias, float("-inf"))
        output, present_key, present_value = masked_attention(
            query, key, value, *self.past[layer], mask, *heads[:4], sinks
        )
        self.presents[layer] = (present_key, present_value)
        return output

    def last_token(self, hidden: torch.Tensor) -> torch.Tensor:
        valid = self.valid[:, self.key_length - self.new_tokens :].long()  # [B, T]
        index = (valid * torch.arange(self.new_tokens, device=hidden.device)).amax(1)
        return _take(hidden, index)


class PlainStep(Step):
    """The reference: attention by the plain formula, all tokens at once.

    past: keys and values of the slots before, as an earlier step's ``presents`` has them; None for no cache.
    """

    def __init__(
        self, attention_mask: torch.Tensor, causal: bool = True, past: Sequence[LayerCache] | None = None
    ) -> None:
        self.past = past
        self.presents: list[LayerCache] = []
        self.key_length = attention_mask.shape[1]
        self.start = past[0][0].shape[2] if past else 0
        self.key_positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        self.query_positions = self.key_positions[:, self.start :]
        self.valid = attention_mask != 0
        self.causal = causal

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        heads: Heads,
    ) -> torch.Tensor:
        q, k, v = (
            x.unflatten(-1, (n, -1)).transpose(1, 2)
            for x, n in ((query, heads.num_heads), (key, heads.kv_heads), (value, heads.kv_heads))
        )  # [B, H, T, D], [B, K, T, D] twice
        if self.past is not None:
            if self.past:
                k, v = (torch.cat(pair, 2) for pair in zip(self.past[layer], (k, v), strict=True))
            self.presents.append((k, v))
        k, v = (x.repeat_interleave(heads.num_heads // heads.kv_heads, 1) for x in (k, v))  # [B, H, S, D]
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * heads.scale
        if heads.softcap:
            scores = heads.softcap * torch.tanh(scores / heads.softcap)
        if bias is not None:
            scores = scores + bias
        slots = torch.arange(self.key_length, device=q.device)
        distance = slots[self.start :, None] - slots
        seen = self.valid[:, None, None, :] | (distance == 0)
        if self.causal:
            seen = seen & (distance >= 0)
        if heads.window >= 0:
            seen = seen & (distance < heads.window)
        if heads.chunk:
            seen = seen & (slots >= slots[:, None] // heads.chunk * heads.chunk)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
        weights = torch.softmax(scores, -1)[..., : self.key_length]
        return torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2)

    def last_token(self, hidden: torch.Tensor) -> torch.Tensor:
        valid = self.valid[:, self.start :].long()  # [B, T]
        return _take(hidden, (valid * torch.arange(valid.shape[1], device=hidden.device)).amax(1))


STEPS: dict[str, type[CompactStep] | type[MaskedStep]] = {"ort": CompactStep, "portable": MaskedStep}


def cached_step(
    target: str, attention_mask: torch.Tensor, new_tokens: int, past: Sequence[LayerCache]
) -> CompactStep | MaskedStep:
    """The step of an export target. Raises ConfigError for a head size that the target's attention refuses."""
    head_size = past[0][0].shape[3]
    if target == "ort" and head_size % 16:
        raise ConfigError(
            f"head size = {head_size} must be a multiple of 16 for --target ort; use --target portable, which takes any"
        )
    return STEPS[target](attention_mask, new_tokens, past)


def _take(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Row b's token index[b]: ``[B, T, C]`` to ``[B, 1, C]``."""
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[2]))
