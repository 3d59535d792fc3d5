"""RotaryEmbedding: against loops and transformers, its gradient, its ONNX function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from op_exports import MODULES, Get, rotary, save
from op_inputs import F16, F32, F64, angles, randn, rotary_inputs
from op_oracles import heads_first, rotated
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

import pe_onnx.custom_ops as ops
from pe_onnx.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "T", "D", "R"), [(1, 1, 1, 2, 2), (2, 3, 17, 10, 6), (1, 5, 63, 16, 16), (3, 2, 1, 9, 8)]
)
def test_rotary_embedding_rotates_pairs(B: int, H: int, T: int, D: int, R: int, interleaved: bool) -> None:
    x, (cos, sin) = randn(B, H, T, D), angles(B, T, R // 2, start=1000)
    want = rotated(x, cos, sin, interleaved)
    np.testing.assert_allclose(ops.rotary_embedding(x, cos, sin, 0, interleaved), want, atol=1e-6)
    packed = ops.rotary_embedding(x.transpose(1, 2).flatten(2), cos, sin, H, interleaved)
    np.testing.assert_allclose(heads_first(packed, H), want, atol=1e-6)
    exact = ops.rotary_embedding(x.double(), cos.double(), sin.double(), 0, interleaved)
    np.testing.assert_allclose(exact, want, atol=1e-14)
    if R > 2:  # the other pairing is another rotation
        assert np.abs(want - rotated(x, cos, sin, not interleaved)).max() > 0.5


@pytest.mark.parametrize("interleaved", [False, True])
def test_half_precision_is_rounded_once(interleaved: bool) -> None:
    x, (cos, sin) = randn(2, 3, 17, 10, dtype=F16), angles(2, 17, 4, start=1000)
    got = ops.rotary_embedding(x, cos, sin, 0, interleaved)
    want = rotated(x, cos, sin, interleaved)
    assert got.dtype == F16
    ulp = np.spacing(np.abs(want).astype(np.float16)).astype(np.float64)
    assert (np.abs(got.double().numpy() - want) <= 0.51 * ulp + 1e-6).all()
    coarse = ops.rotary_embedding(x, cos.half(), sin.half(), 0, interleaved)
    assert not (np.abs(coarse.double().numpy() - want) <= 0.51 * ulp + 1e-6).all()


def test_rotary_embedding_is_that_of_llama_and_cohere() -> None:
    q, k, (cos, sin) = randn(2, 3, 17, 10), randn(2, 1, 17, 10), angles(2, 17, 5)
    llama = modeling_llama.apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    cohere = modeling_cohere.apply_rotary_pos_emb(q, k, cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1))
    for x, half_split, interleaved in zip((q, k), llama, cohere, strict=True):
        torch.testing.assert_close(ops.rotary_embedding(x, cos, sin), half_split, rtol=0, atol=1e-6)
        torch.testing.assert_close(ops.rotary_embedding(x, cos, sin, 0, True), interleaved, rtol=0, atol=1e-6)


def test_a_rotary_size_beyond_the_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rotary size = 12 .* head size = 10"):
        ops.rotary_embedding(randn(1, 3, 5, 10), *angles(1, 5, 6))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_of_rotary_embedding(interleaved: bool) -> None:
    x = randn(2, 3, 4, 7, dtype=F64).requires_grad_()
    cos, sin = (table.double().requires_grad_() for table in angles(2, 4, 3))
    assert torch.autograd.gradcheck(lambda *a: ops.rotary_embedding(*a, 0, interleaved), (x, cos, sin))


ROTARY_MODULES = [name for name in MODULES if name.startswith("rotary")]


@pytest.mark.parametrize("engine", ["run", "evaluate"])
@pytest.mark.parametrize("name", ROTARY_MODULES)
def test_rotary_embedding_in_onnx(name: str, engine: str, exported: Get) -> None:
    model = exported(name)
    dtype = F16 if name.endswith("float16") else F32
    for B, T in [(1, 1), (3, 17), (1, 63), (2, 1)]:
        args = rotary_inputs(B, T, "packed" in name or dtype == F16, dtype)
        (got,) = getattr(model, engine)(*args)
        want = model.call(*args)
        assert got.dtype == want.numpy().dtype
        np.testing.assert_allclose(got, want, rtol=1e-3 if dtype == F16 else 0, atol=1e-5)


def test_float16_is_rotated_by_float32_angles_in_onnx(exported: Get) -> None:
    model, args = exported("rotary-float16"), rotary_inputs(2, 63, True, F16)
    (got,) = model.run(*args)
    x = args[0].unflatten(-1, (3, -1)).transpose(1, 2)
    want = rotated(x, *args[1:], False).transpose(0, 2, 1, 3).reshape(2, 63, 72)
    ulp = np.spacing(np.abs(want).astype(np.float16)).astype(np.float64)
    assert (np.abs(got.astype(np.float64) - want) <= 0.51 * ulp + 1e-6).all()


def test_two_forms_of_an_operator_in_one_model(tmp_path: Path) -> None:
    """Half and single precision rotated, keys given and not: each form keeps its own body."""
    x, cos, sin = rotary_inputs(2, 5, True)
    model = save(
        lambda x, y, cos, sin: (rotary(3, False)(x, cos, sin), rotary(3, True)(y, cos, sin)),
        (x, x.half(), cos, sin),
        None,
        tmp_path / "rotary.onnx",
    )
    single, half = model.run(x, x.half(), cos, sin)
    assert (single.dtype, half.dtype) == (np.float32, np.float16)
    for got, want in zip((single, half), model.call(x, x.half(), cos, sin), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
