"""KERPLE, the power kernel: a penalty that grows with a power of the distance, learned for each head.

One set of numbers for all layers, r1 at least 0.01, r2 between 0.01 and 2. With r2 = 1 it is ALiBi with learned slopes.

Formula::

    bias[h, i, j] = -r1[h] (i - j)^r2[h]        r1 > 0, 0 < r2 <= 2

Paper: Chi et al. 2022, KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation, the power variant;
the authors' ``ParallelKerplePower`` with its bias kernel.

Cost: 2 H parameters. H S powers a step, one for each distance, put into place for T queries and read by all layers; the
bias of one query is a slice of them.

Cache: cached keys hold no position and stay as they are. The bias is made anew at each step; it depends on the distance
alone, not on the length.

Limits: no length limit of its own. Computed in float32; with r2 near 2 a far term leaves float16's range.
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
