"""ALiBi as MPT defines it: slopes of the next greater power of two, and their range a parameter.

With 8 these are ALiBi's own slopes, in its order. transformers 5.23 ignores a config's ``alibi_bias_max`` and takes 8.

Formula::

    bias[h, i, j] = -slope[h] (i - j)
    n = the least power of two >= H        s[k] = 2^(-alibi_bias_max (k + 1) / n)
    slopes = s                                                  where n = H
             s[1], s[3], ..., s[0], s[2], ..., the first H      otherwise

Paper: MosaicML 2023, MPT's reference code (``gen_slopes``); transformers 5.23 ``mpt.build_mpt_alibi_tensor``.

Cost: as ``alibi``: no parameters, H T S multiplications a step, made once for all layers.

Cache: as ``alibi``: cached keys stay, the bias is made anew at each step from distances alone.

Limits: no length limit; distances are exact to 2^24 tokens. Any head count.
"""

from __future__ import annotations

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import check
from pe_onnx.encodings.alibi import Alibi


def slopes(num_heads: int, alibi_bias_max: float = 8.0) -> torch.Tensor:
    """float64 ``[H]``."""
    n = 1 << (num_heads - 1).bit_length()
    s = 2.0 ** -(torch.arange(1, n + 1, dtype=torch.float64) * alibi_bias_max / n)
    return s if n == num_heads else torch.cat((s[1::2], s[::2]))[:num_heads]


class AlibiMpt(Alibi):
    """alibi_bias_max: the last head's slope is 2 to the minus this."""

    def __init__(self, config: DecoderConfig, *, alibi_bias_max: float = 8.0) -> None:
        super().__init__(config)
        check("alibi_mpt", alibi_bias_max > 0, "alibi_bias_max", alibi_bias_max, "positive")
        self.slopes = slopes(config.num_attention_heads, alibi_bias_max).float()
