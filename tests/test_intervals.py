"""Intervals of the median: order statistics by hand, coverage on synthetic samples, ratios of neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pe_onnx.intervals import LEAST_SAMPLES, median_interval, percentile, ratio_interval


@pytest.mark.parametrize(
    ("n", "ranks"),
    [(6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (10, (2, 9)), (20, (6, 15)), (50, (18, 33)), (100, (40, 61))],
)
def test_ranks_of_the_published_tables(n: int, ranks: tuple[int, int]) -> None:
    """Conover, table A3, and any other of the sign test: ranks of the 95 % interval of the median."""
    estimate = median_interval(range(1, n + 1))
    assert estimate.interval == ranks
    assert estimate.coverage >= 0.95


def test_too_few_samples_say_so() -> None:
    estimate = median_interval([3.0, 1.0, 2.0])
    assert (estimate.median, estimate.low, estimate.high) == (2.0, 1.0, 3.0)
    assert estimate.coverage == pytest.approx(0.75)
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]).interval is None
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).interval == (1.0, 6.0)
    assert math.isinf(estimate.relative)
    assert median_interval([5.0]).coverage == pytest.approx(0.0)
    assert math.isinf(median_interval([1.0] * (LEAST_SAMPLES - 1)).relative)
    assert median_interval([1.0] * LEAST_SAMPLES).relative == 0


@pytest.mark.parametrize("n", [7, 31, 200])
def test_coverage_on_skewed_samples(n: int) -> None:
    """Times with a long tail: 95 % of the intervals hold the true median, and intervals of half the width do not."""
    rng = np.random.default_rng(0)
    samples = rng.lognormal(0, 1, (2000, n))  # median 1
    estimates = [median_interval(row.tolist()) for row in samples]
    held = np.mean([e.low <= 1 <= e.high for e in estimates])
    assert held >= 0.94
    halved = np.mean([e.median - (e.median - e.low) / 2 <= 1 <= e.median + (e.high - e.median) / 2 for e in estimates])
    assert halved < 0.9


def test_ratios_of_neighbours_survive_a_machine_that_drifts() -> None:
    """Half the turns take five times as long: neighbours' ratios do not see it, quotients of medians would."""
    rng = np.random.default_rng(0)
    slow = np.where(np.arange(100) < 50, 1.0, 5.0)
    below = slow * rng.normal(1, 0.01, 100)
    above = slow * rng.normal(1.1, 0.01, 100)
    ratio = ratio_interval(above.tolist(), below.tolist())
    assert ratio.median == pytest.approx(1.1, abs=0.01)
    assert ratio.relative < 0.01
    assert median_interval(above.tolist()).relative > 0.3


def test_percentiles_are_samples() -> None:
    samples = list(range(1, 101))
    assert [percentile(samples, p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([4.0], 99) == 4.0
    assert percentile([1.0, 2.0], 50) == 1.0


def test_another_unit() -> None:
    estimate = median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).scaled(1000)
    assert (estimate.median, estimate.interval) == (3500, (1000, 6000))


def test_thousands_of_samples() -> None:
    """Binomials of such sizes are beyond a float; the normal approximation says where the ends must be."""
    for n in (1029, 1031, 5000):
        estimate = median_interval(list(range(n)))
        assert abs(estimate.low - (n / 2 - 1.96 * n**0.5 / 2)) <= 2
        assert estimate.low + estimate.high == n - 1
        assert 0.95 <= estimate.coverage < 0.96
