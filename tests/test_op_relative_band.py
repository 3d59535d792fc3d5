"""RelativeBand: buckets and bias against transformers, its gradient, its ONNX function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_exports import Get
from op_inputs import F16, F32, F64, randn
from op_oracles import encoder_bias_naive
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

import pe_onnx.custom_ops as ops
from pe_onnx.custom_ops.relative_band import buckets_by_offset
from pe_onnx.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

BUCKETS = [(4, 2), (5, 17), (8, 5), (12, 20), (17, 63), (32, 9), (32, 128), (32, 1000), (63, 128), (320, 800)]
# borders that fall on whole distances: max_distance / exact is a power whose roots are whole
BUCKETS += [(4 * exact, exact * 2**power) for exact in (1, 2, 3, 8) for power in (1, 2, 4, 6)]


@pytest.mark.parametrize(("n", "m"), sorted(set(BUCKETS)))
def test_buckets_are_those_of_transformers(n: int, m: int) -> None:
    offset = torch.arange(-2 * m - 5, 2 * m + 6)
    got = buckets_by_offset(n, m)
    assert got.shape == (2 * m + 1,)
    assert got.dtype == torch.int64
    want = T5Attention._relative_position_bucket(offset, True, n, m)
    torch.testing.assert_close(got[offset.clamp(-m, m) + m], want, rtol=0, atol=0)
    assert (got[(offset + 1).clamp(-m, m) + m] != want).any()
    assert (got.flip(0)[offset.clamp(-m, m) + m] != want).any()


def test_buckets_by_hand() -> None:
    assert buckets_by_offset(4, 2).tolist() == [1, 1, 0, 3, 3]
    assert buckets_by_offset(8, 4).tolist() == [3, 3, 2, 1, 0, 5, 6, 7, 7]


@pytest.mark.parametrize(("n", "m"), [(3, 128), (0, 128), (-2, 128), (32, 8), (32, 0), (4, 1), (5, -5)])
def test_buckets_without_a_meaning_are_refused(n: int, m: int) -> None:
    with pytest.raises(ConfigError, match=f"num_buckets = {n} .*max_distance = {m} "):
        buckets_by_offset(n, m)


@pytest.mark.parametrize("dtype", [F32, F16, F64])
def test_the_band_holds_the_bias_of_any_queries(dtype: torch.dtype) -> None:
    m, R, S = 20, 8, 70
    weight = randn(12, 3, dtype=dtype)
    got = ops.relative_band(weight, m, R)
    assert got.shape == (1, 3, R, R + 2 * m)
    assert got.dtype == dtype
    whole = encoder_bias_naive(weight, S, m)
    start = 25
    np.testing.assert_array_equal(got.double(), whole[:, :, start : start + R, start - m : start + R + m])


def test_the_band_is_that_of_transformers() -> None:
    config = T5Config(d_model=24, d_kv=8, num_heads=3, relative_attention_num_buckets=10)
    config.relative_attention_max_distance = 31
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    weight = attention.relative_attention_bias.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    attention.relative_attention_max_distance = 31
    with torch.no_grad():
        whole = attention.compute_bias(80, 80)
    band = ops.relative_band(weight, 31, 7)
    torch.testing.assert_close(band, whole[:, :, 40:47, 9:78], rtol=0, atol=0)


def test_gradient_of_relative_band() -> None:
    weight = randn(6, 3, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ops.relative_band(w, 5, 3), (weight,))


@pytest.mark.parametrize("engine", ["run", "evaluate"])
def test_relative_band_in_onnx(engine: str, exported: Get) -> None:
    model = exported("band")
    weight = randn(12, 3, seed=7)
    (got,) = getattr(model, engine)(weight)
    np.testing.assert_array_equal(got, model.call(weight))
    np.testing.assert_array_equal(got, encoder_bias_naive(weight, 70, 20)[:, :, 30:38, 10:58].astype(np.float32))
