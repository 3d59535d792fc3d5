"""T5RelativeBias: buckets and bias against transformers, its gradient, its ONNX function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_exports import QKV, ROWS, Exported, Get, save
from op_inputs import F16, F32, F64, cached_arguments, compact_inputs, positions, randn
from op_oracles import attended, cache_after, t5_naive
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

import pe_onnx.custom_ops as ops
from pe_onnx.custom_ops.t5_relative_bias import bucket_of_distance
from pe_onnx.errors import ConfigError
from pe_onnx.models.attention import CompactStep

pytestmark = pytest.mark.usefixtures("one_thread")

BUCKETS = [(2, 2), (2, 17), (3, 2), (3, 63), (8, 5), (8, 1000), (17, 9), (17, 63), (31, 128), (32, 17), (32, 63)]
BUCKETS += [
    (32, 128),
    (32, 1000),
    (64, 128),
    (64, 2048),
    (63, 1000),
    (128, 128),
    (320, 800),
    (4, 16),
    (6, 81),
    (12, 768),
]
# borders that fall on whole distances: max_distance / exact is a power whose roots are whole
BUCKETS += [(2 * exact, exact * 2**power) for exact in (1, 2, 3, 4, 6, 8, 16) for power in (1, 2, 3, 4, 6, 8)]


@pytest.mark.parametrize(("n", "m"), sorted(set(BUCKETS)))
def test_buckets_are_those_of_transformers(n: int, m: int) -> None:
    distance = torch.arange(3 * m + 17)
    got = bucket_of_distance(n, m)
    assert got.shape == (m + 1,)
    assert got.dtype == torch.int64
    want = T5Attention._relative_position_bucket(-distance, False, n, m)
    torch.testing.assert_close(got[distance.clamp(max=m)], want, rtol=0, atol=0)
    one_by_one = [int(T5Attention._relative_position_bucket(-distance[d : d + 1], False, n, m)) for d in range(m + 1)]
    assert got.tolist() == one_by_one  # a vectorised logarithm may round otherwise than a single one


@pytest.mark.parametrize(("n", "m"), sorted({(2 * n + odd, m) for n, m in BUCKETS for odd in (0, 1)}))
def test_bidirectional_buckets_are_those_of_transformers(n: int, m: int) -> None:
    got = bucket_of_distance(n, m, bidirectional=True)
    assert got.shape == (2 * m + 1,)
    relative = torch.arange(-3 * m, 3 * m + 1)  # key minus query
    want = T5Attention._relative_position_bucket(relative, True, n, m)
    torch.testing.assert_close(got[(-relative).clamp(-m, m) + m], want, rtol=0, atol=0)


def test_buckets_by_hand() -> None:
    assert bucket_of_distance(2, 2).tolist() == [0, 1, 1]
    assert bucket_of_distance(4, 4).tolist() == [0, 1, 2, 3, 3]
    assert bucket_of_distance(4, 2, bidirectional=True).tolist() == [3, 3, 0, 1, 1]
    assert bucket_of_distance(9, 4, bidirectional=True).tolist() == [7, 7, 6, 5, 0, 1, 2, 3, 3]
    assert bucket_of_distance(8, 16).tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]


@pytest.mark.parametrize(("n", "m"), [(1, 128), (0, 128), (-2, 128), (32, 16), (32, 1), (32, 0), (2, 1), (3, -5)])
def test_buckets_without_a_meaning_are_refused(n: int, m: int) -> None:
    with pytest.raises(ConfigError, match=f"num_buckets = {n} .*max_distance = {m} "):
        bucket_of_distance(n, m)


@pytest.mark.parametrize(("n", "m"), [(3, 128), (1, 128), (0, 9), (-4, 9), (32, 8), (32, 1), (33, 8), (4, 1), (7, -5)])
def test_bidirectional_buckets_without_a_meaning_are_refused(n: int, m: int) -> None:
    with pytest.raises(ConfigError, match=f"num_buckets = {n} must be at least 4 and max_distance = {m} .*bidirect"):
        bucket_of_distance(n, m, bidirectional=True)


@pytest.mark.parametrize("dtype", [F32, F16, F64])
@pytest.mark.parametrize(("n", "m"), [(32, 128), (9, 31), (8, 5)])
def test_t5_relative_bias_looks_the_bucket_up(n: int, m: int, dtype: torch.dtype) -> None:
    weight, queries, keys = randn(n, 3, dtype=dtype), positions(5, 200, count=17), positions(0, 3, count=63)
    got = ops.t5_relative_bias(weight, queries, keys, 63, m)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.double(), t5_naive(weight, queries, keys, m))
    compact = ops.t5_relative_bias(weight, queries, None, 63, m)
    np.testing.assert_array_equal(compact.double(), t5_naive(weight, queries, positions(0, count=63), m))


def t5_attention(is_decoder: bool, num_buckets: int, max_distance: int) -> tuple[T5Attention, torch.Tensor]:
    """transformers' attention of three heads and its table."""
    config = T5Config(
        d_model=24,
        d_kv=8,
        num_heads=3,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
    )
    config.is_decoder = is_decoder
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    return attention, attention.relative_attention_bias.weight.data.normal_(generator=torch.Generator().manual_seed(0))


def test_t5_relative_bias_is_that_of_transformers() -> None:
    attention, weight = t5_attention(True, 10, 40)
    with torch.no_grad():
        whole = attention.compute_bias(63, 63)
        step = attention.compute_bias(1, 63, past_seen_tokens=62)
    at = positions(0, count=63)
    torch.testing.assert_close(ops.t5_relative_bias(weight, at, None, 63, 40), whole, rtol=0, atol=0)
    torch.testing.assert_close(ops.t5_relative_bias(weight, at[:, 62:], None, 63, 40), step, rtol=0, atol=0)
    assert (ops.t5_relative_bias(weight, at + 1, None, 63, 40) - whole).abs().max() > 0.1


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("n", "m"), [(32, 128), (10, 40), (9, 5), (7, 4), (5, 3), (4, 3), (33, 17), (64, 2048)])
def test_both_directions_are_exactly_those_of_transformers(n: int, m: int, bidirectional: bool, tmp_path: Path) -> None:
    attention, weight = t5_attention(not bidirectional, n, m)
    with torch.no_grad():
        want = attention.compute_bias(63, 300)  # keys before, at and after every query
    at, keys = positions(0, count=63), positions(0, count=300)
    got = ops.t5_relative_bias(weight, at, None, 300, m, bidirectional)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    model = save(
        lambda w, q, k: ops.t5_relative_bias(w, q, None, k.shape[1], m, bidirectional),
        (weight, at, keys),
        ({}, ROWS, ROWS),
        tmp_path / "t5.onnx",
    )
    np.testing.assert_array_equal(model.run(weight, at, keys)[0], want)
    if bidirectional:  # the other direction is another bias
        assert (ops.t5_relative_bias(weight, at, None, 300, m) - want).abs().max() > 0.1


@pytest.mark.parametrize("engine", ["run", "evaluate"])
def test_bidirectional_t5_in_onnx(engine: str, exported: Get) -> None:
    model, weight = exported("t5-bidirectional"), randn(9, 3)
    for B, T, S in [(1, 1, 1), (1, 17, 63), (3, 17, 63), (2, 1, 1000), (1, 63, 7)]:
        queries, keys = positions(*range(30, 30 + 40 * B, 40), count=T), positions(*range(B), count=S)
        (got,) = getattr(model, engine)(weight, queries, keys)
        np.testing.assert_array_equal(got, t5_naive(weight, queries, keys, 20, True))


@pytest.mark.parametrize("engine", ["run", "evaluate"])
@pytest.mark.parametrize("name", ["t5", "t5-bidirectional"])
def test_columns_in_front_are_repeated_only_where_all_are_far(name: str, engine: str, exported: Get) -> None:
    """Padding between tokens, rows of other lengths, keys and queries in no order, one far column and none."""
    weight, model = randn(8 if name == "t5" else 9, 3), exported(name)
    generator = torch.Generator().manual_seed(0)
    cases = [
        (torch.randint(0, 90, (3, 7), generator=generator), torch.randint(0, 90, (3, 63), generator=generator)),
        (
            positions(70, 300, count=5),
            torch.cat((torch.zeros(2, 30, dtype=torch.int64), positions(0, 200, count=63)), 1),
        ),
        *((positions(first, count=3), positions(0, count=63)) for first in (19, 20, 21, 22, 60, 82, 83, 500)),
        (positions(500, count=1), positions(0, count=1)),
        (positions(90, count=2), torch.cat((positions(80, count=5), positions(0, count=30)), 1)),
    ]
    for queries, keys in cases:
        (got,) = getattr(model, engine)(weight, queries, keys)
        np.testing.assert_array_equal(got, t5_naive(weight, queries, keys, 20, name != "t5"))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("keys", [positions(0, 2, count=17), None])
def test_gradient_of_t5_relative_bias(keys: torch.Tensor | None, bidirectional: bool) -> None:
    weight = randn(6, 3, dtype=F64).requires_grad_()
    queries = positions(3, 30, count=5)
    assert torch.autograd.gradcheck(lambda w: ops.t5_relative_bias(w, queries, keys, 17, 20, bidirectional), (weight,))


@pytest.mark.parametrize("engine", ["run", "evaluate"])
def test_t5_relative_bias_in_onnx(engine: str, exported: Get) -> None:
    model = exported("t5")
    for B, T, S in [(1, 1, 1), (3, 17, 63), (2, 1, 1000)]:
        queries, keys = positions(*range(5, 5 + 40 * B, 40), count=T), positions(*range(B), count=S)
        (got,) = getattr(model, engine)(randn(8, 3), queries, keys)
        np.testing.assert_allclose(got, t5_naive(randn(8, 3), queries, keys, 20), rtol=1e-6)


COMPACT = {  # keys, new tokens, position of each row's first
    "one-row-one-key": (1, 1, [0]),
    "one-row-step": (8, 1, [7]),
    "one-row-step-at-the-border": (21, 1, [20]),
    "one-row-step-beyond-max-distance": (63, 1, [62]),
    "one-row-step-far-beyond": (1000, 1, [999]),
    "rows-step": (63, 1, [62, 0, 19, 20, 21]),
    "rows-step-at-one-position": (17, 1, [16, 16]),
    "rows-step-one-key": (1, 1, [0, 0]),
    "prompt": (17, 17, [0]),
    "prompt-beyond-max-distance": (63, 63, [0]),
    "prompt-rows": (63, 63, [0, 0, 0]),
    "prompt-of-two": (2, 2, [0, 0]),
    "chunk": (24, 7, [17]),
    "chunk-beyond-max-distance": (100, 17, [83]),
    "chunk-rows": (63, 5, [58, 58]),
    "chunk-with-empty-slots": (63, 5, [4]),  # shorter than the cache, as compact rows may be
    "rows-step-with-empty-slots": (63, 1, [40, 4]),
}


@pytest.mark.parametrize("engine", ["run", "evaluate"])
@pytest.mark.parametrize("case", COMPACT)
def test_t5_relative_bias_on_consecutive_keys_in_onnx(case: str, engine: str, exported: Get) -> None:
    S, T, starts = COMPACT[case]
    args = compact_inputs(S, *starts, count=T)
    want = t5_naive(args[0], args[1], positions(0, count=S), 20)
    (got,) = getattr(exported("t5-compact"), engine)(*args)
    assert got.shape[1:] == want.shape[1:]
    assert len(got) in (1, len(want))
    np.testing.assert_allclose(np.broadcast_to(got, want.shape), want, rtol=1e-6)


WITH_BIAS = {  # new tokens, length of past, tokens of each row with the new ones
    "prompt": (17, 0, [17]),
    "prompt-padded": (17, 0, [9, 17, 1]),
    "step": (1, 16, [17]),
    "step-of-rows": (1, 16, [17, 3]),
    "step-of-one-row-with-empty-slots": (1, 16, [5]),
    "step-of-one-row-far-with-empty-slots": (1, 62, [40]),
    "step-of-rows-with-empty-slots": (1, 16, [5, 3]),
    "chunk": (7, 40, [47]),
    "chunk-with-empty-slots": (7, 40, [23]),
}


@pytest.fixture(scope="module")
def biased_attention(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """T5's bias on compact rows, as the decoder of the ``ort`` target has them together."""

    def call(weight: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> Any:
        past_key, past_value, mask = rest
        step = CompactStep(mask, q.shape[1], [(past_key, past_value)])
        bias = ops.t5_relative_bias(weight, step.query_positions, step.key_positions, step.key_length, 20)
        return step.attend(0, q, k, v, num_heads=4, kv_heads=2, scale=0.5, bias=bias)

    args = (randn(8, 4), *cached_arguments(3, 4, [7, 5])[:5], torch.ones(2, 7, dtype=torch.int64))
    return save(call, args, ({}, *QKV, ROWS), tmp_path_factory.mktemp("together") / "model.onnx")


@pytest.mark.parametrize("case", WITH_BIAS)
def test_t5_relative_bias_on_compact_rows_in_onnxruntime(case: str, biased_attention: Exported) -> None:
    """Only the sum of a mask's row is read: a row may be shorter than the cache, in a batch of one too."""
    T, P, lengths = WITH_BIAS[case]
    weight, (query, key, value, past_key, past_value, last) = randn(8, 4), cached_arguments(T, P, lengths)[:6]
    mask = (torch.arange(P + T) < torch.tensor(lengths)[:, None]).long()
    (got,) = biased_attention.run(weight, query, key, value, past_key, past_value, mask)
    (keys, starts), (values, _) = cache_after(past_key, key, last), cache_after(past_value, value, last)
    bias = torch.from_numpy(t5_naive(weight, positions(*starts, count=T), positions(0, count=P + T), 20))
    want = attended(query, keys, values, lambda b, i, j: j <= starts[b] + i, 0.5, bias=bias)
    for b, length in enumerate(lengths):
        tokens = length - starts[b]
        np.testing.assert_allclose(got[b, :tokens], want[b, :tokens], atol=1e-5)


def test_t5_relative_bias_for_a_fixed_length_in_onnx(tmp_path: Path) -> None:
    weight, queries = randn(8, 3), positions(0, count=17)
    model = save(lambda w, q: ops.t5_relative_bias(w, q, None, 17, 20), (weight, queries), None, tmp_path / "m.onnx")
    (got,) = model.run(weight, queries)
    np.testing.assert_allclose(got, t5_naive(weight, queries, queries, 20), rtol=1e-6)


def test_two_forms_of_t5_in_one_model(tmp_path: Path) -> None:
    weight, at = randn(8, 3), positions(5, 5, count=4)
    keys = positions(0, 1, count=9)
    model = save(
        lambda w, q, k: (ops.t5_relative_bias(w, q, k, 9, 20), ops.t5_relative_bias(w, q, None, 9, 20)),
        (weight, at, keys),
        None,
        tmp_path / "t5.onnx",
    )
    general, compact = model.run(weight, at, keys)
    np.testing.assert_allclose(general, t5_naive(weight, at, keys, 20), rtol=1e-6)
    np.testing.assert_allclose(compact, t5_naive(weight, at, positions(0, count=9), 20), rtol=1e-6)
