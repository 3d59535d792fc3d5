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


def past_names(layers: int) -> list[str]:
    """k0, v0, k1, v1, ..."""
    return [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """k0, v0, k1, v1, ..."""
    return [f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def input_shapes(layers: int, kv_heads: int, head_size: int) -> dict[str, tuple[str | int, ...]]:
    """Every input's name and shape, in graph order."""
    return {**TOKEN_SHAPES, **dict.fromkeys(past_names(layers), (BATCH, kv_heads, PAST, head_size))}


def output_shapes(
    layers: int, kv_heads: int, head_size: int, vocab_size: int, logits: str
) -> dict[str, tuple[str | int, ...]]:
    """Every output's name and shape, in graph order. logits: ``last`` or ``all``."""
    tokens: str | int = NEW if logits == "all" else 1
    shapes: dict[str, tuple[str | int, ...]] = {"logits": (BATCH, tokens, vocab_size)}
    return {**shapes, **dict.fromkeys(present_names(layers), (BATCH, kv_heads, TOTAL, head_size))}
