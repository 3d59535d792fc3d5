"""The first value in which a bundle and PyTorch part: figures of two values, and the finding in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pe_onnx.plain_values import plain

Array = np.ndarray[Any, Any]

HUGE = 1e30
"""Beyond it a number stands for minus infinity in a mask, and says nothing of the size of the others."""
TINY = float(np.finfo(np.float32).tiny)


@dataclass
class Difference:
    """How far a value is from its counterpart."""

    max_abs: float
    """The greatest absolute difference; infinite where one is not finite and the other is or is another."""
    relative: float
    """The greatest difference, of the counterpart's standard deviation or, where that is greater, of its element.
    Infinite where integers or booleans differ at all."""


@dataclass
class InputStatistics:
    """A tensor that an operator was given."""

    name: str
    dtype: str
    shape: list[int]
    minimum: float
    maximum: float
    mean: float
    std: float
    difference: Difference | None
    """From what PyTorch hands in; None where nothing in PyTorch corresponds to it."""
    made_by: list[str] = field(default_factory=list)
    """Of a value without a counterpart of its own: the operators back to one that has one."""
    remark: str = ""


@dataclass
class Divergence:
    """The first operator, in the first run, whose output is not PyTorch's."""

    bundle: str
    mode: str
    row: int
    position: int
    """The token of the row at whose logits the mode first exceeds the tolerance."""
    step: int
    """Runs of the graph before the one in which the values part."""
    step_tokens: int
    step_position: int
    """The tokens of that run, and the position of the first of them."""
    layer: str
    """The module, as PyTorch names it: ``decoder.blocks.3.attention``; ``step`` for lengths, masks and positions."""
    operator: str
    """The first one that hands on another value than PyTorch's."""
    node: str
    reader: str
    """The operator behind ``value``: the same, or the one that it stands before."""
    value: str
    """The first value with a counterpart in PyTorch that differs."""
    difference: Difference
    before: Difference
    """The greatest of the values that it was computed from."""
    inputs: list[InputStatistics] = field(default_factory=list)
    remark: str = ""
    """What is wrong with one of the inputs or attributes, where something is."""
    refusal: str | None = None
    """What onnxruntime says, where it does not run the operator at all."""
    optimized: bool = False
    """Whether the values part only with onnxruntime's graph optimisations."""

    @property
    def text(self) -> str:
        """One line."""
        tokens = "1 token" if self.step_tokens == 1 else f"{self.step_tokens} tokens"
        run = f"{'step' if self.step_tokens == 1 else 'run'} {self.step} of mode {self.mode}"
        found = f"max abs {self.difference.max_abs:.2g}" if self.refusal is None else "refused by onnxruntime"
        parts = [
            f"{self.layer}, {run} ({tokens} from position {self.step_position}): {self.operator}, {found} "
            f"(up to here {self.before.max_abs:.0e})",
            self.remark,
            self.refusal or "",
            "only with onnxruntime's graph optimisations" if self.optimized else "",
        ]
        return "; ".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a figure that is not finite is None."""
        return plain({**asdict(self), "text": self.text})


def difference(want: Array, have: Array, considered: Array | None = None) -> Difference | None:
    """PyTorch's value and the bundle's; None where their shapes have nothing to do with each other.

    considered: bool, broadcast over the value: elements that count. Values that differ only in where heads stand,
    ``[B, H, T, D]`` against ``[B, T, H*D]``, are turned first.
    """
    if want.shape == have.shape:
        return _difference(want, have, considered)
    if want.ndim != 4 or not want.size:
        return None
    turned = want.transpose(0, 2, 1, 3)
    layouts = (turned, want.reshape(*want.shape[:2], -1), turned.reshape(*turned.shape[:2], -1))
    found = [_difference(layout, have, considered) for layout in layouts if layout.shape == have.shape]
    return min(found, key=lambda d: d.relative, default=None)


def _difference(want: Array, have: Array, considered: Array | None) -> Difference:
    exact = want.dtype.kind in "biu" and have.dtype.kind in "biu"
    x, y = want.astype(np.float64), have.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
    apart = np.where(np.isnan(apart), np.inf, apart)
    apart = np.where((x < -HUGE) & (y < -HUGE), 0.0, apart)  # masked, whatever the number
    if considered is not None and considered.ndim <= x.ndim:
        shaped = considered.reshape(considered.shape + (1,) * (x.ndim - considered.ndim))
        apart = np.where(shaped, apart, 0.0)
    greatest = float(apart.max(initial=0.0))
    if not greatest:
        return Difference(0.0, 0.0)
    if exact:
        return Difference(greatest, float("inf"))
    ordinary = np.abs(x) < HUGE
    size = np.where(ordinary, np.abs(x), 0.0)
    scale = np.maximum(size, max(float(x[ordinary].std()) if ordinary.any() else 0.0, TINY))
    return Difference(greatest, float((apart / scale).max()))


def statistics(name: str, value: Array) -> InputStatistics:
    """Of one tensor; of finite elements only."""
    numbers = value.astype(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    low, high, mean, std = (
        (float(numbers.min()), float(numbers.max()), float(numbers.mean()), float(numbers.std()))
        if numbers.size
        else (float("nan"),) * 4
    )
    return InputStatistics(name, str(value.dtype), list(value.shape), low, high, mean, std, None)
