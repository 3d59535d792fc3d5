"""What GPT-J and its kin share: attention in a method ``_attn`` of their own, after rotation and cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pe_onnx.models.interface import attend
from pe_onnx.models.masks import Mask
from pe_onnx.models.substitution import Substitution


def through_interface(
    model: nn.Module, class_name: str, scale: Callable[[Any], float], mask: Callable[[Any, Mask], Mask] = lambda _, m: m
) -> Iterator[Substitution]:
    """``_attn(query, key, value, mask)`` of each such layer by our operator, at ``scale(layer)``, with ``mask(layer,
    mask)`` of what it is given. Output ``[B, H, T, D]``."""

    def replacement(module: Any) -> Callable[..., Any]:
        def attention(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None
        ) -> tuple[torch.Tensor, None]:
            output, _ = attend(module, query, key, value, mask(module, attention_mask), scaling=scale(module))
            return output.transpose(1, 2), None

        return attention

    for module in model.modules():
        if type(module).__name__ == class_name:
            yield Substitution(module, "_attn", replacement(module))
