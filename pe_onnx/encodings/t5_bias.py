"""T5 relative bias: a learned term on the scores for each head and bucket of distances, shared by all layers.

Raffel et al. 2020, section 2.1. Distances up to half the buckets have one each, farther ones share them on a
logarithmic scale up to max_distance; the formula stands in ``custom_ops/t5_relative_bias.py``.
"""

from __future__ import annotations

import torch
from torch import nn

from pe_onnx.config import DecoderConfig
from pe_onnx.custom_ops import t5_relative_bias
from pe_onnx.custom_ops.t5_relative_bias import bucket_of_distance
from pe_onnx.encoding import PositionalEncoding


class T5Bias(PositionalEncoding):
    """num_buckets and max_distance (tokens) as in T5's config."""

    def __init__(self, config: DecoderConfig, *, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__(config)
        bucket_of_distance(num_buckets, max_distance)  # refuses what has no meaning
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.empty(num_buckets, config.num_attention_heads))

    def bias(self, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int) -> torch.Tensor:
        return t5_relative_bias(self.weight, query_positions, key_positions, key_length, self.max_distance)
