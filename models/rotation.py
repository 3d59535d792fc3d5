"""Rotation in a transformers model by our operator, where that is proven equal to the model's own function.

transformers writes ``apply_rotary_pos_emb`` anew in each modeling file: half-split, interleaved, with either sign, with
cosines repeated in one layout or the other or not at all, heads before tokens or after, one tensor a call or two. The
calls of one forward pass are recorded, and each reading is run against the file's own function on random input of the
same shapes. The one that agrees on all of them stands in for it during the export; where none does, the file's own
function is exported as it is.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from pe_onnx.custom_ops import rotary_embedding
from pe_onnx.models.substitution import Substitution, installed

PREFIXES = ("apply_rotary_pos_emb", "apply_rotary_emb")
ROTATED = ("q", "k", "x", "tensor", "hidden_states", "q_states", "k_states")
"""Names under which a modeling file's function takes what it rotates."""

Layout = Callable[[torch.Tensor], torch.Tensor]
LAYOUTS: dict[str, Layout] = {
    "repeated halves": lambda table: table[..., : table.shape[-1] // 2],
    "repeated pairs": lambda table: table[..., ::2],
    "not repeated": lambda table: table,
}
"""How ``[B, T, R/2]`` is got from a modeling file's cosines and sines."""

TOLERANCE = 1e-6
"""Absolute, on random input of order 1 in float32."""


class Reading(NamedTuple):
    """One way to understand a modeling file's rotation."""

    interleaved: bool
    layout: str
    sign: int

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_axis: int) -> torch.Tensor:
        layout = LAYOUTS[self.layout]
        cos, sin = layout(cos), layout(sin) * self.sign if self.sign < 0 else layout(sin)  # [B, T, R/2]
        if heads_axis == 1:
            return rotary_embedding(x, cos, sin, 0, self.interleaved)
        H, D = x.shape[2:]
        return rotary_embedding(x.flatten(2), cos, sin, H, self.interleaved).unflatten(2, (H, D))


READINGS = [
    Reading(interleaved, layout, sign)
    for sign, interleaved, layout in itertools.product((1, -1), (False, True), LAYOUTS)
]


@dataclass
class Call:
    """The arguments of one call by name: what is rotated, the tables, the rest, and the tensors of the rest."""

    rotated: dict[str, torch.Tensor]
    cos: torch.Tensor
    sin: torch.Tensor
    rest: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def heads_axis(self) -> int:
        return 2 if self.rest.get("unsqueeze_dim", 2 if "tensor" in self.rotated else 1) == 2 else 1


@dataclass
class Rotary:
    """A rotary function of a modeling file, and the calls recorded of it."""

    home: ModuleType
    name: str
    original: Callable[..., Any]
    calls: list[Call] = field(default_factory=list)

    def bind(self, *args: Any, **kwargs: Any) -> Call | None:
        """A call's arguments; None where it is not of the usual form."""
        bound = inspect.signature(self.original).bind(*args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        cos, sin = values.pop("cos", None), values.pop("sin", None)
        rotated = {name: values.pop(name) for name in ROTATED if isinstance(values.get(name), torch.Tensor)}
        if cos is None or sin is None or not rotated or cos.dim() != 3:
            return None
        tensors = {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}
        return Call(rotated, cos, sin, {name: x for name, x in values.items() if name not in tensors}, tensors)


def find(model: nn.Module) -> list[Rotary]:
    """The rotary functions of the files that the model's modules come from."""
    homes = {name: sys.modules[name] for name in sorted({type(m).__module__ for m in model.modules()})}
    return [
        Rotary(home, name, function)
        for module, home in homes.items()
        if module.startswith("transformers.models.")
        for name, function in vars(home).items()
        if name.startswith(PREFIXES) and inspect.isfunction(function)
    ]


@contextmanager
def recorded(rotaries: list[Rotary]) -> Iterator[None]:
    """Record the calls of the block."""

    def spy(rotary: Rotary) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = rotary.bind(*args, **kwargs)
            if bound is not None:
                rotary.calls.append(bound)
            return rotary.original(*args, **kwargs)

        return call

    with installed([Substitution(r.home, r.name, spy(r)) for r in rotaries]):
        yield


@torch.no_grad()
def prove(rotary: Rotary) -> Substitution | None:
    """The replacement of a function that was recorded, or None where no reading computes what it does."""
    # one table for all rows, which our operator does not take, is what a model makes of no positions at all
    recorded = [c for c in rotary.calls if all(x.shape[0] == c.cos.shape[0] for x in c.rotated.values())]
    kinds = {(tuple((n, x.shape) for n, x in c.rotated.items()), c.cos.shape, str(c.rest)): c for c in recorded}
    calls = list(kinds.values())
    reading = next((r for r in READINGS if calls and all(_agrees(rotary, r, call) for call in calls)), None)
    if reading is None:
        return None
    proven = {str(call.rest) for call in calls}

    def rotate(*args: Any, **kwargs: Any) -> Any:
        call = rotary.bind(*args, **kwargs)
        if call is None or str(call.rest) not in proven:
            return rotary.original(*args, **kwargs)
        return _rotate(reading, call)

    return Substitution(rotary.home, rotary.name, rotate)


def _rotate(reading: Reading, call: Call) -> Any:
    rotated = [reading.rotate(x, call.cos, call.sin, call.heads_axis) for x in call.rotated.values()]
    return tuple(rotated) if len(rotated) > 1 else rotated[0]


def _agrees(rotary: Rotary, reading: Reading, call: Call) -> bool:
    generator = torch.Generator().manual_seed(0)
    random = {name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in call.rotated.items()}
    trial = Call(random, call.cos, call.sin, call.rest)
    try:
        want = rotary.original(**random, cos=call.cos, sin=call.sin, **call.rest, **call.tensors)
        have = _rotate(reading, trial)
    except Exception:  # another layout of the tables: not this reading
        return False
    pairs = [(want, have)] if isinstance(want, torch.Tensor) else list(zip(want, have, strict=True))
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=TOLERANCE) for a, b in pairs)
