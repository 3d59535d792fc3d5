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

An encoder-decoder is two graphs. ``encoder_model.onnx`` turns a source, ``input_ids`` and ``attention_mask`` int64
``[batch_size, encoder_sequence_length]``, into ``last_hidden_state`` ``[batch_size, encoder_sequence_length, C]`` of
the cache's dtype. ``decoder_model.onnx`` is the decoder above with optimum's names:

===================================  ===========  =========================================================
``encoder_hidden_states``            cache dtype  the encoder's output, read where the cross cache is empty
``encoder_attention_mask``           int64        ``[batch_size, encoder_sequence_length]``, zeros anywhere
``past_key_values.{i}.decoder.key``  cache dtype  the decoder's own cache, ``.value`` likewise
``past_key_values.{i}.encoder.key``  cache dtype  ``[batch_size, K, past_encoder_sequence_length, D]``
``present.{i}.encoder.key``          cache dtype  the cross cache where the past one is empty, else empty itself
===================================  ===========  =========================================================

It has no ``position_ids``. The first run of a request computes the cross cache of every layer, later runs are handed
it: it is never computed twice, nor copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

VERSION: Final = 1
Target = Literal["ort", "portable"]
TARGETS: Final = {
    "ort": "onnxruntime's GroupQueryAttention over an in-place cache; right padding; head size a multiple of 16",
    "portable": "standard ONNX operators and a growing cache; any padding; any head size",
}
DTYPES: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Of weights and cache: our names and PyTorch's."""
LOGITS: Final = ("last", "all")
DEFAULT_LOGITS: Final = {"ort": "last", "portable": "all"}

BATCH: Final = "batch_size"
NEW: Final = "sequence_length"
PAST: Final = "past_sequence_length"
TOTAL: Final = "total_sequence_length"

SOURCE: Final = "encoder_sequence_length"
PAST_SOURCE: Final = "past_encoder_sequence_length"
PRESENT_SOURCE: Final = "present_encoder_sequence_length"

TOKEN_SHAPES: Final = {
    "input_ids": (BATCH, NEW),
    "attention_mask": (BATCH, TOTAL),
    "position_ids": (BATCH, NEW),
}
TOKEN_INPUTS: Final = tuple(TOKEN_SHAPES)

CacheShape = tuple[int, int]
"""K and D of one layer's cache: heads, and channels of a head."""
Shapes = dict[str, tuple[str | int, ...]]
"""Names of inputs or outputs in graph order, to their shapes."""


@dataclass(frozen=True)
class Crossing:
    """What a decoder knows of its encoder."""

    width: int
    """C of the encoder's output."""
    caches: tuple[CacheShape, ...]
    """K and D of each layer's cross cache."""


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype of an array that holds numbers of ``dtype``: their bits where numpy has no such numbers."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def stored(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """float32 values rounded to ``dtype``, as arrays hold its numbers (``storage_dtype``); to bfloat16 to the nearest,
    ties to even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    return (rounded >> 16).astype(np.uint16)


def past_names(layers: int, part: str = "") -> list[str]:
    """k0, v0, k1, v1, ...; part: ``decoder.`` or ``encoder.`` of an encoder-decoder."""
    return [f"past_key_values.{i}.{part}{kind}" for i in range(layers) for kind in ("key", "value")]


def present_names(layers: int, part: str = "") -> list[str]:
    """k0, v0, k1, v1, ..."""
    return [f"present.{i}.{part}{kind}" for i in range(layers) for kind in ("key", "value")]


def input_shapes(caches: Sequence[CacheShape], crossing: Crossing | None = None) -> Shapes:
    """Every input of a decoder. caches: one for each layer. crossing: of an encoder-decoder."""
    if crossing is None:
        return {**TOKEN_SHAPES, **_cache_shapes(past_names(len(caches)), caches, PAST)}
    tokens: Shapes = {name: TOKEN_SHAPES[name] for name in ("input_ids", "attention_mask")}
    encoder: Shapes = {
        "encoder_hidden_states": (BATCH, SOURCE, crossing.width),
        "encoder_attention_mask": (BATCH, SOURCE),
    }
    return {**tokens, **encoder, **_two_caches(past_names, caches, crossing, PAST, PAST_SOURCE)}


def output_shapes(
    caches: Sequence[CacheShape], vocab_size: int, logits: str, crossing: Crossing | None = None
) -> Shapes:
    """Every output of a decoder. logits: ``last`` or ``all``."""
    tokens: str | int = NEW if logits == "all" else 1
    shapes: Shapes = {"logits": (BATCH, tokens, vocab_size)}
    if crossing is None:
        return {**shapes, **_cache_shapes(present_names(len(caches)), caches, TOTAL)}
    return {**shapes, **_two_caches(present_names, caches, crossing, TOTAL, PRESENT_SOURCE)}


def encoder_shapes(crossing: Crossing) -> tuple[Shapes, Shapes]:
    """Every input and output of an encoder."""
    inputs: Shapes = {"input_ids": (BATCH, SOURCE), "attention_mask": (BATCH, SOURCE)}
    return inputs, {"last_hidden_state": (BATCH, SOURCE, crossing.width)}


def in_cache_dtype(name: str) -> bool:
    """Whether an input or output has the cache's dtype; of the others logits are float32, the rest int64."""
    return name.startswith(("past_key_values", "present", "encoder_hidden", "last_hidden"))


def _cache_shapes(names: list[str], caches: Sequence[CacheShape], length: str) -> Shapes:
    pairs = (cache for cache in caches for _ in ("key", "value"))
    return {name: (BATCH, K, length, D) for name, (K, D) in zip(names, pairs, strict=True)}


def _two_caches(
    names: Callable[[int, str], list[str]], caches: Sequence[CacheShape], crossing: Crossing, own: str, across: str
) -> Shapes:
    """Layer by layer: the decoder's own key and value, then those of the encoder."""
    layers = len(caches)
    decoder = list(_cache_shapes(names(layers, "decoder."), caches, own).items())
    encoder = list(_cache_shapes(names(layers, "encoder."), crossing.caches, across).items())
    return dict(item for i in range(0, 2 * layers, 2) for item in (*decoder[i : i + 2], *encoder[i : i + 2]))
