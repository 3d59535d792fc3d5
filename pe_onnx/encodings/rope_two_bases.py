"""RoPE with two bases by layer type: a small one for local layers, a great one for every n-th, global layer.

The layers differ in their angles alone: no window. Gemma 3 has n = 6, ModernBERT n = 3.

Formula::

    angle[t, i] = t * local_theta^(-2i/R)           layers 0 .. n - 2, n .. 2n - 2, ...
                  t * theta^(-2i/R) / factor        layers n - 1, 2n - 1, ...

Paper: Gemma 3 technical report 2025, section 2; transformers 5.23 ``rope_parameters`` nested by layer type.

Cost: as ``rope``, but for two tables: no parameters; twice R/2 cosines and sines a token, 3 R operations a query or key
head in each layer.

Cache: as ``rope``: keys are cached as they were turned and never change. Each layer's are of its own base.

Limits: as ``rope``: no length limit; R even and at most the head size.
"""

from __future__ import annotations

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PerLayer, check
from pe_onnx.encodings.rope import Rope
from pe_onnx.encodings.rope_linear import RopeLinear


class RopeTwoBases(PerLayer):
    """theta, factor: base and linear scaling of the global layers. local_theta: of the others. global_every: n.
    interleaved, rotary_dim as for ``rope``."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        theta: float = 1000000.0,
        local_theta: float = 10000.0,
        global_every: int = 2,
        factor: float = 1.0,
        interleaved: bool = False,
        rotary_dim: int = 0,
    ) -> None:
        check("rope_two_bases", global_every > 0, "global_every", global_every, "at least 1")
        local = Rope(config, theta=local_theta, interleaved=interleaved, rotary_dim=rotary_dim)
        wide = RopeLinear(config, factor=factor, theta=theta, interleaved=interleaved, rotary_dim=rotary_dim)
        super().__init__(config, (local if (i + 1) % global_every else wide for i in range(config.num_hidden_layers)))
