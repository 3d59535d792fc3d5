"""T5 relative bias: a learned term on the scores for each head and bucket of distances, shared by all layers.

Distances up to half the buckets have one each, farther ones share them on a logarithmic scale up to max_distance.

Formula::

    d = max(i - j, 0)        n = number of buckets, m = max_distance
    bucket(d) = d                                                        for d < n/2
              = min(n/2 + floor(log(2d/n) / log(2m/n) * n/2), n - 1)     otherwise
    bias[h, i, j] = weight[bucket(d), h]

Paper: Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, section
2.1; buckets as transformers 5 ``T5Attention._relative_position_bucket`` has them.

Cost: num_buckets * H parameters. H T S numbers looked up a step, made once and read by all layers; for keys that are
max_distance or more before every query one look-up is repeated.

Cache: cached keys hold no position and stay as they are. The bias is made anew at each step; it depends on the distance
alone, not on the length.

Limits: no length limit; all distances from max_distance on count as one. num_buckets is at least 2, and max_distance
greater than half of it.
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
