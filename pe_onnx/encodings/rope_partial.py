"""Partial RoPE: the first channels of each head turn, the rest pass as they are.

GPT-NeoX (``rotary_pct``), Phi, StableLM; transformers 5.23 ``partial_rotary_factor``. The frequencies are those of a
head of R channels::

    R = int(partial_rotary_factor * D)        angle[t, i] = t * theta^(-2i/R), i < R/2

Every other RoPE variant takes R as ``rotary_dim``.
"""

from __future__ import annotations

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import check
from pe_onnx.encodings.rope import Rope


class RopePartial(Rope):
    """partial_rotary_factor: the share of channels that turn. theta, interleaved as for ``rope``."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        partial_rotary_factor: float = 0.25,
        theta: float = 10000.0,
        interleaved: bool = False,
    ) -> None:
        R = int(partial_rotary_factor * config.head_size)
        text = f"at most 1, and leave an even number of the {config.head_size} channels; it leaves {R}"
        valid = 0 < R <= config.head_size and R % 2 == 0
        check("rope_partial", valid, "partial_rotary_factor", partial_rotary_factor, text)
        super().__init__(config, theta=theta, interleaved=interleaved, rotary_dim=R)
