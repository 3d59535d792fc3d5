"""Medians and ratios of times with distribution-free intervals.

Times are skewed and have several modes, so nothing is assumed of them: with n samples in order, the number of samples
below the true median is binomial(n, 1/2), and the interval from the (l+1)-th smallest to the (l+1)-th greatest sample
covers the median with probability 1 - 2 P(binomial <= l) (Conover, Practical Nonparametric Statistics, 3.2). This takes
samples to be independent; slow moments of a machine last longer than a step, so true coverage is somewhat less.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
LEAST_SAMPLES = 6
"""With fewer, even from the least sample to the greatest, the interval covers the median less often than 95 %."""


class Estimate(NamedTuple):
    """A median and the interval about it, in the samples' unit."""

    median: float
    low: float
    high: float
    samples: int
    coverage: float
    """Probability that such an interval holds the true median: at least CONFIDENCE from LEAST_SAMPLES on."""

    @property
    def relative(self) -> float:
        """Half the interval's width over the median; infinite with fewer than LEAST_SAMPLES samples."""
        if self.samples < LEAST_SAMPLES:
            return math.inf
        return (self.high - self.low) / 2 / self.median if self.median else math.inf

    @property
    def interval(self) -> tuple[float, float] | None:
        """From low to high where that is worth CONFIDENCE; None with fewer than LEAST_SAMPLES samples."""
        return None if self.samples < LEAST_SAMPLES else (self.low, self.high)

    def scaled(self, factor: float) -> Estimate:
        """In another unit."""
        return self._replace(median=factor * self.median, low=factor * self.low, high=factor * self.high)


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The median of at least one sample and the narrowest symmetric interval of order statistics about it.

    Of fewer samples than the confidence takes, the interval is from the least to the greatest, and ``coverage`` says
    what that is worth.
    """
    ordered = sorted(samples)
    n = len(ordered)
    # A sample is as likely below the true median as above it: of 2^n equally likely cases, the median lies beyond one
    # end in `tail`, those with at most `left_out` samples on that side; with just as many in `ways`.
    left_out = 0
    ways = 1
    tail = 1
    while True:
        ways = ways * (n - left_out) // (left_out + 1)  # whole numbers: a float ends at a thousand samples
        if 2 * (tail + ways) / 2**n > 1 - confidence or 2 * (left_out + 1) >= n:
            break
        left_out, tail = left_out + 1, tail + ways
    return Estimate(statistics.median(ordered), ordered[left_out], ordered[n - 1 - left_out], n, 1 - 2 * tail / 2**n)


def ratio_interval(above: Sequence[float], below: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Of the ratios of neighbours: ``above[i]`` and ``below[i]`` were measured in the same turn, so that a slow moment
    of the machine falls on both."""
    return median_interval([a / b for a, b in zip(above, below, strict=True)], confidence)


def percentile(samples: Sequence[float], p: float) -> float:
    """The least sample that at least p percent of the samples do not exceed (the nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(math.ceil(p / 100 * len(ordered)), 1) - 1]
