"""RoPE with layers that have none: every n-th layer sees no position at all.

Llama 4's temperature on the queries of the layers without is not part of it.

Formula::

    layers 0 .. n - 2, n .. 2n - 2, ...    angle[t, i] = t * theta^(-2i/R)
    layers n - 1, 2n - 1, ...              queries and keys as they are

Paper: Yang et al. 2025, Rope to Nope and Back Again: A New Hybrid Attention Strategy; SmolLM3 and Llama 4 (transformers
5.23 ``no_rope_layer_interval``, 4).

Cost: no parameters. R/2 cosines and sines a token, made once; 3 R operations a query or key head in the layers that
turn, none in the others.

Cache: keys are cached as they were turned, or as they are, and never change.

Limits: as ``rope``: no length limit; R even and at most the head size.
"""

from __future__ import annotations

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PerLayer, check
from pe_onnx.encodings.none import NoEncoding
from pe_onnx.encodings.rope import Rope


class RopeNope(PerLayer):
    """no_rope_layer_interval: n. theta, interleaved, rotary_dim as for ``rope``."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        no_rope_layer_interval: int = 2,
        theta: float = 10000.0,
        interleaved: bool = False,
        rotary_dim: int = 0,
    ) -> None:
        interval = no_rope_layer_interval
        check("rope_nope", interval > 0, "no_rope_layer_interval", interval, "at least 1")
        turned = Rope(config, theta=theta, interleaved=interleaved, rotary_dim=rotary_dim)
        without = NoEncoding(config)
        super().__init__(config, (turned if (i + 1) % interval else without for i in range(config.num_hidden_layers)))
