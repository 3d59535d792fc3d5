"""Interleaved RoPE: neighbouring channels form the pairs that turn.

Su et al. 2021, RoFormer, equation 34; GPT-J, Cohere, ERNIE 4.5, Helium. ``rope`` pairs (i, i + R/2) as GPT-NeoX and
Llama do::

    out[2i]     = x[2i] cos - x[2i + 1] sin        angle[t, i] = t * theta^(-2i/R)
    out[2i + 1] = x[2i + 1] cos + x[2i] sin

Every other RoPE variant takes ``interleaved=true``.
"""

from __future__ import annotations

from pe_onnx.config import DecoderConfig
from pe_onnx.encodings.rope import Rope


class RopeInterleaved(Rope):
    """theta and rotary_dim as for ``rope``."""

    def __init__(self, config: DecoderConfig, *, theta: float = 10000.0, rotary_dim: int = 0) -> None:
        super().__init__(config, theta=theta, interleaved=True, rotary_dim=rotary_dim)
