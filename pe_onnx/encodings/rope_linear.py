"""RoPE with position interpolation: every position divided by a factor, as if tokens stood closer together.

Chen et al. 2023, Extending Context Window of Large Language Models via Positional Interpolation, equation 4;
transformers 5.23 ``rope_type: linear``::

    angle[t, i] = t / factor * theta^(-2i/R)
"""

from __future__ import annotations

from typing import Any

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import check
from pe_onnx.encodings.rope import Rope


class RopeLinear(Rope):
    """factor: trained tokens become factor times as many."""

    def __init__(self, config: DecoderConfig, *, factor: float = 4.0, **rotary: Any) -> None:
        super().__init__(config, **rotary)
        check("rope_linear", factor >= 1, "factor", factor, "at least 1")
        self.inverse_frequency = self.inverse_frequency / factor
