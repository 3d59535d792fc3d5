"""ALiBi: a penalty on the scores that grows linearly with the distance, one fixed slope per head.

Queries and keys know nothing of positions; a head with a great slope sees its neighbours, one with a small slope far
back. For a head count that is no power of two the slopes are those of the authors' code.

Formula::

    bias[h, i, j] = -slope[h] (i - j)
    slope[h] = 2^(-8 (h + 1) / n)        n = the greatest power of two <= H, heads 0 .. n-1
               2^(-4 (2k + 1) / n)       k = h - n, the heads beyond

Paper: Press, Smith and Lewis 2021, Train Short, Test Long: Attention with Linear Biases Enables Input Length
Extrapolation, section 3.

Cost: no parameters. The term is H T S multiplications a step, made once and read by all layers. A step of one token
makes H S numbers.

Cache: cached keys hold no position and stay as they are. The bias of a new query is made anew at each step for every
key; it depends on the distance alone, not on the length. On CUDA in half precision there is no bias: cached keys hold
their position in 8 channels more, and a query its head's slope (``pe_onnx/position_channels.py``).

Limits: no length limit; made to be run past the trained length. Distances are counted in float32, exactly to 2^24
tokens. In half precision the finished term is rounded once. Any head count.
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
