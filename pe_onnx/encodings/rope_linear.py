"""RoPE with position interpolation: every position divided by a factor, as if tokens stood closer together.

A text of factor times the trained length stays within the angles of training; neighbours differ by angles factor times
smaller.

Formula::

    angle[t, i] = t / factor * theta^(-2i/R)

Paper: Chen et al. 2023, Extending Context Window of Large Language Models via Positional Interpolation, equation 4;
transformers 5.23 ``rope_type: linear``.

Cost: as ``rope``: no parameters; R/2 cosines and sines a token once for all layers, 3 R operations a query or key head
in each layer.

Cache: as ``rope``: keys are cached as they were turned and never change. The factor is the same at every length.

Limits: no length limit in the graph; angles of training end at factor times the trained length. The factor is at least
1.
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
