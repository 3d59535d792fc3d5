"""GPT-J computes its attention itself: ``_attn`` goes to our operator.

Its rotation, interleaved and from a table of ``max_position_embeddings`` rows, stays transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pe_onnx.models.families._attn import through_interface
from pe_onnx.models.substitution import Substitution

ENCODING = "rope"


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``_attn`` of each layer."""
    return through_interface(model, "GPTJAttention", lambda layer: 1 / layer.scale_attn)
