"""GPT-Neo computes its attention itself, without a scale; every other layer sees ``window_size`` tokens.

The window stands in each layer's own buffer of max_position_embeddings squared, not in the mask that the model makes:
``_attn`` goes to our operator with a mask that has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pe_onnx.models.interface import attend
from pe_onnx.models.masks import Mask
from pe_onnx.models.substitution import Substitution


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``_attn`` of each layer."""
    for module in model.modules():
        if type(module).__name__ == "GPTNeoSelfAttention":
            yield Substitution(module, "_attn", _attention(module))


def _attention(module: Any) -> Any:
    window = module.config.window_size if module.attention_type == "local" else -1

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Mask
    ) -> tuple[torch.Tensor, None]:
        output, _ = attend(module, query, key, value, replace(attention_mask, window=window), scaling=1.0)
        return output.transpose(1, 2), None  # [B, H, T, D]

    return attention
