"""Differences of two values: relative to their own size, in either layout of heads, whatever masks hold."""

from __future__ import annotations

import numpy as np
import pytest

from pe_onnx.divergence import difference

RNG = np.random.default_rng(0)


def test_equal_values_and_infinities() -> None:
    x = np.array([1.0, -np.inf, np.nan], np.float32)
    found = difference(x, x.copy())
    assert found is not None
    assert (found.max_abs, found.relative) == (0, 0)


def test_a_number_where_there_is_none() -> None:
    for other in (np.nan, np.inf, -np.inf):
        found = difference(np.array([1.0, 2.0]), np.array([1.0, other]))
        assert found is not None
        assert np.isinf(found.max_abs)
        assert np.isinf(found.relative)


def test_large_elements_are_taken_by_their_own_size() -> None:
    x = RNG.standard_normal(1000)
    x[0] = 5000
    y = x.copy()
    y[0] += 5e-3
    found = difference(x, y)
    assert found is not None
    assert found.relative == pytest.approx(1e-6)
    y[1] += 1e-2
    assert difference(x, y).relative == pytest.approx(1e-2 / x.std(), rel=0.01)  # type: ignore[union-attr]


def test_a_mask_hides_no_difference() -> None:
    """The lowest number of a dtype says nothing of the size of the others, and is minus infinity to all ends."""
    x = np.append(RNG.standard_normal(100), np.finfo(np.float32).min).astype(np.float32)
    y = x.copy()
    y[3] += 0.5
    y[-1] = -np.inf
    found = difference(x, y)
    assert found is not None
    assert found.max_abs == pytest.approx(0.5)
    assert found.relative > 0.1


def test_integers_differ_or_do_not() -> None:
    found = difference(np.array([3, 4]), np.array([3, 5], np.int32))
    assert found is not None
    assert (found.max_abs, found.relative) == (1, np.inf)


def test_heads_in_either_place() -> None:
    x = RNG.standard_normal((2, 3, 5, 4))  # [B, H, T, D]
    for turned in (x.transpose(0, 2, 1, 3), x.transpose(0, 2, 1, 3).reshape(2, 5, 12)):
        found = difference(x, turned)
        assert found is not None
        assert found.max_abs == 0
    assert difference(x, x.reshape(2, 60)) is None
    square = RNG.standard_normal((2, 3, 3, 4))  # heads and tokens exchanged is a difference
    assert difference(square, square.transpose(0, 2, 1, 3)).relative > 0.1  # type: ignore[union-attr]


def test_only_what_is_considered() -> None:
    x = RNG.standard_normal((2, 3, 4))
    y = x.copy()
    y[1, 2] += 1
    valid = np.array([[True, True, True], [True, True, False]])
    assert difference(x, y, valid).max_abs == 0  # type: ignore[union-attr]
    assert difference(x, y).max_abs > 0  # type: ignore[union-attr]
