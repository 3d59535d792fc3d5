"""T5 relative bias with weights of its own in every layer.

Raffel et al. 2020, section 2.1, where all layers share one table (``t5_bias``); UMT5 (Chung et al. 2023; transformers
5.23 ``UMT5Attention``) has one in each. The formula stands in ``custom_ops/t5_relative_bias.py``.
"""

from __future__ import annotations

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PerLayer
from pe_onnx.encodings.t5_bias import T5Bias


class T5BiasPerLayer(PerLayer):
    """num_buckets and max_distance (tokens) as in UMT5's config."""

    def __init__(self, config: DecoderConfig, *, num_buckets: int = 32, max_distance: int = 128) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(config, (T5Bias(config, num_buckets=num_buckets, max_distance=max_distance) for _ in layers))
