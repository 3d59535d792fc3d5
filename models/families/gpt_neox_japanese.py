"""GPT-NeoX Japanese computes its attention itself: ``_attn`` goes to our operator."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pe_onnx.models.families._attn import through_interface
from pe_onnx.models.substitution import Substitution


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``_attn`` of each layer."""
    return through_interface(model, "GPTNeoXJapaneseAttention", lambda layer: 1 / layer.norm_factor)
