"""Llama 4 scales the queries of its layers without rotation by their position, which it counts from the cache's length.

``attn_temperature_tuning`` (transformers 5.23)::

    scale = log(1 + floor((position + 1) / floor_scale)) attn_scale + 1

Here the scale is on ``q_proj``, by the step's own positions: a padded row computes what it does alone, which
transformers' does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pe_onnx.models.interface import current
from pe_onnx.models.substitution import Substitution

ENCODING = "rope"


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """Of each layer that has no rotation: its own scaling switched off, and ``q_proj`` scaled."""
    for module in model.modules():
        if type(module).__name__ == "Llama4TextAttention" and module.attn_temperature_tuning and not module.use_rope:
            yield Substitution(module, "attn_temperature_tuning", False)
            yield Substitution(module.q_proj, "forward", _scaled(module))


def _scaled(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    project = module.q_proj.forward

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        positions = current().step.query_positions.float()
        scale = torch.log1p(torch.floor((positions + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        query = project(hidden_states)
        return (query * scale[..., None]).to(query.dtype)

    return forward
