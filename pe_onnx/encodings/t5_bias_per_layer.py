"""T5 relative bias with weights of its own in every layer.

T5 shares one table between all layers (``t5_bias``); UMT5 has one in each.

Formula::

    bias[l, h, i, j] = weight[l, bucket(max(i - j, 0)), h]        l = layer, bucket as for ``t5_bias``

Paper: Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, section
2.1, where all layers share one table; UMT5, Chung et al. 2023; transformers 5.23 ``UMT5Attention``.

Cost: num_buckets * H parameters in each layer. H T S numbers looked up a step in each layer.

Cache: cached keys hold no position and stay as they are. The bias is made anew at each step, in every layer; it depends
on the distance alone, not on the length.

Limits: as ``t5_bias``: no length limit; all distances from max_distance on count as one.
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
