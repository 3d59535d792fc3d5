"""Rotary positions (RoPE): pairs of channels of queries and keys turned by an angle proportional to the position.

Su et al. 2021, RoFormer, section 3.2.2. The score of two rotated vectors depends on the distance alone, and a cached
key never changes::

    angle[t, i] = t * theta^(-2i/R)        i < R/2, R = rotary size

Angles are computed from the position in float64 and their cosines and sines rounded to float32 inside the graph: no
table limits the length.
"""

from __future__ import annotations

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.custom_ops import rotary_embedding
from pe_onnx.encoding import PositionalEncoding, Tables
from pe_onnx.errors import ConfigError


class Rope(PositionalEncoding):
    """theta: the base. interleaved: pairs (2i, 2i+1) in place of (i, i + R/2). rotary_dim: R, 0 for the head size."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        theta: float = 10000.0,
        interleaved: bool = False,
        rotary_dim: int = 0,
    ) -> None:
        super().__init__(config)
        R = rotary_dim or config.head_size
        if R % 2 or not 0 < R <= config.head_size:
            raise ConfigError(f"rope: rotary size = {R} must be even and at most the head size = {config.head_size}")
        if theta <= 0:
            raise ConfigError(f"rope: theta = {theta} must be positive")
        self.interleaved = interleaved
        exponent = torch.arange(0, R, 2, dtype=torch.float64) / R
        self.inverse_frequency = theta**-exponent  # no buffer: half() would round it

    def tables(self, positions: torch.Tensor) -> Tables:
        angle = positions.double()[..., None] * self.inverse_frequency.to(positions.device)  # [B, T, R/2]
        return angle.cos().float(), angle.sin().float()

    def rotate(self, x: torch.Tensor, tables: Tables, num_heads: int) -> torch.Tensor:
        return rotary_embedding(x, *tables, num_heads, self.interleaved)
