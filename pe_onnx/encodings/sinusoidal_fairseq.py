"""Sinusoidal positions in fairseq's layout: all sines, then all cosines, behind an offset.

The exponent runs over C/2 - 1, so that the last wavelength is 2 pi theta itself. The table's padding row, all zeros,
stands at row offset - 1: no position reaches it.

Formula::

    p = t + offset        w[i] = theta^(-i / (h - 1))        h = floor(C / 2)
    PE[t, i] = sin(p w[i])        PE[t, h + i] = cos(p w[i])        an odd last channel is 0

Paper: tensor2tensor and fairseq ``SinusoidalPositionalEmbedding``; transformers 5.23
``XGLMSinusoidalPositionalEmbedding`` (offset 2), M2M100.

Cost: no parameters. C sines and cosines and C additions a token, once, not for each layer.

Cache: as ``sinusoidal``: a cached key carries its absolute position for good, and nothing is computed again.

Limits: no table limits the length: computed in float64 and rounded to float32 inside the graph. C must be at least 4.
"""

from __future__ import annotations

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PositionalEncoding, check


class SinusoidalFairseq(PositionalEncoding):
    """theta: the base of the wavelengths. offset: added to every position."""

    def __init__(self, config: DecoderConfig, *, theta: float = 10000.0, offset: int = 2) -> None:
        super().__init__(config)
        C = config.hidden_size
        check("sinusoidal_fairseq", C >= 4, "hidden_size", C, "at least 4")
        check("sinusoidal_fairseq", theta > 0, "theta", theta, "positive")
        check("sinusoidal_fairseq", offset >= 0, "offset", offset, "at least 0")
        half = C // 2
        self.offset = offset
        self.odd = C % 2
        self.inverse_wavelength = theta ** -(torch.arange(half, dtype=torch.float64) / (half - 1))

    def embed(self, positions: torch.Tensor) -> torch.Tensor:
        angle = (positions + self.offset).double()[..., None] * self.inverse_wavelength.to(positions.device)
        table = torch.cat((angle.sin(), angle.cos()), -1).float()  # [B, T, 2h]
        return torch.nn.functional.pad(table, (0, 1)) if self.odd else table
