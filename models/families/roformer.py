"""RoFormer as a decoder takes its positions from the cache's length, and computes its attention itself.

Rotation is interleaved, from a table of ``max_position_embeddings`` rows that is one for all layers; with
``rotary_value`` values are rotated too. Each self-attention's ``forward`` reads the table at the step's own positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pe_onnx.models.interface import attend, current
from pe_onnx.models.rotation import Reading
from pe_onnx.models.substitution import Substitution

ENCODING = "rope"
READING = Reading(interleaved=True, layout="not repeated", sign=1)


def substitutions(model: Any) -> Iterator[Substitution]:
    """The table, which is left unread where it was read, and ``forward`` of each self-attention."""
    encoder: Any
    for encoder in model.modules():
        if type(encoder).__name__ == "RoFormerEncoder":
            table = encoder.embed_positions
            yield Substitution(table, "forward", lambda *_, table=table: table.weight)
            for layer in encoder.layer:
                yield Substitution(layer.attention.self, "forward", _attention(layer.attention.self, table))


def _attention(module: Any, table: nn.Embedding) -> Any:
    heads = module.num_attention_heads

    def forward(
        hidden_states: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        rows = nn.functional.embedding(current().step.query_positions, table.weight)  # [B, T, D]
        sin, cos = rows.chunk(2, -1)
        projections = (module.query, module.key, module.value)
        split = (p(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2) for p in projections)
        query, key, value = split  # each [B, H, T, D]
        query, key = (READING.rotate(x, cos, sin, 1) for x in (query, key))
        if module.rotary_value:
            value = READING.rotate(value, cos, sin, 1)
        key, value = past_key_values.update(key, value, module.layer_idx)
        output, _ = attend(module, query, key, value, attention_mask)
        return output.flatten(2), None

    return forward
