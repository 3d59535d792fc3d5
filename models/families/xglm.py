"""XGLM adds a sinusoidal vector of any length to the embedding, at the position plus 2; its attention is its own.

transformers 5.23 makes its table longer when a sequence is; here the row is computed from the position::

    angle = (position + 2) exp(-i ln(10000) / (C/2 - 1)),    row = sin(angle), cos(angle),    0 at the padding row

``forward`` of the table and of each layer's attention is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pe_onnx.errors import CheckpointError
from pe_onnx.models.interface import attend
from pe_onnx.models.substitution import Substitution

ENCODING = "sinusoidal"
ENDLESS = True
"""No table limits the length."""


def substitutions(model: PreTrainedModel) -> Iterator[Substitution]:
    """The table and the attention of each layer. Raises CheckpointError for a decoder with cross-attention."""
    if model.config.add_cross_attention:
        raise CheckpointError("XGLM with add_cross_attention = true attends to an encoder's output; decoders only")
    for module in model.modules():
        kind = type(module).__name__
        if kind == "XGLMSinusoidalPositionalEmbedding":
            yield Substitution(module, "forward", _sinusoids(module, model.dtype))
        elif kind == "XGLMAttention":
            yield Substitution(module, "forward", _attention(module))


def _sinusoids(module: Any, dtype: torch.dtype) -> Any:
    half = module.embedding_dim // 2
    rates = torch.exp(torch.arange(half, dtype=torch.int64).float() * -(math.log(10000) / (half - 1)))  # [C/2]

    def forward(position_ids: torch.Tensor, past_key_values_length: int = 0) -> torch.Tensor:
        rows = position_ids + module.offset  # [B, T]
        angles = rows[..., None].float() * rates
        table = torch.cat((angles.sin(), angles.cos()), -1)
        table = nn.functional.pad(table, (0, module.embedding_dim % 2))
        if module.padding_idx is not None:
            table = torch.where(rows[..., None] == module.padding_idx, 0.0, table)
        return table.to(dtype)

    return forward


def _attention(module: Any) -> Any:
    def forward(
        hidden_states: torch.Tensor, past_key_values: Any = None, attention_mask: Any = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        projections = (module.q_proj, module.k_proj, module.v_proj)
        split = (p(hidden_states).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for p in projections)
        query, key, value = split  # each [B, H, T, D]
        key, value = past_key_values.update(key, value, module.layer_idx)
        output, _ = attend(module, query, key, value, attention_mask, scaling=module.scaling)
        return module.out_proj(output.flatten(2)), None

    return forward
