"""AlibiBias: against loops and Bloom, and its ONNX function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_exports import Get
from op_inputs import F16, F32, F64, positions, randn
from op_oracles import alibi_naive
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomModel

import pe_onnx.custom_ops as ops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [F32, F16, F64])
@pytest.mark.parametrize("shared", [False, True])
def test_alibi_bias_is_linear_in_the_distance(dtype: torch.dtype, shared: bool) -> None:
    slopes = (2.0 ** -torch.arange(1, 6)).to(dtype)
    queries, keys = positions(4095, 9, count=17), positions(0, 2, count=63)[: 1 if shared else 2]
    got = ops.alibi_bias(slopes, queries, keys)
    want = alibi_naive(slopes, queries, keys)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double(), want, rtol=6e-4 if dtype == F16 else 0)


@pytest.mark.parametrize("H", [1, 3, 8, 12, 17])
def test_alibi_bias_is_that_of_bloom_up_to_a_constant_per_row(H: int) -> None:
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[1, :5] = 0
    bloom = BloomModel(BloomConfig(vocab_size=8, hidden_size=2 * H, n_head=H, n_layer=1))
    want = bloom.build_alibi_tensor(mask, H, F32).view(2, H, 1, 17)
    slopes = want[0, :, 0, 1]  # position 1 against position 0
    at = (mask.cumsum(1) - 1) * mask
    got = ops.alibi_bias(slopes, at, at)
    difference = (got - want).double()
    np.testing.assert_allclose(difference, difference[..., :1].expand_as(difference), atol=2e-6)
    wrong = (ops.alibi_bias(slopes, at, 2 * at) - want).double()
    assert (wrong - wrong[..., :1]).abs().max() > 0.01


@pytest.mark.parametrize("engine", ["run", "evaluate"])
def test_alibi_bias_in_onnx(engine: str, exported: Get) -> None:
    for B, T, S in [(1, 1, 1), (3, 17, 1000), (2, 1, 63)]:
        at = positions(*range(5, 5 + B), count=T), positions(*range(B), count=S)
        model = exported("alibi")
        args = (randn(5), *at)
        (got,) = getattr(model, engine)(*args)
        np.testing.assert_allclose(got, model.call(*args), rtol=1e-6)
        model = exported("alibi-float16")  # distances beyond 2048 are exact up to the product
        args = (randn(5, dtype=F16), at[0] + 4097, at[1][:1])
        (got,) = getattr(model, engine)(*args)
        assert got.dtype == np.float16
        np.testing.assert_array_equal(got, model.call(*args).numpy())
