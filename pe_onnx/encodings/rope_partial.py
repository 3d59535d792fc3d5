"""Partial RoPE: the first channels of each head turn, the rest pass as they are.

The frequencies are those of a head of R channels. GPT-NeoX (``rotary_pct``), Phi and StableLM have it. Every other RoPE
variant takes R as ``rotary_dim``.

Formula::

    R = int(partial_rotary_factor * D)        angle[t, i] = t * theta^(-2i/R), i < R/2

Paper: GPT-NeoX, Black et al. 2022, GPT-NeoX-20B: An Open-Source Autoregressive Language Model; transformers 5.23
``partial_rotary_factor``.

Cost: no parameters. R/2 cosines and sines a token, made once for all layers; 3 R operations a query or key head in each
layer, in proportion to the share that turns.

Cache: as ``rope``: keys are cached as they were turned and never change.

Limits: no length limit. R must be even, above 0 and at most the head size. The channels left alone score alike at every
distance.
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
