"""Phi-3.5-MoE scales its cosines and sines by ``long_mscale`` or ``short_mscale``, and chooses in Python by the length.

transformers 5.23 has the short factors at every length, and ``mscale`` by the greatest position of the step.
``forward`` of its rotary module makes the choice in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from pe_onnx.models.substitution import Substitution


def substitutions(model: PreTrainedModel) -> Iterator[Substitution]:
    """``forward`` of a rotary module that has a scale for each side of the trained length."""
    for module in model.modules():
        if type(module).__name__ == "PhimoeRotaryEmbedding" and module.rope_type != "default":
            yield Substitution(module, "forward", _rotary(module))


def _rotary(module: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    rope = module.config.rope_parameters
    frequencies, _ = module.rope_init_fn(module.config)  # [R/2]

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        longer = position_ids.max() + 1 > rope["original_max_position_embeddings"]
        scale = torch.where(longer, rope["long_mscale"], rope["short_mscale"])
        angles = (position_ids[..., None].float() * frequencies).repeat(1, 1, 2)
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)

    return forward
