"""Interleaved RoPE: neighbouring channels form the pairs that turn.

``rope`` pairs (i, i + R/2) as GPT-NeoX and Llama do; GPT-J, Cohere, ERNIE 4.5 and Helium pair neighbours, as the paper
does. The two differ by an order of the channels, which the weights of queries and keys hold too. Every other RoPE
variant takes ``interleaved=true``.

Formula::

    out[2i]     = x[2i] cos - x[2i + 1] sin        angle[t, i] = t * theta^(-2i/R)
    out[2i + 1] = x[2i + 1] cos + x[2i] sin

Paper: Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding, equation 34.

Cost: as ``rope``: no parameters; R/2 cosines and sines a token once for all layers, 3 R operations a query or key head
in each layer.

Cache: as ``rope``: keys are cached as they were turned and never change.

Limits: as ``rope``: no length limit; R even and at most the head size. Weights that were trained with the other pairing
give other logits without any error.
"""

from __future__ import annotations

from pe_onnx.config import DecoderConfig
from pe_onnx.encodings.rope import Rope


class RopeInterleaved(Rope):
    """theta and rotary_dim as for ``rope``."""

    def __init__(self, config: DecoderConfig, *, theta: float = 10000.0, rotary_dim: int = 0) -> None:
        super().__init__(config, theta=theta, interleaved=True, rotary_dim=rotary_dim)
