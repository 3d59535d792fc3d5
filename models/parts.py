"""The graphs of a bundle before they are traced: a module each, inputs to trace it on, and the contract's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pe_onnx import contract
from pe_onnx.bundle import DECODER, ENCODER, MODEL
from pe_onnx.contract import CacheShape
from pe_onnx.models.exportable import Exportable

BATCH, NEW, BEFORE, SOURCE, PAST_SOURCE = 2, 3, 5, 7, 4
"""Sizes that differ from each other and from 1, lest two dimensions be taken for one."""
ANY = torch.export.Dim.DYNAMIC
ROWS = {0: ANY, 1: ANY}
CACHE = {0: ANY, 2: ANY}


@dataclass
class Part:
    """One ONNX file."""

    file: str
    module: nn.Module
    args: tuple[Any, ...]
    """A tensor of its own for each input, lest two be taken for one."""
    dynamic_shapes: tuple[Any, ...]
    inputs: contract.Shapes
    outputs: contract.Shapes


def parts(e: Exportable, dtype: torch.dtype, logits: str) -> list[Part]:
    """The decoder, or the encoder and the decoder."""
    inputs = contract.input_shapes(e.caches, e.crossing)
    outputs = contract.output_shapes(e.caches, e.vocab_size, logits, e.crossing)
    modules: Any = e.module
    new, mask = _rows(NEW), _rows(BEFORE + NEW)
    own = _caches(e.caches, BEFORE, dtype)
    if e.crossing is None:
        args: tuple[Any, ...] = (new, mask, _rows(NEW), own)
        return [Part(MODEL, e.module, args, (ROWS, ROWS, ROWS, [(CACHE,) * 2] * len(own)), inputs, outputs)]
    encoder = Part(
        ENCODER, modules.encoder, (_rows(SOURCE), _rows(SOURCE)), (ROWS, ROWS), *contract.encoder_shapes(e.crossing)
    )
    crossed = _caches(e.crossing.caches, PAST_SOURCE, dtype)
    past = [(*pair, *across) for pair, across in zip(own, crossed, strict=True)]
    hidden = torch.zeros(BATCH, SOURCE, e.crossing.width, dtype=dtype)
    args = (new, mask, hidden, _rows(SOURCE), past)
    shapes = (ROWS, ROWS, ROWS, ROWS, [(CACHE,) * 4] * len(past))
    return [encoder, Part(DECODER, modules.decoder, args, shapes, inputs, outputs)]


def _rows(tokens: int) -> torch.Tensor:
    return torch.ones(BATCH, tokens, dtype=torch.int64)


def _caches(sizes: Sequence[CacheShape], tokens: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(torch.zeros(BATCH, K, tokens, D, dtype=dtype) for _ in range(2)) for K, D in sizes]
