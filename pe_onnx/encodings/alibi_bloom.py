"""ALiBi as BLOOM defines it: slopes in float32 powers, filled up from the next power of two.

BLOOM adds slope * key position to the scaled scores; softmax ignores the difference, which is one number in a row.

Formula::

    bias[h, i, j] = -slope[h] (i - j)
    n = the greatest power of two <= H
    slope[h] = 2^(-8/n) ^ (h + 1)                h < n         float32 powers of a float32 base
               2^(-4/n) ^ (2 (h - n) + 1)        h >= n

Paper: BigScience 2022, BLOOM: A 176B-Parameter Open-Access Multilingual Language Model; transformers 5.23
``bloom.build_alibi_tensor``.

Cost: as ``alibi``: no parameters, H T S multiplications a step, made once for all layers.

Cache: as ``alibi``: cached keys stay, the bias is made anew at each step from distances alone.

Limits: no length limit; distances are exact to 2^24 tokens. Any head count. The slopes differ from ``alibi``'s by
float32's rounding alone.
"""

from __future__ import annotations

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encodings.alibi import Alibi


def slopes(num_heads: int) -> torch.Tensor:
    """float32 ``[H]``."""
    n = 1 << (num_heads.bit_length() - 1)
    first = torch.tensor(2.0 ** (-8 / n)) ** torch.arange(1, n + 1, dtype=torch.int32)
    beyond = torch.tensor(2.0 ** (-4 / n)) ** torch.arange(1, 2 * (num_heads - n) + 1, 2, dtype=torch.int32)
    return torch.cat((first, beyond))


class AlibiBloom(Alibi):
    """No parameters."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.slopes = slopes(config.num_attention_heads)
