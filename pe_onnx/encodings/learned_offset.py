"""Learned positions behind an offset: the first rows of the table belong to no position.

fairseq's learned embedding pushes the positions up by its padding index; OPT keeps that.

Formula::

    x[t] = embedding[token[t]] + table[position[t] + offset]

Paper: OPT, Zhang et al. 2022, OPT: Open Pre-trained Transformer Language Models; transformers 5.23
``OPTLearnedPositionalEmbedding``, offset 2.

Cost: (max_position_embeddings + offset) * C parameters. One row looked up and C additions a token, once, not for each
layer.

Cache: as ``learned``: a cached key carries its absolute position for good, and nothing is computed again.

Limits: the table's length less the offset is a hard limit; a longer text is refused.
"""

from __future__ import annotations

import torch
from torch import nn

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PositionalEncoding, check


class LearnedOffset(PositionalEncoding):
    """offset: rows before position 0; the table is ``[max_position_embeddings + offset, C]``."""

    def __init__(self, config: DecoderConfig, *, offset: int = 2) -> None:
        super().__init__(config)
        check("learned_offset", offset >= 0, "offset", offset, "at least 0")
        self.offset = offset
        self.table = nn.Embedding(config.max_position_embeddings + offset, config.hidden_size)

    @property
    def max_length(self) -> int:
        return self.table.num_embeddings - self.offset

    def embed(self, positions: torch.Tensor) -> torch.Tensor:
        return self.table(positions + self.offset)
