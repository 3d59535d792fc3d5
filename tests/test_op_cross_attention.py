"""CrossAttention: against loops, its gradient, its ONNX function, and what a later run does not do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_ir import serde
from op_exports import CACHE, ROWS, Get, cross, largest_outputs
from op_inputs import F16, F32, F64, cross_arguments
from op_oracles import Array, attended, heads_first
from torch import nn

import pe_onnx.custom_ops as ops
from pe_onnx.passes.transposed_weights import TransposedWeights

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(1, 1, 1), (2, 1, 7), (3, 5, 8), (1, 9, 1), (3, 1, 63)]
"""Batch, new tokens, source."""


def naive(args: tuple[torch.Tensor, ...], masked: bool = True) -> tuple[Array, Array, Array]:
    query, states, key_weight, value_weight, past_key, past_value, mask = args
    keys, values = past_key.double().numpy(), past_value.double().numpy()
    empty = keys[:, :, :0], values[:, :, :0]
    first = past_key.shape[2] == 0
    if first:
        keys, values = (heads_first(states.double() @ weight.double(), 3) for weight in (key_weight, value_weight))
    output = attended(query, keys, values, lambda b, i, j: bool(mask[b, j]) or not masked, 0.5)
    return (output, keys, values) if first else (output, *empty)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64, F16])
@pytest.mark.parametrize(("B", "T", "S"), SIZES)
def test_cross_attention_is_the_plain_formula(B: int, T: int, S: int, dtype: torch.dtype, first: bool) -> None:
    args = cross_arguments(B, T, S, first, dtype)
    for got, want in zip(cross(*args), naive(args), strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol={F32: 1e-5, F64: 1e-12, F16: 2e-2}[dtype])


@pytest.mark.parametrize("first", [True, False])
def test_gradient_of_cross_attention(first: bool) -> None:
    *tensors, mask = cross_arguments(2, 3, 5, first, F64)
    for x in tensors[:4] if first else (tensors[0], *tensors[4:]):
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: cross(*t, mask), tuple(tensors))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("B", "T", "S"), SIZES)
@pytest.mark.parametrize("engine", ["run", "evaluate"])
def test_cross_attention_in_onnx(engine: str, B: int, T: int, S: int, first: bool, exported: Get) -> None:
    args = cross_arguments(B, T, S, first)
    for got, want in zip(getattr(exported("cross"), engine)(*args), naive(args), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("B", "T", "S"), [(1, 1, 1), (3, 5, 8)])
def test_cross_attention_in_half_precision_in_onnxruntime(B: int, T: int, S: int, first: bool, exported: Get) -> None:
    args = cross_arguments(B, T, S, first, F16)
    for got, want in zip(exported("cross-float16").run(*args), naive(args), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-2)


def test_the_mask_and_which_weight_is_which_are_noticed(exported: Get) -> None:
    for first in (True, False):
        args = cross_arguments(3, 2, 11, first)
        assert np.abs(exported("cross").run(*args)[0] - naive(args, masked=False)[0]).max() > 0.1
        q, states, key_weight, value_weight, past_key, past_value, mask = args
        swapped = naive((q, states, value_weight, key_weight, past_value, past_key, mask))[0]
        assert np.abs(exported("cross").run(*args)[0] - swapped).max() > 0.1


@pytest.mark.parametrize("T", [1, 4])
def test_a_later_run_goes_on_from_the_presents_of_the_first(T: int, exported: Get) -> None:
    """With states and weights that would spoil the result if anything read them."""
    query, states, *weights, empty_key, empty_value, mask = cross_arguments(3, T, 11, True)
    model = exported("cross")
    first, key, value = model.run(query, states, *weights, empty_key, empty_value, mask)
    past = torch.from_numpy(key), torch.from_numpy(value)
    spoilt = [torch.full_like(weight, math.nan) for weight in weights]
    for given in (states[:, :0], torch.full_like(states, math.nan)):
        output, no_key, no_value = model.run(query, given, *spoilt, *past, mask)
        np.testing.assert_allclose(output, first, rtol=0, atol=1e-6)
        assert no_key.shape == no_value.shape == (3, 3, 0, 5)
        torch.testing.assert_close(cross(query, given, *spoilt, *past, mask)[0], torch.from_numpy(output))


def test_a_later_run_multiplies_and_copies_no_keys(exported: Get, tmp_path: Path) -> None:
    S = 300
    keys_bytes = 3 * S * 5 * 4
    path = exported("cross").path
    first = largest_outputs(path, cross_arguments(1, 1, S, True), tmp_path)
    assert first["MatMul"] == keys_bytes
    later = largest_outputs(path, cross_arguments(1, 1, S, False), tmp_path)
    assert "Attention" in later
    assert "MatMul" not in later
    assert max(later.values()) < keys_bytes / 4


class Layer(nn.Module):
    """As a caller has it: linear layers, whose weights are [out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(7, 15, bias=False), nn.Linear(7, 15, bias=False)

    def forward(self, query: torch.Tensor, states: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        past_key, past_value, mask = rest
        return ops.cross_attention(query, states, self.k.weight.T, self.v.weight.T, past_key, past_value, mask, 3, 0.5)


def test_weights_of_linear_layers_are_stored_as_they_are_multiplied() -> None:
    torch.manual_seed(0)
    layer = Layer().eval()
    query, states, _, _, past_key, past_value, mask = cross_arguments(2, 3, 11, True)
    program = torch.onnx.export(
        layer,
        (query, states, past_key, past_value, mask),
        dynamo=True,
        opset_version=23,
        custom_translation_table=ops.translation_table(),
        dynamic_shapes=(ROWS, ROWS, (CACHE, CACHE, ROWS)),
        optimize=False,
        verbose=False,
    )
    assert program is not None
    assert [node.op_type for node in program.model.graph].count("Transpose") == 2
    assert TransposedWeights()(program.model).modified
    assert [node.op_type for node in program.model.graph] == ["CrossAttention"]
    session = onnxruntime.InferenceSession(serde.serialize_model(program.model).SerializeToString())
    names = [i.name for i in session.get_inputs()]
    for first in (True, False):
        q, states, _, _, *rest = cross_arguments(2, 1, 11, first)
        got = session.run(None, {n: x.numpy() for n, x in zip(names, (q, states, *rest), strict=True)})
        for value, want in zip(got, layer(q, states, *rest), strict=True):
            np.testing.assert_allclose(value, want.detach(), rtol=0, atol=1e-5)
