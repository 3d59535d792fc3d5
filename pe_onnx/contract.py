"""The graph contract: names, dtypes, shapes and metadata of every exported decoder, written once for both halves.

=============================  ===========  ==============================================================
``input_ids``                  int64        ``[batch_size, sequence_length]``
``attention_mask``             int64        ``[batch_size, total_sequence_length]``, total = past + new
``position_ids``               int64        ``[batch_size, sequence_length]``, an input of every model
``past_key_values.{i}.key``    cache dtype  ``[batch_size, K, past_sequence_length, D]``, ``.value`` likewise
``logits``                     float32      ``[batch_size, sequence_length, V]``, or ``[batch_size, 1, V]``
``present.{i}.key``            cache dtype  ``[batch_size, K, total_sequence_length, D]``, ``.value`` likewise
=============================  ===========  ==============================================================

Target ``ort``: rows are compact, past and present may be one buffer, and only the sum of a mask's row is read.
Target ``portable``: standard operators, a cache that grows, zeros anywhere in the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

VERSION: Final = 1
Target = Literal["ort", "portable"]
TARGETS: Final = {
    "ort": "onnxruntime's GroupQueryAttention over an in-place cache; right padding; head size a multiple of 16",
    "portable": "standard ONNX operators and a growing cache; any padding; any head size",
}
DTYPES: Final = {"fp32": "float32", "fp16": "float16"}
LOGITS: Final = ("last", "all")
DEFAULT_LOGITS: Final = {"ort": "last", "portable": "all"}

BATCH: Final = "batch_size"
NEW: Final = "sequence_length"
PAST: Final = "past_sequence_length"
TOTAL: Final = "total_sequence_length"

TOKEN_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")
TOKEN_SHAPES: Final = {
    "input_ids": (BATCH, NEW),
    "attention_mask": (BATCH, TOTAL),
    "position_ids": (BATCH, NEW),
}


CacheShape = tuple[int, int]
"""K and D of one layer's cache: heads, and channels of a head."""


def past_names(layers: int) -> list[str]:
    """k0, v0, k1, v1, ..."""
    return [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """k0, v0, k1, v1, ..."""
    return [f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def input_shapes(caches: Sequence[CacheShape]) -> dict[str, tuple[str | int, ...]]:
    """Every input's name and shape, in graph order. caches: one for each layer."""
    return {**TOKEN_SHAPES, **_cache_shapes(past_names(len(caches)), caches, PAST)}


def output_shapes(caches: Sequence[CacheShape], vocab_size: int, logits: str) -> dict[str, tuple[str | int, ...]]:
    """Every output's name and shape, in graph order. logits: ``last`` or ``all``."""
    tokens: str | int = NEW if logits == "all" else 1
    shapes: dict[str, tuple[str | int, ...]] = {"logits": (BATCH, tokens, vocab_size)}
    return {**shapes, **_cache_shapes(present_names(len(caches)), caches, TOTAL)}


def _cache_shapes(names: list[str], caches: Sequence[CacheShape], length: str) -> dict[str, tuple[str | int, ...]]:
    pairs = (cache for cache in caches for _ in ("key", "value"))
    return {name: (BATCH, K, length, D) for name, (K, D) in zip(names, pairs, strict=True)}
