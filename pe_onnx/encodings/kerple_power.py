"""KERPLE, the power kernel: a penalty that grows with a power of the distance, learned for each head.

Chi et al. 2022, the power variant; the authors' ``ParallelKerplePower`` with its bias kernel (one set for all layers,
r1 at least 0.01, r2 between 0.01 and 2). With r2 = 1 it is ALiBi with learned slopes::

    bias[h, i, j] = -r1[h] (i - j)^r2[h]        r1 > 0, 0 < r2 <= 2
"""

from __future__ import annotations

import torch
from torch import nn

from pe_onnx.config import DecoderConfig
from pe_onnx.custom_ops import distance_bias
from pe_onnx.encoding import PositionalEncoding

LEAST = 0.01


class KerplePower(PositionalEncoding):
    """No parameters; r1 and r2 are weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.r1 = nn.Parameter(torch.empty(config.num_attention_heads))
        self.r2 = nn.Parameter(torch.empty(config.num_attention_heads))

    def draw_weights(self, generator: torch.Generator) -> None:
        nn.init.uniform_(self.r1, 0.1, 1.0, generator)
        nn.init.uniform_(self.r2, 0.3, 1.0, generator)

    def bias(self, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int) -> torch.Tensor:
        r1 = self.r1.float().clamp(min=LEAST)[:, None]  # [H, 1]
        r2 = self.r2.float().clamp(LEAST, 2.0)[:, None]
        distance = torch.arange(key_length, device=query_positions.device).float()  # no key is farther
        return distance_bias(-r1 * distance**r2, query_positions, key_positions, key_length)
