"""Proportional RoPE: only the highest frequencies turn, and they stand where they stand in full RoPE.

Unlike ``rope_partial`` the exponent runs over the whole head, and the pairs (i, i + R/2) span it, so that the channels
left alone are not the last ones.

Formula::

    angle[t, i] = t * theta^(-2i/R) / factor        i < n = int(partial_rotary_factor * R / 2)
                  0                                 otherwise

Paper: Gemma 4; transformers 5.23 ``rope_type: proportional``.

Cost: as ``rope``, in full: the pairs that stand still are turned by an angle of 0.

Cache: as ``rope``: keys are cached as they were turned and never change.

Limits: no length limit. At least one pair must turn. The pairs left alone score alike at every distance.
"""

from __future__ import annotations

from typing import Any

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import check
from pe_onnx.encodings.rope import Rope


class RopeProportional(Rope):
    """partial_rotary_factor: the share of pairs that turn. factor: linear scaling on top."""

    def __init__(
        self, config: DecoderConfig, *, partial_rotary_factor: float = 0.25, factor: float = 1.0, **rotary: Any
    ) -> None:
        super().__init__(config, **rotary)
        R = self.rotary_size
        turning = int(partial_rotary_factor * R // 2)
        check("rope_proportional", factor >= 1, "factor", factor, "at least 1")
        text = f"at most 1, and turn one of the {R // 2} pairs"
        check("rope_proportional", 0 < turning <= R // 2, "partial_rotary_factor", partial_rotary_factor, text)
        self.inverse_frequency = torch.where(torch.arange(R // 2) < turning, self.inverse_frequency / factor, 0.0)
