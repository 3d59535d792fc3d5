"""Rotary positions (RoPE): pairs of channels of queries and keys turned by an angle proportional to the position.

The score of two rotated vectors depends on the distance alone. Values are not turned.

Formula::

    angle[t, i] = t * theta^(-2i/R)        i < R/2, R = rotary size
    out[a] = x[a] cos - x[b] sin           (a, b) = (i, i + R/2), or (2i, 2i + 1) where interleaved
    out[b] = x[b] cos + x[a] sin

Paper: Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding, section 3.2.2.

Cost: no parameters. R/2 cosines and sines a token, made once for all layers; in each layer 4 multiplications and 2
additions a pair, which is 3 R for each query head and each key head. Nothing grows with the length.

Cache: keys are cached as they were turned and never change. A step turns its new tokens alone.

Limits: no length limit: angles are computed from the position in float64 and their cosines and sines rounded to float32
inside the graph. R must be even and at most the head size. Past the trained length the slow pairs reach angles that
training never saw, which is what the scaled variants are for.
"""

from __future__ import annotations

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.custom_ops import rotary_embedding
from pe_onnx.encoding import PositionalEncoding, Tables
from pe_onnx.errors import ConfigError


class Rope(PositionalEncoding):
    """theta: the base. interleaved: pairs (2i, 2i+1) in place of (i, i + R/2). rotary_dim: R, 0 for the head size.

    Variants are subclasses in files of their own: other frequencies, and a factor on the cosines and sines.
    """

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
        self.theta = theta
        self.interleaved = interleaved
        self.head_size = config.head_size
        self.rotary_size = R
        self.exponent = torch.arange(0, R, 2, dtype=torch.float64) / R
        self.inverse_frequency = theta**-self.exponent  # no buffer: half() would round it
        self.attention_factor = 1.0
        """On the cosines and sines, and so twice on the scores."""

    def frequencies(self, positions: torch.Tensor) -> torch.Tensor:
        """float64 ``[R/2]``, radians per token, for a step whose positions are int64 ``[B, T]``."""
        return self.inverse_frequency.to(positions.device)

    def tables(self, positions: torch.Tensor) -> Tables:
        angle = positions.double()[..., None] * self.frequencies(positions)  # [B, T, R/2]
        cos, sin = angle.cos(), angle.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.float(), sin.float()

    def rotate(self, query: torch.Tensor, key: torch.Tensor, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
        return self.turn(query, tables), self.turn(key, tables)

    def turn(self, x: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Packed heads ``[B, T, n*D]`` by cosines and sines."""
        cos, sin = tables
        return rotary_embedding(x, cos, sin, x.shape[-1] // self.head_size, self.interleaved)
