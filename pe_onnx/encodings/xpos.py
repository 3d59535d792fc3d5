"""xPos: RoPE whose channels fade with the distance, the fast ones the more, so that far scores do not oscillate.

Query and key have reciprocal factors, so that a pair's part of the score has the factor zeta[i]^(distance /
scale_base). torchscale centres c on the length so far and turns all keys anew at each step; cached keys must stay, so c
is a constant here, which cancels in every score.

Formula::

    zeta[i] = (2i + 0.4 R) / (1.4 R)        angle[t, i] = t * theta^(-2i/R)
    query pair i at t:  turned by the angle, times zeta[i]^( (t - c) / scale_base)
    key pair i at t:    turned by the angle, times zeta[i]^(-(t - c) / scale_base)

Paper: Sun et al. 2022, A Length-Extrapolatable Transformer, section 3.2, algorithm 1; torchscale's ``XPOS``, scale_base
512.

Cost: no parameters. Two tables, one for queries and one for keys: R/2 cosines and sines and R powers a token, made once
for all layers; 3 R operations a query or key head in each layer, as for ``rope``.

Cache: keys are cached turned and scaled, and never change: the centre is fixed.

Limits: the two factors grow without bound in |t - c|. Where they would leave the range of the cache's dtype the length
ends (``max_length``), and a longer text is refused: with scale_base 512 at about 26,000 tokens in float32 and 4,900 in
float16, in proportion to scale_base.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import Tables, check
from pe_onnx.encodings.rope import Rope

REACH = {"fp32": 60.0, "fp16": 6.0, "bf16": 60.0}
"""Greatest exponent of e in a factor: float32 and bfloat16 hold e^88, float16 e^11, and a query or a key stands beside
it."""


class Xpos(Rope):
    """scale_base: tokens over which a pair fades by zeta. interleaved: here as in the paper. theta, rotary_dim as for
    ``rope``."""

    def __init__(
        self, config: DecoderConfig, *, scale_base: float = 512.0, interleaved: bool = True, **rotary: Any
    ) -> None:
        super().__init__(config, interleaved=interleaved, **rotary)
        check("xpos", scale_base > 0, "scale_base", scale_base, "positive")
        R = self.rotary_size
        zeta = (torch.arange(0, R, 2, dtype=torch.float64) + 0.4 * R) / (1.4 * R)
        self.decay = zeta.log() / scale_base  # [R/2], per token
        self.center = min(config.max_position_embeddings // 2, self.reach("fp16"))
        check("xpos", self.reach("fp16") > 0, "scale_base", scale_base, "greater: no two tokens fit float16")

    def reach(self, dtype: str) -> int:
        """Tokens on each side of the centre whose factors fit."""
        return math.floor(REACH[dtype] / -float(self.decay[0]))

    @property
    def max_length(self) -> int:
        return self.max_length_in("fp32")

    def max_length_in(self, dtype: str) -> int:
        return self.center + self.reach(dtype) + 1

    def tables(self, positions: torch.Tensor) -> Tables:
        cos, sin = super().tables(positions)
        exponent = (positions - self.center).double()[..., None] * self.decay.to(positions.device)  # [B, T, R/2]
        grown, shrunk = (-exponent).exp().float(), exponent.exp().float()
        return cos * shrunk, sin * shrunk, cos * grown, sin * grown

    def rotate(self, query: torch.Tensor, key: torch.Tensor, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
        return self.turn(query, tables[:2]), self.turn(key, tables[2:])
