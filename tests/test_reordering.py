"""Rows of a cache that change places: the order of the copies, and logits against caches filled afresh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import pe_onnx
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.kv_cache import InPlaceCache, KVCache
from pe_onnx.reordering import SPARE, common_prefix, moves

Bundles = Callable[..., Path]
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 256, 700).tolist()


def carried_out(parents: Sequence[int], order: Sequence[tuple[int, int]]) -> list[int]:
    """The rows after the copies, each named by the row it was."""
    rows, spare = list(range(len(parents))), -9
    for to, source in order:
        value = spare if source == SPARE else rows[source]
        if to == SPARE:
            spare = value
        else:
            rows[to] = value
    return rows


def test_every_order_of_up_to_five_rows() -> None:
    wrong = 0
    for n in range(1, 6):
        for parents in product(range(n), repeat=n):
            order = moves(parents)
            assert carried_out(parents, [(to, source) for to, source, _ in order]) == list(parents)
            changed = sum(b != parent for b, parent in enumerate(parents))
            cycles = sum(to == SPARE for to, _, _ in order)
            assert len(order) == changed + cycles, "no row is copied twice"
            assert cycles == 0 or len(set(parents)) > 1
            wrong += carried_out(parents, list(enumerate(parents))) != list(parents)
    assert wrong > 500, "the rows' own order is no order to copy in"


def test_common_prefix() -> None:
    for n in (0, 1, 63, 64, 65, 300):
        row = TOKENS[:n]
        assert common_prefix(row, row) == common_prefix(row, [*row, 7]) == common_prefix([*row, 7], row) == n
        assert common_prefix([*row, 1, 5], [*row, 2, 5]) == n


def agrees(model: pe_onnx.generate.Model, cache: KVCache) -> bool:
    """Whether a step gives what it gives on a fresh cache filled with each row's tokens."""
    fresh = model.cache(cache.batch_size)
    fresh.prefill(cache.tokens)
    assert fresh.lengths.tolist() == cache.lengths.tolist() == [len(row) for row in cache.tokens]
    step = RNG.integers(0, 256, cache.batch_size)
    return np.allclose(cache.decode(step), fresh.decode(step), atol=2e-4)


@pytest.mark.parametrize("target", ["ort", "portable"])
@pytest.mark.parametrize("encoding", ["rope", "t5_bias"])
def test_random_orders_of_ragged_rows(bundles: Bundles, encoding: str, target: str) -> None:
    model = pe_onnx.load(bundles(encoding, target))
    cache = model.cache(5)
    cache.prefill([TOKENS[:n] for n in (1, 9, 40, 17, 40)])  # row b + 1 begins like row b, as beams do
    expected = [list(row) for row in cache.tokens]
    addresses = [buffer.address for buffer in cache.buffers] if isinstance(cache, InPlaceCache) else None
    for round_ in range(12):
        parents = RNG.permutation(5) if round_ % 3 == 0 else RNG.integers(0, 5, 5)
        cache.reorder(parents)
        expected = [list(expected[parent]) for parent in parents]
        assert cache.tokens == expected
        assert agrees(model, cache)
        step, active = RNG.integers(0, 256, 5), RNG.random(5) < 0.8
        cache.decode(step, active)
        expected = [list(row) for row in cache.tokens]
    if isinstance(cache, InPlaceCache):
        assert addresses == [buffer.address for buffer in cache.buffers]


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_expanded_rows_are_copies_that_go_their_own_way(bundles: Bundles, target: str) -> None:
    model = pe_onnx.load(bundles("alibi", target))
    cache = model.cache(2)
    cache.prefill([TOKENS[:250], TOKENS[300:307]])
    cache.expand(3)
    assert cache.batch_size == 6
    assert cache.lengths.tolist() == [250] * 3 + [7] * 3
    for step in range(10):  # past the first capacity, 256
        if step % 4 == 3:
            cache.reorder([2, 0, 0, 4, 3, 3])
        assert agrees(model, cache)
    assert len(set(map(tuple, cache.tokens))) == 6
    empty = model.cache(1)
    empty.expand(2)
    np.testing.assert_allclose(*empty.prefill([[5, 6], [5, 6]]), atol=1e-5)


def test_rows_that_were_not_moved_give_other_logits(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of which only the last token moved."""
    model = pe_onnx.load(bundles("rope"))
    for forgets in (lambda a, b: 10**6, lambda a, b: common_prefix(a, b) + 1):
        cache = model.cache(2)
        cache.prefill([TOKENS[:20], TOKENS[100:120]])
        with monkeypatch.context() as patch:
            patch.setattr("pe_onnx.kv_cache.common_prefix", forgets)
            cache.reorder([1, 0])
        assert not agrees(model, cache)


def test_only_what_differs_moves(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("rope"))
    slot = model.bundle.cache_bytes_per_token
    cache = model.cache(1)
    cache.prefill([TOKENS[:50]])
    cache.expand(3)
    cache.decode([1, 1, 2])
    cache.decode([3, 4, 5])
    assert cache.reorder([0, 1, 2]) == 0
    assert cache.reorder([1, 1, 2]) == slot
    assert cache.tokens[0][50:] == [1, 4]
    assert cache.reorder([2, 2, 2]) == 2 * 2 * slot
    cache.decode([6, 7, 8])
    assert cache.reorder([1, 0, 1]) == (1 + 3) * slot, "a cycle and a copy: four of a slot"
    assert [row[-1] for row in cache.tokens] == [7, 6, 7]


def test_where_keys_depend_on_the_runs_whole_rows_move(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("rope_dynamic", encoding_parameters={"factor": 4.0}))
    assert model.bundle.path_dependent
    cache = model.cache(2)
    cache.prefill([[1, 2, 3, 4], [1, 2, 3, 5]])
    assert cache.reorder([0, 0]) == 4 * model.bundle.cache_bytes_per_token


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_what_a_reordering_refuses(bundles: Bundles, target: str) -> None:
    cache = pe_onnx.load(bundles("rope", target)).cache(2)
    cache.prefill([[1], [2, 3]])
    for parents in ([0], [0, 2], [-1, 0], [[0, 1]]):
        with pytest.raises(InputError, match=r"must be 2 rows in 0\.\.1"):
            cache.reorder(parents)
    cache.path = []
    for change in (lambda: cache.reorder([1, 0]), lambda: cache.expand(2)):
        with pytest.raises(ConfigError, match="path"):
            change()
    assert cache.tokens == [[1], [2, 3]]
