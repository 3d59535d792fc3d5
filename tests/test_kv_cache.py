"""The caches: in place, growing, ragged, bounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pe_onnx
from pe_onnx import cached_rows
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.kv_cache import FIRST_CAPACITY, GrowingCache, InPlaceCache

Bundles = Callable[..., Path]
TOKENS = np.random.default_rng(0).integers(0, 256, 700).tolist()


def test_a_step_writes_one_slot_in_place(bundles: Bundles) -> None:
    cache = pe_onnx.load(bundles("rope")).cache()
    assert isinstance(cache, InPlaceCache)
    cache.prefill([TOKENS[:10]])
    addresses = [buffer.address for buffer in cache.buffers]
    for buffer in cache.buffers:
        buffer.host[:, :, 10:] = 77.0
    before = [buffer.host.copy() for buffer in cache.buffers]
    cache.decode([5])
    assert addresses == [buffer.address for buffer in cache.buffers]
    for old, buffer in zip(before, cache.buffers, strict=True):
        np.testing.assert_array_equal(buffer.host[:, :, :10], old[:, :, :10])
        np.testing.assert_array_equal(buffer.host[:, :, 11:], old[:, :, 11:])
        assert (buffer.host[:, :, 10] != 77.0).all()


def test_growth_changes_nothing_but_the_capacity(bundles: Bundles) -> None:
    """Token by token across two doublings, against one prompt."""
    model = pe_onnx.load(bundles("rope"))
    cache = model.cache()
    assert cache.capacity == FIRST_CAPACITY
    capacities = set()
    for token in TOKENS[:600]:
        logits = cache.decode([token])[0]
        capacities.add(cache.capacity)
    assert capacities == {256, 512, 1024}
    whole = model.cache().prefill([TOKENS[:600]])[0]
    np.testing.assert_allclose(logits, whole, atol=1e-4)


def test_growth_stops_at_the_limit(bundles: Bundles) -> None:
    cache = pe_onnx.load(bundles("rope")).cache(1, max_length=300)
    cache.prefill([TOKENS[:300]])
    assert cache.capacity == 300
    with pytest.raises(InputError, match="301 tokens are more than max_length = 300"):
        cache.decode([1])
    assert cache.lengths.tolist() == [300]


@pytest.mark.parametrize("target", ["ort", "portable"])
@pytest.mark.parametrize("encoding", ["rope", "t5_bias"])
def test_ragged_rows_equal_rows_alone(bundles: Bundles, encoding: str, target: str) -> None:
    model = pe_onnx.load(bundles(encoding, target))
    lengths = (1, 63, 300, 17)
    rows = [TOKENS[7 * b : 7 * b + n] for b, n in enumerate(lengths)]
    batch = model.cache(4, chunk_tokens=50)
    together = [batch.prefill(rows)] + [batch.decode([b, b + 1, b + 2, b + 3]).copy() for b in range(6)]
    assert batch.lengths.tolist() == [n + 6 for n in lengths]
    for b, row in enumerate(rows):
        alone = model.cache()
        steps = [alone.prefill([row])[0].copy()] + [alone.decode([i + b])[0].copy() for i in range(6)]
        for i, logits in enumerate(steps):
            np.testing.assert_allclose(together[i][b], logits, atol=2e-4)


@pytest.mark.parametrize(
    ("encoding", "options", "sizes"),
    [
        ("t5_bias", {}, [256, 128, 102, 88, 26]),
        ("alibi", {}, [256, 128, 102, 88, 26]),
        ("rope", {}, [256, 256, 88]),
        ("t5_bias", {"chunk_tokens": 200}, [200, 200, 200]),
        ("rope_dynamic", {}, [600]),
    ],
)
def test_a_long_past_makes_chunks_with_a_bias_small(
    bundles: Bundles, encoding: str, options: dict[str, int], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor [H, T, S] outgrows its bytes, and the logits are those of the prompt whole."""
    model = pe_onnx.load(bundles(encoding))
    heads = model.bundle.score_heads
    assert (heads > 0) == (encoding in ("t5_bias", "alibi"))
    monkeypatch.setattr(cached_rows, "SCORE_BYTES", 4 * 256 * 256 * max(heads, 1))
    cache = model.cache(**options)
    cache.path = []
    logits = cache.prefill([TOKENS[:600]])[0]
    assert [len(run[0]) for run in cache.path] == sizes
    assert cache.lengths.tolist() == [600]
    whole = model.cache(chunk_tokens=600).prefill([TOKENS[:600]])[0]
    np.testing.assert_allclose(logits, whole, atol=2e-4)


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_a_resting_row_resumes_where_it_was(bundles: Bundles, target: str) -> None:
    model = pe_onnx.load(bundles("alibi", target))
    cache = model.cache(2)
    cache.prefill([TOKENS[:9], TOKENS[20:25]])
    for _ in range(3):
        cache.decode([1, 2], np.array([True, False]))
    assert cache.lengths.tolist() == [12, 5]
    logits = cache.decode([1, TOKENS[25]])
    alone = model.cache().prefill([TOKENS[20:26]])[0]
    np.testing.assert_allclose(logits[1], alone, atol=2e-4)


def test_bytes_are_counted(bundles: Bundles) -> None:
    cache = pe_onnx.load(bundles("rope")).cache(2)
    assert cache.nbytes == 2 * FIRST_CAPACITY * cache.session.bundle.cache_bytes_per_token
    growing = pe_onnx.load(bundles("rope", "portable")).cache(2)
    assert isinstance(growing, GrowingCache)
    growing.prefill([[1, 2, 3], [4]])
    assert growing.nbytes == 2 * 3 * growing.session.bundle.cache_bytes_per_token


def test_all_logits_only_where_exported(bundles: Bundles) -> None:
    rows = [TOKENS[:5], TOKENS[:3]]
    logits = pe_onnx.load(bundles("rope", "portable")).cache(2).prefill(rows, all_logits=True)
    assert [x.shape for x in logits] == [(5, 256), (3, 256)]
    with pytest.raises(ConfigError, match="--logits all"):
        pe_onnx.load(bundles("rope")).cache(2).prefill(rows, all_logits=True)


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_what_a_cache_refuses(bundles: Bundles, target: str) -> None:
    model = pe_onnx.load(bundles("rope", target))
    cache = model.cache()
    for rows, message in (
        ([[]], "no tokens"),
        ([[1, 256]], "token id 256 must be in 0..255"),
        ([[-1]], "token id -1"),
        ([[1], [2]], "2 prompts for a cache of 1 rows"),
        ([[1] * 3000], "3000 tokens are more than max_length = 2048"),
    ):
        with pytest.raises(InputError, match=message):
            cache.prefill(rows)
    with pytest.raises(InputError, match="token id 300"):
        cache.decode([300])
    assert cache.lengths.tolist() == [0]
    for options in ({"batch_size": 0}, {"max_length": 0}, {"chunk_tokens": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            model.cache(**options)


def test_a_learned_table_is_a_hard_limit(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("learned", config={"max_position_embeddings": 40}))
    with pytest.raises(ConfigError, match="more than the 40 positions of the encoding"):
        model.cache(1, max_length=41)
    with pytest.raises(InputError, match="41 tokens are more than the 40 positions"):
        model.cache().prefill([TOKENS[:41]])
    cache = model.cache()
    cache.prefill([TOKENS[:40]])
    with pytest.raises(InputError, match="positions"):
        cache.decode([1])


def test_a_row_that_ends_with_the_table_rests_there(bundles: Bundles) -> None:
    """No slot and no position beyond the table's end, while another row goes on."""
    model = pe_onnx.load(bundles("learned", config={"max_position_embeddings": 40}))
    cache, alone = model.cache(2), model.cache(1)
    assert isinstance(cache, InPlaceCache)
    cache.prefill([TOKENS[:40], TOKENS[50:60]])
    alone.prefill([TOKENS[50:60]])
    before = [buffer.host[0].copy() for buffer in cache.buffers]
    for token in TOKENS[60:65]:
        logits = cache.decode([7, token], np.array([False, True]))[1].copy()
        np.testing.assert_allclose(logits, alone.decode([token])[0], atol=1e-4)
    assert cache.lengths.tolist() == [40, 15]
    assert cache.capacity == 40
    for old, buffer in zip(before, cache.buffers, strict=True):
        np.testing.assert_allclose(buffer.host[0], old, atol=1e-5)
