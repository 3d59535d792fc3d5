"""Learned absolute positions: a trained vector per position, added to the token embedding.

The vector is added once, before the first layer; attention itself knows nothing of positions.

Formula::

    x[t] = embedding[token[t]] + table[position[t]]

Paper: Gehring et al. 2017, Convolutional Sequence to Sequence Learning; GPT-2, Radford et al. 2019.

Cost: max_position_embeddings * C parameters. One row looked up and C additions a token, once, not for each layer.

Cache: a cached key carries its absolute position for good; nothing is computed again. A text whose beginning is dropped
cannot be moved to the front without running it anew.

Limits: the table's length is a hard limit: there is no vector for a further position, and a longer text is refused.
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
