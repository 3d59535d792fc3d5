"""Tables of positions that count from the cache's length, as BART's and its like: read at the step's own positions.

``forward(input_ids, past_key_values_length=0, position_ids=None)`` (transformers 5.23) takes the positions itself where
it is given some. The length of a cache says nothing of a row's position where rows are padded or the buffer is
preallocated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pe_onnx.models.interface import current
from pe_onnx.models.substitution import Substitution

COUNTED = {"past_key_values_length", "position_ids"}


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """``forward`` of each table that can be given positions, of a model that takes none itself."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        return
    for module in model.modules():
        parameters = inspect.signature(type(module).forward).parameters
        if type(module).__name__.endswith("PositionalEmbedding") and parameters.keys() >= COUNTED:
            yield Substitution(module, "forward", _given(module))


def _given(module: Any) -> Callable[..., torch.Tensor]:
    original = module.forward

    def forward(tokens: Any, *others: Any, **named: Any) -> torch.Tensor:
        positions = current().step.query_positions
        rows = original(tokens, 0, position_ids=positions)
        return rows.reshape(*positions.shape, -1)  # some put an axis in front

    return forward
