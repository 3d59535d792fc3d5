"""T5: a relative bias on the scores, of one table for all layers of a stack (v1.0, v1.1, Flan and ByT5 too).

``compute_bias`` looks every pair of positions up anew at each step; it becomes our operators, a slice in the decoder
and a band in the encoder. transformers 5.23 gives tokens their slots as positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from pe_onnx.custom_ops import t5_relative_bias
from pe_onnx.models.across import EncoderStep
from pe_onnx.models.interface import served
from pe_onnx.models.substitution import Substitution

ENCODING = "t5_bias"
SEQ2SEQ = True


def substitutions(model: PreTrainedModel) -> Iterator[Substitution]:
    """``compute_bias`` of each attention that has a table."""
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            yield Substitution(module, "compute_bias", _bias_of(module))


def reach(model: PreTrainedModel) -> int:
    """Tokens beyond which all distances share a bucket."""
    return model.config.relative_attention_max_distance


def _bias_of(module: Any) -> Callable[..., torch.Tensor]:
    def compute_bias(*args: Any, **kwargs: Any) -> torch.Tensor:
        weight, max_distance = module.relative_attention_bias.weight, module.relative_attention_max_distance
        serving = served()
        if isinstance(serving, EncoderStep):
            return serving.relative_bias(weight, max_distance)
        step = serving.step
        return t5_relative_bias(weight, step.query_positions, step.key_positions, step.key_length, max_distance)

    return compute_bias
