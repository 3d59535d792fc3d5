"""RoPE with the fixed NTK-aware base: a greater base, so that low frequencies stretch and high ones stay.

The lowest frequency is divided by the factor, the highest stays what it was; it is the same at every length.

Formula::

    theta' = theta * factor^(R / (R - 2))        angle[t, i] = t * theta'^(-2i/R)

Paper: bloc97 2023, NTK-aware scaled RoPE; Peng et al. 2023, YaRN: Efficient Context Window Extension of Large Language
Models, definition 1.

Cost: as ``rope``: no parameters; R/2 cosines and sines a token once for all layers, 3 R operations a query or key head
in each layer.

Cache: as ``rope``: keys are cached as they were turned and never change.

Limits: no length limit in the graph. R must be at least 4, the factor at least 1.
"""

from __future__ import annotations

from typing import Any

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import check
from pe_onnx.encodings.rope import Rope


class RopeNtk(Rope):
    """factor: the lowest frequency is divided by it."""

    def __init__(self, config: DecoderConfig, *, factor: float = 4.0, **rotary: Any) -> None:
        super().__init__(config, **rotary)
        R = self.rotary_size
        check("rope_ntk", factor >= 1, "factor", factor, "at least 1")
        check("rope_ntk", R > 2, "rotary size", R, "at least 4")
        self.inverse_frequency = (self.theta * factor ** (R / (R - 2))) ** -self.exponent
