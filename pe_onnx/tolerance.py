"""How far a bundle may be from PyTorch: a rule of the dtype and the depth."""

from __future__ import annotations

import math
from typing import NamedTuple


class Rule(NamedTuple):
    factor: float
    bits: int


RULES = {"fp32": Rule(148, 24), "fp16": Rule(10.8, 11)}


class Tolerance(NamedTuple):
    error: float
    rule: str = "given"

    @property
    def near_tie(self) -> float:
        return 2 * self.error


def unit_roundoff(dtype: str) -> float:
    """u of ``fp32`` or ``fp16``: the greatest relative error of one rounding."""
    return 2.0 ** -RULES[dtype].bits


def tolerance_for(dtype: str, layers: int) -> Tolerance:
    rule = RULES[dtype]
    error = rule.factor * unit_roundoff(dtype) * math.sqrt(layers)
    return Tolerance(error)
TOLERANCES = {"fp32": Tolerance(5e-5), "fp16": Tolerance(3e-2)}
PROOF = 2.0
