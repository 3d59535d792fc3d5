"""MPT adds ALiBi to the scores inside its own attention, with slopes of its own where the heads are no power of two.

transformers 5.23 hands no ``alibi_bias_max`` on, so that it is 8 whatever the configuration says. The bias on the last
S of ``max_seq_len`` slots becomes our operator's, and each attention's ``forward`` hands it to our operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.mpt import modeling_mpt

from pe_onnx.custom_ops import alibi_bias
from pe_onnx.models.interface import attend, current
from pe_onnx.models.masks import Mask
from pe_onnx.models.substitution import Substitution

ENCODING = "alibi"


class _BooleanMask:
    """What MPT asks of its mask before it hands it on."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def to(self, dtype: torch.dtype) -> Mask:
        return self.mask


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """The mask, the bias, and ``forward`` of each layer's attention."""
    make_mask = modeling_mpt.create_causal_mask
    yield Substitution(modeling_mpt, "create_causal_mask", lambda **inputs: _BooleanMask(make_mask(**inputs)))
    for module in model.modules():
        kind = type(module).__name__
        if kind == "MptModel":
            yield Substitution(module, "build_mpt_alibi_tensor", _bias)
        elif kind == "MptAttention":
            yield Substitution(module, "forward", _attention(module))


def _bias(num_heads: int, sequence_length: int, alibi_bias_max: int = 8, device: Any = None) -> torch.Tensor:
    """``[B, H, T, S]``."""
    slopes = -modeling_mpt.build_mpt_alibi_tensor(num_heads, 2, alibi_bias_max, device)[:, 0, 0]  # at distance 1
    step = current().step
    keys = step.every_key_position()
    return alibi_bias(slopes, step.query_positions, keys)


def _attention(module: Any) -> Any:
    def forward(
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        qkv = module.Wqkv(hidden_states)
        if module.clip_qkv:
            qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        split = (x.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        query, key, value = split  # each [B, H, T, D]
        key, value = past_key_values.update(key, value, module.layer_idx)
        bias = position_bias.to(query.dtype)
        output, _ = attend(module, query, key, value, attention_mask, scaling=module.softmax_scale, bias=bias)
        return module.out_proj(output.flatten(2)), None

    return forward
