"""FIRE: a small network of the distance relative to the query's own position, one in every layer.

Li et al. 2024, Functional Interpolation for Relative Positions, section 3; the formula stands in
``custom_ops/fire_bias.py``. ``fire_shared`` is the paper's FIRE-S, whose bias is made once per step.
"""

from __future__ import annotations

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PerLayer
from pe_onnx.encodings.fire_shared import FireShared


class Fire(PerLayer):
    """width: hidden units. c, threshold (tokens): what these two weights begin with."""

    def __init__(self, config: DecoderConfig, *, width: int = 32, c: float = 0.1, threshold: float = 512.0) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(config, (FireShared(config, width=width, c=c, threshold=threshold) for _ in layers))
