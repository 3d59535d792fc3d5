"""transformers' attention interface, served by a step: what a layer hands to its attention becomes our operator's.

Registered under the name ``pe_onnx``. A mask is a ``Mask`` (``models/masks.py``), a cache a ``BridgeCache`` that hands
new keys and values back as they are; an argument that is not understood is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from pe_onnx.contract import CacheShape
from pe_onnx.errors import CheckpointError
from pe_onnx.models import latent, masks
from pe_onnx.models.across import Across, EncoderStep
from pe_onnx.models.attention import CompactStep, LayerCache, MaskedStep
from pe_onnx.models.masks import Mask

IMPLEMENTATION = "pe_onnx"

IRRELEVANT = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "use_cache",
        "cache_position",
        "output_attentions",
        "is_causal",
        "logits_to_keep",
    }
)
"""Arguments of the attention interface that change nothing in a causal decoder at inference."""


class BridgeCache(Cache):
    """Hands new keys and values back as they are, and remembers which layer they belong to."""

    def __init__(
        self, step: CompactStep | MaskedStep, caches: Sequence[CacheShape], across: Across | None = None
    ) -> None:
        """across: for attention to an encoder."""
        super().__init__(layers=[])
        self.step = step
        self.caches = caches
        self.across = across
        self.masks: list[Mask] = []
        """What the layers handed to attention, in their order."""
        self._last = 0
        self._keys: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> LayerCache:
        self._last = layer_idx
        self._keys.append((key_states, value_states, layer_idx))
        return key_states, value_states

    def layer_of(self, key: torch.Tensor, value: torch.Tensor) -> int:
        """The layer whose cache holds these keys: another's, where layers share them.

        Raises CheckpointError for keys that were cached with other values.
        """
        for known, its_value, layer in self._keys:
            if known is key:
                if its_value is not value:
                    raise CheckpointError("its attention takes other values than it caches with its keys")
                return layer
        return self._last

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.step.past[0][0].shape[2]


_active: list[BridgeCache | EncoderStep] = []


@contextmanager
def serving(cache: BridgeCache | EncoderStep) -> Iterator[None]:
    """Attention inside the block is that of the cache's step, or an encoder's."""
    _active.append(cache)
    try:
        yield
    finally:
        _active.pop()


def served() -> BridgeCache | EncoderStep:
    """Raises CheckpointError outside an export."""
    if not _active:
        raise CheckpointError("the pe_onnx attention was called outside an export")
    return _active[-1]


def current() -> BridgeCache:
    """Raises CheckpointError outside a decoder's export."""
    cache = served()
    if isinstance(cache, EncoderStep):
        raise CheckpointError("the attention of its encoder is causal")
    return cache


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """``[B, H, T, D]``, ``[B, K, T, D]`` and ``[B, K, T, E]`` to ``[B, T, H, E]``.

    sliding_window is what flash attention would use; eager attention, which we follow, knows the mask alone. bias:
    ``[B or 1, H or 1, T, S]`` on the scores, from a family's file; T5 calls it position_bias. Raises CheckpointError
    for what is not understood.
    """
    name = type(module).__name__
    unknown = [key for key, x in others.items() if x is not None and x is not False and key not in IRRELEVANT]
    if unknown or others.get("is_causal") is False:
        raise CheckpointError(
            f"{name} hands {', '.join(unknown) or 'is_causal=False'} to its attention, which is not understood"
        )
    if not isinstance(attention_mask, Mask):
        kind = "no mask: it is not causal" if attention_mask is None else "a mask that its file builds by itself"
        raise CheckpointError(f"{name} hands its attention {kind}")
    bias = position_bias if bias is None else bias
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not attention_mask.causal:
        serving_step = served()
        across = serving_step if isinstance(serving_step, EncoderStep) else serving_step.across
        if across is None:
            raise CheckpointError(f"{name}: its attention is bidirectional (is_decoder = true makes a decoder of some)")
        return across.attend(module, query, scale, bias, key, value), None
    cache = current()
    cache.masks.append(attention_mask)
    if latent.is_latent(module):
        query = latent.query_of(module, query)
    H, K, E = query.shape[1], key.shape[1], value.shape[-1]
    layer = cache.layer_of(key, value)
    cached_heads, size = cache.caches[layer]
    if cached_heads != K:
        raise CheckpointError(f"{name} attends to {K} heads of keys, and caches {cached_heads}")

    def packed(x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x  # zeros change no score
        return x.transpose(1, 2).flatten(2)

    output = cache.step.attend(
        layer,
        packed(query),
        packed(key),
        packed(value),
        num_heads=H,
        kv_heads=K,
        scale=scale,
        bias=bias,
        sinks=s_aux,
        softcap=float(softcap or 0.0),
        window=attention_mask.window,
        chunk=attention_mask.chunk,
    )
    output = output.unflatten(-1, (H, size))[..., :E]
    return latent.values_of(module, output) if latent.is_latent(module) else output, None


def register() -> None:
    """Make attention and masks known to transformers. Idempotent."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    masks.register(IMPLEMENTATION)
