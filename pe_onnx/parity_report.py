"""A parity check's figures: what each mode compared, how far apart the two sides were, and the verdict."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pe_onnx.angles import AngleError
from pe_onnx.plain_values import plain
from pe_onnx.tolerance import Tolerance

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Disagreement:
    """The two sides choose different tokens that are no near-tie."""

    where: str
    """Row and position."""
    expected: int | None
    """The reference's most likely token; None where whole hypotheses differ."""
    chosen: int | None
    """The bundle's."""
    gap: float
    """By how much the reference prefers its own, of the spread."""

    @property
    def text(self) -> str:
        """In words."""
        tokens = "" if self.expected is None else f" token {self.chosen} for {self.expected},"
        return f"{self.where}:{tokens} {self.gap:.1e} of the spread apart"


@dataclass
class ModeResult:
    """One way of running the same tokens."""

    mode: str
    positions: int = 0
    """Positions compared."""
    max_abs_error: float = 0.0
    relative_error: float = 0.0
    """max_abs_error over the spread of the reference's logits."""
    kl: float = 0.0
    """Mean Kullback-Leibler divergence of the bundle from the reference, nats."""
    top1_agreement: float = 1.0
    """Share of positions with the same most likely token, near-ties counted as the same."""
    near_ties: int = 0
    """Another token was the most likely, and the reference prefers its own by at most twice the allowed error: each of
    the two may have moved by that much."""
    disagreements: int = 0
    """Another token was the most likely, and it is no near-tie."""
    first_disagreement: Disagreement | None = None
    first_difference: str | None = None
    """The first row and position over the tolerance."""
    passed: bool = True
    seconds: float = 0.0
    """Wall time."""


@dataclass
class ParityReport:
    """All modes, and the verdict."""

    bundle: str
    reference: str
    dtype: str
    tolerance: Tolerance
    spread: float
    modes: list[ModeResult] = field(default_factory=list)
    angles: list[AngleError] = field(default_factory=list)
    """Of the bundle's rotations; a figure, which no verdict hangs on."""

    @property
    def passed(self) -> bool:
        return all(mode.passed for mode in self.modes)

    @property
    def relative_error(self) -> float:
        """The worst of all modes."""
        return max(mode.relative_error for mode in self.modes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a figure that is not finite is None."""
        angles = [error._asdict() for error in self.angles]
        tolerance = {**self.tolerance._asdict(), "near_tie": self.tolerance.near_tie}
        return dict(plain({**asdict(self), "tolerance": tolerance, "angles": angles, "passed": self.passed}))


class Account:
    """Adds up one mode's figures position by position."""

    def __init__(self, mode: str, spread: float, allowed: Tolerance) -> None:
        self.result = ModeResult(mode)
        self.spread = spread
        self.allowed = allowed
        self.agreed = 0
        self.divergence = 0.0
        self.begun = time.perf_counter()

    def add(self, where: str, expected: Array, logits: Array) -> None:
        result = self.result
        want, have = expected.astype(np.float64), logits.astype(np.float64)
        error = float(np.abs(have - want).max()) if np.isfinite(have).all() else float("inf")
        best, chosen = int(want.argmax()), int(have.argmax())
        result.positions += 1
        result.max_abs_error = max(result.max_abs_error, error)
        self._choose(where, best == chosen, float(want[best] - want[chosen]), best, chosen)
        log_p, log_q = _log_softmax(want), _log_softmax(have)
        self.divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        if result.first_difference is None and error > self.allowed.error * self.spread:
            result.first_difference = where

    def add_choice(self, where: str, same: bool, difference: float) -> None:
        """Of choices of the two sides, and by how much the scores of what they chose differ."""
        self.result.positions += 1
        self._choose(where, same, difference)
        if self.result.disagreements and self.result.first_difference is None:
            self.result.first_difference = where

    def _choose(
        self, where: str, same: bool, gap: float, expected: int | None = None, chosen: int | None = None
    ) -> None:
        result, relative = self.result, gap / self.spread
        if same or relative <= self.allowed.near_tie:
            result.near_ties += not same
            self.agreed += 1
            return
        result.disagreements += 1
        if result.first_disagreement is None:
            result.first_disagreement = Disagreement(where, expected, chosen, relative)

    def add_values(self, where: str, expected: Array, values: Array) -> None:
        """Of numbers that are no logits: their error alone counts."""
        error = float(np.abs(values - expected).max()) if np.isfinite(values).all() else float("inf")
        self.result.positions += 1
        self.agreed += 1
        self.result.max_abs_error = max(self.result.max_abs_error, error)
        if self.result.first_difference is None and error > self.allowed.error * self.spread:
            self.result.first_difference = where

    def finish(self) -> ModeResult:
        result = self.result
        result.relative_error = result.max_abs_error / self.spread
        result.seconds = time.perf_counter() - self.begun
        result.kl = self.divergence / result.positions
        result.top1_agreement = self.agreed / result.positions
        result.passed = result.relative_error <= self.allowed.error and not result.disagreements
        return result


def _log_softmax(x: Array) -> Array:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())
