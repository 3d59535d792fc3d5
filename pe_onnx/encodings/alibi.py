"""ALiBi: a penalty on the scores that grows linearly with the distance, one fixed slope per head.

Press, Smith and Lewis 2021, section 3; for a head count that is no power of two as in the authors' code::

    slope[h] = 2^(-8 (h + 1) / n)        n = the greatest power of two <= H, heads 0 .. n-1
               2^(-4 (2k + 1) / n)       k = h - n, the heads beyond
"""

from __future__ import annotations

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.custom_ops import alibi_bias
from pe_onnx.encoding import PositionalEncoding


def slopes(num_heads: int) -> torch.Tensor:
    """float64 ``[H]``."""
    n = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
    beyond = [2.0 ** (-4 * (2 * k + 1) / n) for k in range(num_heads - n)]
    return torch.tensor(first + beyond, dtype=torch.float64)


class Alibi(PositionalEncoding):
    """No parameters; any head count."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.slopes = slopes(config.num_attention_heads).float()  # no buffer: half() would round it

    def bias(self, query_positions: torch.Tensor, key_positions: torch.Tensor | None, key_length: int) -> torch.Tensor:
        if key_positions is None:
            key_positions = torch.arange(key_length, device=query_positions.device)[None]
        return alibi_bias(self.slopes.to(query_positions.device), query_positions, key_positions)
