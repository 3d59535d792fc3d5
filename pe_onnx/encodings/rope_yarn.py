"""RoPE by YaRN: high frequencies kept, low ones interpolated, a ramp between, and the scores sharpened.

With truncate the ramp begins at a whole pair and ends at one. mscale and mscale_all_dim (DeepSeek), where both are
given, make the last factor (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).

Formula::

    pair(r) = R ln(original / (2 pi r)) / (2 ln theta)             the pair that turns r times in the original length
    ramp[i] = clip((i - pair(beta_fast)) / (pair(beta_slow) - pair(beta_fast)), 0, 1)
    angle[t, i] = t * theta^(-2i/R) * ((1 - ramp[i]) + ramp[i] / factor)
    cosines and sines times  0.1 ln(factor) + 1

Paper: Peng et al. 2023, YaRN: Efficient Context Window Extension of Large Language Models, definition 2 and equation
22; transformers 5.23 ``rope_type: yarn``.

Cost: as ``rope``: no parameters; R/2 cosines and sines a token once for all layers, 3 R operations a query or key head
in each layer. The ramp is computed at the export, and the factor is on the tables: the scores take it twice at no
further cost.

Cache: as ``rope``: keys are cached as they were turned and never change. The frequencies are the same at every length.

Limits: no length limit in the graph. The factor is at least 1, theta greater than 1. The scores are sharpened at short
lengths too.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import check
from pe_onnx.encodings.rope import Rope


class RopeYarn(Rope):
    """factor: the ratio of the lengths. original_max_position_embeddings: tokens; 0 for max_position_embeddings /
    factor. beta_fast, beta_slow: turns. attention_factor: on the cosines and sines; None for the formula above."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        factor: float = 4.0,
        original_max_position_embeddings: int = 0,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        truncate: bool = True,
        attention_factor: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        **rotary: Any,
    ) -> None:
        super().__init__(config, **rotary)
        check("rope_yarn", factor >= 1, "factor", factor, "at least 1")
        check("rope_yarn", beta_fast >= beta_slow > 0, "beta_fast", beta_fast, f"at least beta_slow = {beta_slow} > 0")
        check("rope_yarn", self.theta > 1, "theta", self.theta, "greater than 1")
        original = original_max_position_embeddings or int(config.max_position_embeddings / factor)
        check("rope_yarn", original > 0, "original_max_position_embeddings", original, "at least 1")
        R = self.rotary_size

        def pair(turns: float) -> float:
            return R * math.log(original / (2 * math.pi * turns)) / (2 * math.log(self.theta))

        low, high = pair(beta_fast), pair(beta_slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        if low == high:
            high += 0.001  # as transformers has it
        ramp = ((torch.arange(R // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
        self.inverse_frequency = self.inverse_frequency * ((1 - ramp) + ramp / factor)

        def sharpness(strength: float) -> float:
            return 0.1 * strength * math.log(factor) + 1

        if attention_factor is None:
            given = mscale and mscale_all_dim
            attention_factor = sharpness(mscale) / sharpness(mscale_all_dim) if given else sharpness(1)  # type: ignore[arg-type]
        check("rope_yarn", attention_factor > 0, "attention_factor", attention_factor, "positive")
        self.attention_factor = attention_factor
