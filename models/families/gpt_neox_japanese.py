"""GPT-NeoX Japanese computes its attention itself: ``_attn`` goes to our operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pe_onnx.models.interface import attend
from pe_onnx.models.substitution import Substitution


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``_attn`` of each layer."""
    for module in model.modules():
        if type(module).__name__ == "GPTNeoXJapaneseAttention":
            yield Substitution(module, "_attn", _attention(module))


def _attention(module: Any) -> Any:
    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None
    ) -> tuple[torch.Tensor, None]:
        output, _ = attend(module, query, key, value, attention_mask, scaling=1 / module.norm_factor)
        return output.transpose(1, 2), None  # [B, H, T, D]

    return attention
