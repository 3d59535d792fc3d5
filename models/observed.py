"""What one eager pass of a transformers model shows of it: the shapes of its caches and its tables of positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from pe_onnx.errors import CheckpointError

FIRST, TOKENS, ROWS = 3, 7, 2
"""Positions begin at 3, so that they are not the slots; sizes that differ from each other."""


@dataclass
class Observed:
    """Of an eager pass."""

    shapes: list[tuple[int, int, int]]
    """Of each layer that has a cache: heads, channels of keys, channels of values."""
    table: str | None = None
    """``learned`` or ``fixed`` where a table is read by position."""
    max_length: int | None = None
    """Positions of the shortest table."""
    first: int = 0
    """The position that the model itself gives the first token."""


def _indexed(index: Any) -> tuple[int, Any]:
    """The axis, from the front or the back, that ``table[index]`` reads by a tensor, and that tensor."""
    parts = index if isinstance(index, tuple) else (index,)
    at = next((i for i, part in enumerate(parts) if isinstance(part, torch.Tensor)), 0)
    axis = at - len(parts) if any(part is ... for part in parts[:at]) else at
    return axis, parts[at] if parts else None


class _Tables(TorchFunctionMode):
    """Watches for tables that are indexed by positions."""

    def __init__(self, positions: torch.Tensor) -> None:
        super().__init__()
        self.positions = positions
        self.found: list[tuple[torch.Tensor, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        look = self.LOOKUPS.get(func)
        if look is not None:
            self._watch(*look(*args, **kwargs))
        return func(*args, **kwargs)

    LOOKUPS: ClassVar[dict[Any, Callable[..., tuple[Any, int, Any]]]] = {
        F.embedding: lambda input, weight, *_, **__: (weight, 0, input),
        torch.Tensor.__getitem__: lambda table, index: (table, *_indexed(index)),
        **dict.fromkeys(
            (torch.gather, torch.Tensor.gather, torch.index_select, torch.Tensor.index_select),
            lambda input, dim, index, **_: (input, dim, index),
        ),
    }
    """Functions that look rows up, to the table, its axis and the index."""

    def _watch(self, table: Any, axis: int, index: Any) -> None:
        index = index[0] if isinstance(index, tuple) and index else index
        if not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
            return
        if index.dim() == 3:
            index = index[..., 0]
        wanted = self.positions.reshape(-1)
        offset = index.reshape(-1)[: wanted.numel()] - wanted[: index.numel()]
        if index.numel() >= TOKENS and bool((offset == offset[0]).all()):
            self.found.append((table, int(offset[0]), table.shape[axis]))


@torch.no_grad()
def observe(model: PreTrainedModel, takes_positions: bool) -> Observed:
    """Run the model as it is on a few tokens. Raises CheckpointError where it cannot be run, or holds another state
    than keys and values."""
    refuse_other_states(model)
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    ids = torch.randint(0, config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(7))
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:  # some count the tokens that are none
        ids = torch.where(ids == padding, (padding + 1) % config.vocab_size, ids)

    def run(start: int | None) -> tuple[torch.Tensor, DynamicCache, list[tuple[torch.Tensor, int, int]]]:
        """Logits, cache and tables; start: the first position, None for what the model itself takes."""
        cache = DynamicCache()
        positions = ((start or 0) + torch.arange(TOKENS)).expand(ROWS, -1)
        named = {} if start is None else {"position_ids": positions}
        watched = _Tables(positions)
        with watched:
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, **named
            ).logits
        return logits, cache, watched.found

    try:
        _, cache, tables = run(FIRST if takes_positions else None)
        own, _, its_tables = run(None)
        offsets = [offset for _, offset, _ in its_tables]
        offset = tables[0][1] if tables else 0
        first = next((o - offset for o in offsets if o != offset), 0) if takes_positions else 0
        given = run(first)[0] if takes_positions else own
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(f"{name} cannot be run with a cache of keys and values: {reason}") from error
    if not torch.allclose(given, own, rtol=0, atol=1e-5 * float(own.std())):
        raise CheckpointError(f"{name}: the positions that it gives its tokens are not understood")
    shapes = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or keys.shape[2] != TOKENS:
            raise CheckpointError(f"{name} does not cache one key and one value for each token")
        shapes.append((keys.shape[1], keys.shape[3], values.shape[3]))
    if not shapes:
        raise CheckpointError(f"{name} keeps no keys and values in its cache")
    parameters = {p.data_ptr() for p in model.parameters()}
    observed = Observed(shapes, first=first)
    for table, offset, rows in tables:
        learned = table.data_ptr() in parameters
        observed.table = "learned" if learned or observed.table == "learned" else "fixed"
        observed.max_length = min(rows - offset - first, observed.max_length or rows)
    return observed


KEPT = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
    "global_attention",
    "local_attention",
}
"""Layer types that keep keys and values, and nothing else."""


def refuse_other_states(model: PreTrainedModel) -> None:
    """Raises CheckpointError for a model that says of itself that it keeps another state than keys and values."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    other = sorted({str(t) for t in types} - KEPT)
    if other:
        raise CheckpointError(f"{name} has layers of type {other[0]!r}, which keep another state than keys and values")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise CheckpointError(f"{name} takes no past_key_values: it keeps no keys and values of earlier tokens")
