"""Learned absolute positions: a trained vector per position, added to the token embedding.

Gehring et al. 2017; GPT-2. The table's length is a hard limit::

    x[t] = embedding[token[t]] + table[position[t]]
"""

from __future__ import annotations

import torch
from torch import nn

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PositionalEncoding


class Learned(PositionalEncoding):
    """A table ``[max_position_embeddings, C]``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    @property
    def max_length(self) -> int:
        return self.table.num_embeddings

    def embed(self, positions: torch.Tensor) -> torch.Tensor:
        return self.table(positions)
