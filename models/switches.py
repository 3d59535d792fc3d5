"""Rotary frequencies that depend on the length: dynamic NTK and longrope, as a choice in the graph.

transformers 5.23 (``modeling_rope_utils.dynamic_rope_update``) decides in Python, from the greatest position of the
step and over the whole batch::

    seq_len = max(position_ids) + 1
    longrope   long factors if seq_len > original_max_position_embeddings, else the short ones
    dynamic    theta (s seq_len / L - (s - 1))^(R/(R-2)) if seq_len > L = max_position_embeddings, else theta

Keys that were cached before a switch keep their angles: a cached decode departs from one pass over the same tokens.
We follow transformers step for step. Its modules also remember the longest sequence they have seen; a graph does not,
and computes what a module computes that has seen nothing else.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pe_onnx.errors import CheckpointError
from pe_onnx.models.substitution import Substitution

TOLERANCE = 1e-6
"""Absolute, of cosines and sines."""


class _Seen:
    """A rotary module with some attributes of its own for the length of one call."""

    def __init__(self, module: nn.Module, **own: Any) -> None:
        self.__dict__.update(own)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _dynamic(module: Any, prefix: str, rope: Mapping[str, Any], layer_type: str | None, length: torch.Tensor) -> Any:
    """``[R/2]``, with the operations of ``_compute_dynamic_ntk_parameters``."""
    short = getattr(module, f"{prefix}original_inv_freq")
    long, _ = ROPE_INIT_FUNCTIONS["dynamic"](module.config, short.device, seq_len=length, layer_type=layer_type)
    return torch.where(length > module.config.max_position_embeddings, long, short)


def _longrope(module: Any, prefix: str, rope: Mapping[str, Any], layer_type: str | None, length: torch.Tensor) -> Any:
    short = getattr(module, f"{prefix}original_inv_freq")
    trained = int(rope["original_max_position_embeddings"])
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, short.device, seq_len=trained + 1, layer_type=layer_type)
    return torch.where(length > trained, long, short)


@dataclass(frozen=True)
class Switch:
    """A way in which frequencies depend on the length."""

    frequencies: Callable[..., torch.Tensor]
    """At a length."""
    threshold: Callable[[Any, Mapping[str, Any]], int]
    """Of a configuration and its rope parameters: tokens beyond which they are others."""


SWITCHES = {
    "dynamic": Switch(_dynamic, lambda config, rope: int(config.max_position_embeddings)),
    "longrope": Switch(_longrope, lambda config, rope: int(rope["original_max_position_embeddings"])),
}
"""By rope_type."""


def rope_types(module: nn.Module) -> dict[str | None, str]:
    """Layer type (None where all layers share one) to the rope type of a rotary module; empty for other modules."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return {None: kind}
    return dict(kind) if isinstance(kind, dict) else {}


def thresholds(model: nn.Module) -> list[int]:
    """The lengths, in tokens, beyond which frequencies switch."""
    found = set()
    module: Any
    for module in model.modules():
        rotary: Any = module
        for layer_type, kind in rope_types(module).items():
            if kind in SWITCHES:
                found.add(SWITCHES[kind].threshold(rotary.config, _parameters(module, layer_type)))
    return sorted(found)


def substitutions(model: nn.Module) -> Iterator[Substitution]:
    """Replaces ``forward`` of each rotary module that switches. Raises CheckpointError where one is not understood."""
    for module in model.modules():
        if SWITCHES.keys() & rope_types(module).values():
            undecorated = inspect.unwrap(type(module).forward)  # beneath no_grad and dynamic_rope_update
            if undecorated is type(module).forward:
                raise CheckpointError(f"{type(module).__name__} switches its frequencies in a way not understood")
            forward = _forward(module, undecorated)
            _prove(module, forward)
            yield Substitution(module, "forward", forward)


def _parameters(module: Any, layer_type: str | None) -> Mapping[str, Any]:
    rope = module.config.rope_parameters
    return rope if layer_type is None else rope[layer_type]


def _forward(module: nn.Module, undecorated: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        prefix = "" if layer_type is None else f"{layer_type}_"
        switch = SWITCHES.get(rope_types(module)[layer_type])
        named = {} if layer_type is None else {"layer_type": layer_type}
        if switch is None:
            return undecorated(module, x, position_ids, **named)
        length = position_ids.max() + 1
        frequencies = switch.frequencies(module, prefix, _parameters(module, layer_type), layer_type, length)
        return undecorated(_Seen(module, **{f"{prefix}inv_freq": frequencies}), x, position_ids, **named)

    return forward


@torch.no_grad()
def _prove(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Both sides of every switch, against a copy of the module that has seen nothing else."""
    x = torch.zeros(1, 1, 1)
    for layer_type in rope_types(module):
        for length in sorted({1, 2, *(n + d for n in thresholds(module) for d in (-1, 0, 1, 5, 3 * n))}):
            positions = torch.tensor([[max(length - 3, 0), length - 1]])
            named = {} if layer_type is None else {"layer_type": layer_type}
            fresh = copy.deepcopy(module)
            fresh(x, torch.zeros_like(positions), **named)  # a short text makes it forget a long one
            want, have = fresh(x, positions, **named), forward(x, positions, **named)
            if not all(torch.allclose(a, b, rtol=0, atol=TOLERANCE) for a, b in zip(want, have, strict=True)):
                raise CheckpointError(f"{type(module).__name__}: its frequencies at {length} tokens are not understood")
