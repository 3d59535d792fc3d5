"""FIRE-S: a small network of the distance relative to the query's own position; one network for all layers.

The threshold L keeps short texts from being stretched: up to L tokens the distance is measured against L.

Formula::

    d = max(query_position - key_position, 0)        L = |threshold|
    x = psi(d) / psi(max(query_position, L))         psi(y) = log(|c| y + 1)
    bias[h, i, j] = output[h] . relu(hidden x + hidden_bias) + output_bias[h]

Paper: Li et al. 2024, Functional Interpolation for Relative Positions Improves Long Context Transformers, section 3,
with layer-wise sharing.

Cost: 2 + 2 width + (width + 1) H parameters. width hidden units for each pair of query and key, and from them H terms,
made once for all layers.

Cache: cached keys hold no position and stay as they are. The bias depends on the query's own position beside the
distance, so that none of an earlier step's can be used again: each step computes it in full, once.

Limits: no length limit: x stays within 0 and 1. Computed in float32, whose counting is exact to 2^24 tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from pe_onnx.config import DecoderConfig
from pe_onnx.custom_ops import fire_bias
from pe_onnx.encoding import PositionalEncoding, check


class FireShared(PositionalEncoding):
    """width: hidden units. c, threshold (tokens): what these two weights begin with."""

    def __init__(self, config: DecoderConfig, *, width: int = 32, c: float = 0.1, threshold: float = 512.0) -> None:
        super().__init__(config)
        check("fire", width > 0, "width", width, "at least 1")
        check("fire", c > 0, "c", c, "positive")
        check("fire", threshold > 0, "threshold", threshold, "positive")
        self.begin = torch.tensor([c, threshold])
        self.c_and_threshold = nn.Parameter(torch.empty(2))
        self.hidden = nn.Linear(1, width)
        self.output = nn.Linear(width, config.num_attention_heads)

    def draw_weights(self, generator: torch.Generator) -> None:
        width = self.hidden.out_features
        nn.init.normal_(self.hidden.weight, 0.0, 3.0, generator)
        nn.init.normal_(self.hidden.bias, 0.0, 1.0, generator)
        nn.init.normal_(self.output.weight, 0.0, width**-0.5, generator)
        nn.init.normal_(self.output.bias, 0.0, 1.0, generator)
        with torch.no_grad():
            self.c_and_threshold.uniform_(0.8, 1.2, generator=generator).mul_(self.begin)

    def bias(self, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int) -> torch.Tensor:
        if key_positions is None:
            key_positions = torch.arange(key_length, device=query_positions.device)[None]
        return fire_bias(
            query_positions,
            key_positions,
            self.c_and_threshold,
            self.hidden.weight,
            self.hidden.bias,
            self.output.weight,
            self.output.bias,
        )
