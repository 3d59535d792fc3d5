"""MaskedAttention: against loops and transformers, its gradient, its ONNX function."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from op_exports import Get
from op_inputs import F32, F64, masked_arguments
from op_oracles import attended, heads_first
from torch import nn
from transformers.models.gemma2 import modeling_gemma2

import pe_onnx.custom_ops as ops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize(("B", "T", "P"), [(1, 1, 0), (3, 17, 0), (2, 7, 10), (2, 1, 63)])
def test_masked_attention_is_the_plain_formula(
    B: int, T: int, P: int, kind: str, softcap: float, dtype: torch.dtype
) -> None:
    args = masked_arguments(B, T, P, kind, dtype)
    query, key, value, past_key, past_value, mask, _, K, scale = args
    output, present_key, present_value = ops.masked_attention(*args, softcap)
    keys = np.concatenate([past_key.double().numpy(), heads_first(key, K)], 2)
    values = np.concatenate([past_value.double().numpy(), heads_first(value, K)], 2)
    np.testing.assert_array_equal(present_key, keys)
    np.testing.assert_array_equal(present_value, values)

    def seen(b: int, i: int, j: int) -> bool:
        return bool(mask[b, 0, i, j] if kind == "bool" else mask[b, 0, i, j] > -math.inf)

    want = attended(query, keys, values, seen, scale, softcap, None if kind == "bool" else mask)
    # float64 exact to its own rounding: it is the reference that others are measured against
    np.testing.assert_allclose(output, want, atol=1e-5 if dtype == F32 else 1e-12)
    if T * P:
        uncapped = attended(query, keys, values, seen, scale, 0.0 if softcap else 1.5, None)
        assert np.abs(uncapped - want).max() > 1e-2


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_masked_attention_is_that_of_transformers(softcap: float) -> None:
    query, key, value, past_key, past_value, mask, H, K, scale = masked_arguments(2, 17, 6, "added")
    output, present_key, present_value = ops.masked_attention(
        query, key, value, past_key, past_value, mask, H, K, scale, softcap
    )
    module = nn.Module()
    module.num_key_value_groups = H // K
    module.eval()
    q = query.unflatten(-1, (H, -1)).transpose(1, 2)
    want, _ = modeling_gemma2.eager_attention_forward(
        module, q, present_key, present_value, mask, scaling=scale, softcap=softcap or None
    )
    torch.testing.assert_close(output, want.flatten(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_gradient_of_masked_attention(kind: str) -> None:
    args = masked_arguments(1, 2, 1, kind, F64)
    tensors = tuple(x.requires_grad_() for x in args[:5])
    assert torch.autograd.gradcheck(lambda *a: ops.masked_attention(*a, *args[5:], 2.0), tensors)


def test_gradient_of_one_output_of_masked_attention() -> None:
    args = masked_arguments(2, 3, 2, "bool", F32)
    tensors = [x.clone().requires_grad_() for x in args[:5]]
    ops.masked_attention(*tensors, *args[5:])[0].sum().backward()
    again = [x.clone().requires_grad_() for x in args[:5]]
    q, keys, values = (
        again[0],
        *(
            torch.cat((past, new.unflatten(-1, (2, -1)).transpose(1, 2)), 2)
            for past, new in zip(again[3:], again[1:3], strict=True)
        ),
    )
    nn.functional.scaled_dot_product_attention(
        q.unflatten(-1, (4, -1)).transpose(1, 2), keys, values, args[5], scale=args[8], enable_gqa=True
    ).sum().backward()
    for got, want in zip(tensors, again, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["run", "evaluate"])
@pytest.mark.parametrize("name", ["masked-bool", "masked-added"])
def test_masked_attention_in_onnx(name: str, engine: str, exported: Get) -> None:
    model = exported(name)
    for B, T, P in [(1, 1, 0), (1, 1, 17), (3, 17, 0), (2, 7, 10), (2, 1, 63)]:
        args = masked_arguments(B, T, P, name.removeprefix("masked-"))[:6]
        for got, want in zip(getattr(model, engine)(*args), model.call(*args), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
