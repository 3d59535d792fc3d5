"""Sinusoidal absolute positions: fixed sines and cosines of the position, added to the token embedding.

The vector is added once, before the first layer. The dot product of two of these vectors depends on their distance
alone, but each layer's weights stand between them and the scores.

Formula::

    PE[t, 2i] = sin(t / theta^(2i/C))        PE[t, 2i + 1] = cos(t / theta^(2i/C))

Paper: Vaswani et al. 2017, Attention Is All You Need, section 3.5.

Cost: no parameters. C sines and cosines and C additions a token, once, not for each layer.

Cache: a cached key carries its absolute position for good; nothing is computed again. A text whose beginning is dropped
cannot be moved to the front without running it anew.

Limits: no table limits the length: computed from the position in float64 and rounded to float32 inside the graph. C
must be even. Past the trained length the model meets vectors that it never saw.
"""

from __future__ import annotations

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PositionalEncoding
from pe_onnx.errors import ConfigError


class Sinusoidal(PositionalEncoding):
    """theta: the base of the wavelengths, 2 pi to 2 pi theta tokens."""

    def __init__(self, config: DecoderConfig, *, theta: float = 10000.0) -> None:
        super().__init__(config)
        C = config.hidden_size
        if C % 2 or theta <= 0:
            raise ConfigError(f"sinusoidal: hidden_size = {C} must be even and theta = {theta} positive")
        exponent = torch.arange(0, C, 2, dtype=torch.float64) / C
        self.inverse_wavelength = theta**-exponent  # no buffer: half() would round it

    def embed(self, positions: torch.Tensor) -> torch.Tensor:
        angle = positions.double()[..., None] * self.inverse_wavelength.to(positions.device)  # [B, T, C/2]
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).float()  # [B, T, C]
