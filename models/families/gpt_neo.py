"""GPT-Neo computes its attention itself, without a scale; every other layer sees ``window_size`` tokens.

The window stands in each layer's own buffer of max_position_embeddings squared, not in the mask that the model makes:
``_attn`` goes to our operator with a mask that has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from pe_onnx.models.families._attn import through_interface
from pe_onnx.models.masks import Mask
from pe_onnx.models.substitution import Substitution


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``_attn`` of each layer."""
    return through_interface(model, "GPTNeoSelfAttention", lambda layer: 1.0, _windowed)


def _windowed(layer: Any, mask: Mask) -> Mask:
    return replace(mask, window=layer.config.window_size if layer.attention_type == "local" else -1)
