"""Choose the next token of each row from its logits: greedy, or temperature with top-k, top-p and min-p.

Source: the logits processors of transformers 5.23, ``generation/logits_process.py``, in the order in which
``generate`` applies them. For one row ``x`` of logits and the set ``h`` of token ids in its history:

    1. repetition penalty r   x_i <- x_i / r where x_i >= 0, else x_i * r, for i in h (prompt included)
    2. temperature t          x <- x / t; t = 0 is greedy: the largest x_i, the lowest id among equals
    3. top-k                  keep x_i >= the k-th largest, so equals of the k-th stay as well
    4. top-p                  in ascending order of p = softmax(x), drop i while p_0 + ... + p_i <= 1 - top_p
    5. min-p                  keep p_i >= min_p * max(p)

Step 4 always keeps the most likely token, and drops the lower id first among equals. Everything after step 1
is computed in float64, and the order of the candidates is fixed by their logits and ids: what a seed draws does
not depend on how a processor partitions or sorts equals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pe_onnx.errors import BundleError, ConfigError, InputError


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; the defaults are greedy. ConfigError names an option out of its range.

    ``top_k = 0``, ``top_p = 1``, ``min_p = 0`` and ``repetition_penalty = 1`` switch the step off. With
    ``seed = None`` each `Sampler` takes a new seed from the system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= _number(self.temperature) < math.inf, "0 (greedy) or above")
        _check("top_k", self.top_k, _integer(self.top_k) >= 0, "an integer, 0 (off) or above")
        _check("top_p", self.top_p, 0 <= _number(self.top_p) <= 1, "0 to 1 (off)")
        _check("min_p", self.min_p, 0 <= _number(self.min_p) <= 1, "0 (off) to 1")
        penalty = _number(self.repetition_penalty)
        _check("repetition_penalty", self.repetition_penalty, 0 < penalty < math.inf, "above 0; 1 is off")
        _check(
            "seed",
            self.seed,
            self.seed is None or _integer(self.seed) >= 0,
            "an integer, 0 or above, or None",
        )


class Sampler:
    """Draws one token for each of ``batch_size`` rows at each step.

    Each row owns a random generator, seeded with the option ``seed`` and the row's index, and takes one
    number from it at each step: what row b draws depends neither on the other rows nor on the batch size.
    """

    def __init__(self, options: SamplingOptions, batch_size: int) -> None:
        if _integer(batch_size) < 1:
            raise ConfigError(f"batch_size = {batch_size!r}: accepted is an integer, 1 or above")
        self.options = options
        self.batch_size = batch_size
        entropy = np.random.SeedSequence(options.seed).entropy
        seeds = [np.random.SeedSequence(entropy, spawn_key=(row,)) for row in range(batch_size)]
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def sample(self, logits: ArrayLike, histories: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """The next token of each row, int64 ``[B]``.

        ``logits`` is float32 ``[B, V]`` and stays as it is. ``histories[b]`` holds the token ids of row b so
        far, prompt included; only the repetition penalty reads them, and skips ids outside the vocabulary.

        Raises InputError when there are not ``batch_size`` rows, and BundleError when the largest logit of a
        row is not a finite number (NaN, infinity, or every token masked).
        """
        rows = np.asarray(logits, dtype=np.float32)
        if rows.ndim != 2 or len(rows) != self.batch_size or rows.shape[1] == 0:
            raise InputError(f"logits of shape {list(rows.shape)}: accepted is [{self.batch_size}, V] with V above 0")
        if len(histories) != self.batch_size:
            raise InputError(f"{len(histories)} histories: accepted is one for each of {self.batch_size} rows")
        if self.options.temperature == 0 and self.options.repetition_penalty == 1:
            tokens = rows.argmax(axis=1)
            for row, token in enumerate(tokens):
                check_peak(rows[row, token], row)
            return tokens.astype(np.int64)
        return np.array([self.draw(row, rows[row], histories[row]) for row in range(len(rows))], dtype=np.int64)

    def draw(self, row: int, logits_row: NDArray[np.float32], history: Sequence[int]) -> int:
        ids, weights = _candidates(logits_row, history, self.options, row)
        if self.options.temperature == 0:
            return int(ids[0])
        cumulative = np.cumsum(weights)
        point = self._generators[row].random() * cumulative[-1]
        return int(ids[np.searchsorted(cumulative, point, side="right")])


def probabilities(logits_row: ArrayLike, history: Sequence[int], options: SamplingOptions) -> NDArray[np.float64]:
    """The distribution, float64 ``[V]``, that a row of logits, float32 ``[V]``, is drawn from."""
    row = np.asarray(logits_row, dtype=np.float32)
    ids, weights = _candidates(row, history, options, 0)
    full = np.zeros(len(row), dtype=np.float64)
    full[ids] = weights / weights.sum()
    return full


def _candidates(
    logits_row: NDArray[np.float32], history: Sequence[int], options: SamplingOptions, row: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids of the tokens left after all steps, and their probabilities up to a factor."""
    if options.repetition_penalty != 1:
        logits_row = penalized(logits_row, history, options.repetition_penalty)
    best = logits_row.argmax()  # a NaN counts as the largest
    peak = check_peak(logits_row[best], row)
    if options.temperature == 0:
        return np.array([best], dtype=np.int64), np.ones(1)
    V = len(logits_row)
    if 0 < options.top_k < V:
        kth_largest = np.partition(logits_row, V - options.top_k)[V - options.top_k]
        ids = np.flatnonzero(logits_row >= kth_largest)
    else:
        ids = np.arange(V)
    with np.errstate(over="ignore"):  # a temperature near 0 sends all but the largest to -inf, weight 0
        scores = (logits_row[ids].astype(np.float64) - peak) / options.temperature
    weights = np.exp(scores)
    if options.top_p < 1:
        kept = _nucleus(weights / weights.sum(), options.top_p)
        ids, weights = ids[kept], weights[kept]
    if options.min_p > 0:
        kept = np.flatnonzero(weights >= options.min_p * weights.max())
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def penalized(logits_row: NDArray[np.float32], history: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """A copy of the row with step 1 applied: tokens of the history become less likely if penalty > 1."""
    ids = np.asarray(history, dtype=np.int64)
    ids = ids[(ids >= 0) & (ids < len(logits_row))]
    seen = logits_row[ids]
    penalized = logits_row.copy()
    with np.errstate(over="ignore"):  # an overflow to infinity is reported by check_peak
        penalized[ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return penalized


def _nucleus(p: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indices of the tokens that top-p keeps of the probabilities ``p``, the most likely last.

    All tokens below ``(1 - top_p) / len(p)`` together weigh less than ``1 - top_p``: they are dropped
    unsorted, and only the few others are sorted.
    """
    cut = 1 - top_p
    floor = min(cut / len(p), p.max())
    above = np.flatnonzero(p >= floor)
    order = above[np.argsort(p[above], kind="stable")]
    dropped_mass = p[p < floor].sum() + np.cumsum(p[order])
    dropped_mass[-1] = math.inf  # the most likely token always stays
    return order[dropped_mass > cut]


def check_peak(peak: np.float32, row: int) -> float:
    """The largest logit of a row, as a float; BundleError if it is no finite number."""
    if not np.isfinite(peak):
        raise BundleError(
            f"the largest logit of row {row} is {peak}: accepted is a finite number; the model overflowed or "
            "its weights are broken, try a float32 bundle"
        )
    return float(peak)


def _check(name: str, value: object, valid: bool, accepted: str) -> None:
    if not valid:
        raise ConfigError(f"{name} = {value!r}: accepted is {accepted}")


def _number(value: object) -> float:
    """The value as a float, NaN (which is in no range) for anything but a real number."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def _integer(value: object) -> int:
    """The value as an int, -1 (which is in no range) for anything but an integer."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else -1
