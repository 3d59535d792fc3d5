"""RoPE with dynamic NTK scaling: the base grows with the length, from the trained length on.

Within the trained length it is plain RoPE. A step's own length decides, as in transformers, whose rule has no state.

Formula::

    n = max(greatest position of the step in the whole batch + 1, max_position_embeddings)
    theta' = theta * (factor n / max_position_embeddings - (factor - 1))^(R / (R - 2))
    angle[t, i] = t * theta'^(-2i/R)

Paper: emozilla 2023, dynamically scaled RoPE; transformers 5.23 ``rope_type: dynamic`` (``dynamic_rope_update``).

Cost: as ``rope``: no parameters; R/2 cosines and sines a token once for all layers, 3 R operations a query or key head
in each layer. The R/2 frequencies are made anew at each step.

Cache: keys cached before keep the angles they had, also where the base has grown since, so that keys of several bases
stand in one cache.

Limits: no length limit. Past the trained length the logits depend on the chunks in which a text was run, there as here:
it is path dependent, and depends on the longest row of a batch. R must be at least 4.
"""

from __future__ import annotations

from typing import Any

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import check
from pe_onnx.encodings.rope import Rope


class RopeDynamic(Rope):
    """factor: how fast the base grows. The trained length is the config's max_position_embeddings."""

    path_dependent = True
    reads_trained_length = True

    def __init__(self, config: DecoderConfig, *, factor: float = 4.0, **rotary: Any) -> None:
        super().__init__(config, **rotary)
        R = self.rotary_size
        check("rope_dynamic", factor >= 1, "factor", factor, "at least 1")
        check("rope_dynamic", R > 2, "rotary size", R, "at least 4")
        self.factor = factor
        self.trained = config.max_position_embeddings
        self.power = R / (R - 2)

    def frequencies(self, positions: torch.Tensor) -> torch.Tensor:
        length = (positions.max() + 1).clamp(min=self.trained).double()
        growth = self.factor * length / self.trained - (self.factor - 1)
        return (self.theta * growth**self.power) ** -self.exponent.to(positions.device)
