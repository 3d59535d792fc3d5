"""Falcon computes its attention itself, rotary or with an ALiBi of its own making.

Slopes, key positions and their product are rounded to bfloat16, and the sum of scores and ALiBi is divided by sqrt(D)::

    scores[h, i, j] = (q_i k_j + bf16(bf16(slope[h]) bf16(j))) / sqrt(D)

So the bias is no function of the distance. transformers 5.23 adds it twice in its eager attention; we follow its SDPA
attention, which is what it takes by default and what Falcon was trained with. Each attention's ``forward`` goes to our
operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.falcon import modeling_falcon

from pe_onnx.models.interface import attend, current
from pe_onnx.models.substitution import Substitution

ATTENTION = "sdpa"


def encoding(config: PreTrainedConfig) -> str:
    """Its name."""
    return "alibi" if config.alibi else "rope"


ENCODING = encoding


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``forward`` of each layer's attention; the model makes no ALiBi of its own, which the mask would take up."""
    yield Substitution(modeling_falcon, "build_alibi_tensor", lambda *_, **__: None)
    for module in model.modules():
        if isinstance(module, modeling_falcon.FalconAttention):
            yield Substitution(module, "forward", _attention(module))


def _bias(slopes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[B or 1, H, T, S]``, not yet divided by sqrt(D)."""
    step = current().step
    keys = step.every_key_position()
    rounded = keys.float().bfloat16().float()[:, None, None, :]
    bias = (slopes[:, None, None] * rounded).bfloat16().to(dtype)  # [B, H, 1, S]
    return bias.expand(-1, -1, step.query_positions.shape[1], -1)


def _attention(module: Any) -> Any:
    config = module.config
    ones = torch.ones(1, 2, dtype=torch.int64)
    slopes = modeling_falcon.build_alibi_tensor(ones, module.num_heads, torch.float32)[:, 0, 1]  # at position 1

    def forward(
        hidden_states: torch.Tensor,
        alibi: None,
        attention_mask: Any,
        layer_past: Any = None,
        position_embeddings: Any = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        split = module._split_heads(module.query_key_value(hidden_states))
        query, key, value = (x.transpose(1, 2) for x in split)  # each [B, H or 1, T, D]
        bias = None
        if config.alibi:
            bias = _bias(slopes, query.dtype) * module.inv_norm_factor
        else:
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = layer_past.update(key, value, module.layer_idx)
        output, _ = attend(module, query, key, value, attention_mask, scaling=module.inv_norm_factor, bias=bias)
        return module.dense(output.flatten(2)), None

    return forward
