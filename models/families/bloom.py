"""BLOOM adds ALiBi to the scores inside its own attention: slope times key position, by the attention mask.

``build_alibi_tensor`` gives our operator's bias, which differs from transformers' by a constant per query that softmax
does not see, and each attention's ``forward`` hands it to our operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from pe_onnx.custom_ops import alibi_bias
from pe_onnx.models.interface import attend, current
from pe_onnx.models.substitution import Substitution

ENCODING = "alibi"


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """The bias, and ``forward`` of each layer's attention."""
    for module in model.modules():
        kind = type(module).__name__
        if kind == "BloomModel":
            yield Substitution(module, "build_alibi_tensor", _bias)
        elif kind == "BloomAttention":
            yield Substitution(module, "forward", _attention(module))


def _bias(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """``[B, H, T, S]``."""
    slopes = _get_alibi_slopes(num_heads, attention_mask.device)
    step = current().step
    keys = step.every_key_position()
    return alibi_bias(slopes, step.query_positions, keys).to(dtype)


def _attention(module: Any) -> Any:
    def forward(
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: Any,
        layer_past: Any = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        key, value = layer_past.update(key, value, module.layer_idx)
        output, _ = attend(module, query, key, value, attention_mask, scaling=module.inv_norm_factor, bias=alibi)
        return residual + module.dense(output.flatten(2)), None

    return forward
