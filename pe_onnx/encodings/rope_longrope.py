"""RoPE with LongRoPE's searched factors: one per frequency, a short set and a long one.

A step's own length decides which set it takes, as in transformers, whose rule has no state.

Formula::

    angle[t, i] = t * theta^(-2i/R) / f[i]
    f = long_factor   where the greatest position of the step in the whole batch + 1 > original_max_position_embeddings
        short_factor  elsewhere
    cosines and sines times sqrt(1 + ln(factor) / ln(original_max_position_embeddings)), at every length

Paper: Ding et al. 2024, LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens, equation 3; transformers 5.23
``rope_type: longrope`` (Phi-3).

Cost: as ``rope``: no parameters; R/2 cosines and sines a token once for all layers, 3 R operations a query or key head
in each layer. Both sets are in the graph, one is chosen a step.

Cache: keys cached before keep the angles they had, also where the long set has taken over since, so that keys of both
sets stand in one cache.

Limits: no length limit. Past the original length the logits depend on the chunks in which a text was run, there as
here: it is path dependent, and depends on the longest row of a batch. Each set has R/2 numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import check
from pe_onnx.encodings.rope import Rope


class RopeLongrope(Rope):
    """short_factor, long_factor: R/2 numbers each; empty for 1 and for factor everywhere. factor: the ratio of the
    lengths. original_max_position_embeddings: 0 for max_position_embeddings / factor. attention_factor: on the
    cosines and sines; None for the formula above."""

    path_dependent = True

    def __init__(
        self,
        config: DecoderConfig,
        *,
        short_factor: tuple[float, ...] = (),
        long_factor: tuple[float, ...] = (),
        factor: float = 4.0,
        original_max_position_embeddings: int = 0,
        attention_factor: float | None = None,
        **rotary: Any,
    ) -> None:
        super().__init__(config, **rotary)
        half = self.rotary_size // 2
        check("rope_longrope", factor >= 1, "factor", factor, "at least 1")
        self.original = original_max_position_embeddings or int(config.max_position_embeddings / factor)
        check("rope_longrope", self.original > 1, "original_max_position_embeddings", self.original, "at least 2")
        sets = {"short_factor": short_factor or (1.0,) * half, "long_factor": long_factor or (factor,) * half}
        for name, values in sets.items():
            check("rope_longrope", len(values) == half, name, values, f"{half} numbers, one for each pair of channels")
            check("rope_longrope", min(values) > 0, name, values, "positive")
        short, long = (torch.tensor(values, dtype=torch.float64) for values in sets.values())
        self.long_frequency = self.inverse_frequency / long
        self.inverse_frequency = self.inverse_frequency / short
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(self.original))
        check("rope_longrope", attention_factor > 0, "attention_factor", attention_factor, "positive")
        self.attention_factor = attention_factor

    def frequencies(self, positions: torch.Tensor) -> torch.Tensor:
        device = positions.device
        is_long = positions.max() + 1 > self.original
        return torch.where(is_long, self.long_frequency.to(device), self.inverse_frequency.to(device))
