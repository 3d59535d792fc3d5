"""FIRE: a small network of the distance relative to the query's own position, one in every layer.

The distance is measured against the query's position, so that a longer text stays within the range that the network was
trained on. ``fire_shared`` is the paper's FIRE-S, whose bias is made once per step.

Formula::

    d = max(query_position - key_position, 0)        L = |threshold|
    x = psi(d) / psi(max(query_position, L))         psi(y) = log(|c| y + 1)
    bias[h, i, j] = output[h] . relu(hidden x + hidden_bias) + output_bias[h]

Paper: Li et al. 2024, Functional Interpolation for Relative Positions Improves Long Context Transformers, section 3.

Cost: 2 + 2 width + (width + 1) H parameters in each layer. Each layer computes width hidden units for each pair of
query and key, and from them H terms: the dearest of all biases here.

Cache: cached keys hold no position and stay as they are. The bias depends on the query's own position beside the
distance, so that none of an earlier step's can be used again: each step computes it in full, in every layer.

Limits: no length limit: x stays within 0 and 1. Computed in float32, whose counting is exact to 2^24 tokens.
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
