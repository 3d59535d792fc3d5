"""KERPLE, the logarithmic kernel: a penalty that grows with the logarithm of the distance, learned for each head.

Chi et al. 2022, the logarithmic variant; the authors' ``ParallelKerpleLog`` (one set for all layers, each number
at least 0.01)::

    bias[h, i, j] = -r1[h] log(1 + r2[h] (i - j))        r1, r2 > 0
"""

from __future__ import annotations

import torch
from torch import nn

from pe_onnx.config import DecoderConfig
from pe_onnx.custom_ops import distance_bias
from pe_onnx.encoding import PositionalEncoding

LEAST = 0.01


class KerpleLog(PositionalEncoding):
    """No parameters; r1 and r2 are weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.r1 = nn.Parameter(torch.empty(config.num_attention_heads))
        self.r2 = nn.Parameter(torch.empty(config.num_attention_heads))

    def draw_weights(self, generator: torch.Generator) -> None:
        nn.init.uniform_(self.r1, 0.5, 2.0, generator)
        nn.init.uniform_(self.r2, 0.1, 1.0, generator)

    def bias(self, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int) -> torch.Tensor:
        r1, r2 = (r.float().clamp(min=LEAST)[:, None] for r in (self.r1, self.r2))  # [H, 1]
        distance = torch.arange(key_length, device=query_positions.device).float()  # no key is farther
        return distance_bias(-r1 * torch.log1p(r2 * distance), query_positions, key_positions, key_length)
