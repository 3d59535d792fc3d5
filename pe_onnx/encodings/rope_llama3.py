"""RoPE as Llama 3.1 extends it: long wavelengths interpolated, short ones kept, a ramp between.

Pairs that turn high_freq_factor times or more in the original length stay, those that turn low_freq_factor times or
less are slowed down by the factor.

Formula::

    s[i] = (original / wavelength[i] - low_freq_factor) / (high_freq_factor - low_freq_factor), clipped to 0 .. 1
    angle[t, i] = t * theta^(-2i/R) * (s[i] + (1 - s[i]) / factor)        wavelength[i] = 2 pi theta^(2i/R)

Paper: Llama 3.1's reference code (``apply_scaling``); transformers 5.23 ``rope_type: llama3``.

Cost: as ``rope``: no parameters; R/2 cosines and sines a token once for all layers, 3 R operations a query or key head
in each layer. The ramp is computed at the export.

Cache: as ``rope``: keys are cached as they were turned and never change. The frequencies are the same at every length.

Limits: no length limit in the graph. The factor is at least 1, and high_freq_factor greater than low_freq_factor.
"""

from __future__ import annotations

import math
from typing import Any

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import check
from pe_onnx.encodings.rope import Rope


class RopeLlama3(Rope):
    """factor: the ratio of the lengths. low_freq_factor, high_freq_factor: turns in the original length between which
    the ramp runs. original_max_position_embeddings: tokens; 0 for max_position_embeddings / factor."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        factor: float = 8.0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        original_max_position_embeddings: int = 0,
        **rotary: Any,
    ) -> None:
        super().__init__(config, **rotary)
        check("rope_llama3", factor >= 1, "factor", factor, "at least 1")
        text = f"greater than low_freq_factor = {low_freq_factor} > 0"
        check("rope_llama3", high_freq_factor > low_freq_factor > 0, "high_freq_factor", high_freq_factor, text)
        original = original_max_position_embeddings or int(config.max_position_embeddings / factor)
        check("rope_llama3", original > 0, "original_max_position_embeddings", original, "at least 1")
        turns = original * self.inverse_frequency / (2 * math.pi)  # original / wavelength
        smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
        self.inverse_frequency = self.inverse_frequency * (smooth + (1 - smooth) / factor)
