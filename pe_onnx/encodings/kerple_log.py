"""KERPLE, the logarithmic kernel: a penalty that grows with the logarithm of the distance, learned for each head.

One set of numbers for all layers, each at least 0.01, as the authors' ``ParallelKerpleLog`` has it.

Formula::

    bias[h, i, j] = -r1[h] log(1 + r2[h] (i - j))        r1, r2 > 0

Paper: Chi et al. 2022, KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation, the logarithmic
variant; the authors' ``ParallelKerpleLog``.

Cost: 2 H parameters. H S logarithms a step, one for each distance, put into place for T queries and read by all layers;
the bias of one query is a slice of them.

Cache: cached keys hold no position and stay as they are. The bias is made anew at each step; it depends on the distance
alone, not on the length.

Limits: no length limit; made to be run past the trained length. Computed in float32.
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
