"""EncoderAttention: against loops and transformers, its gradient, its ONNX function and what that holds in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from op_exports import ROWS, Exported, Get, band, encoder, largest_outputs, save
from op_inputs import F16, F32, F64, encoder_arguments, randn
from op_oracles import Array, attended, encoder_bias_naive, heads_first
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

import pe_onnx.custom_ops as ops

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(1, 1), (3, 2), (2, 7), (3, 8), (3, 9), (1, 16), (2, 17), (3, 63)]
"""Batch and source; chunks are of 8 queries, and the bias is constant beyond a distance of 20."""


def naive(args: tuple[torch.Tensor, ...], shift: int = 0, sign: int = 1, masked: bool = True) -> Array:
    query, key, value, mask, weight = args
    bias = torch.from_numpy(encoder_bias_naive(weight, query.shape[1], 20, shift, sign))
    keys, values = heads_first(key, 3), heads_first(value, 3)
    return attended(query, keys, values, lambda b, i, j: bool(mask[b, j]) or not masked, 0.5, bias=bias)


@pytest.mark.parametrize("dtype", [F32, F64, F16])
@pytest.mark.parametrize(("B", "S"), SIZES)
def test_encoder_attention_is_the_plain_formula(B: int, S: int, dtype: torch.dtype) -> None:
    args = encoder_arguments(B, S, dtype)
    got = encoder(*args[:4], band(args[4]))
    assert got.dtype == dtype
    # float64 exact to its own rounding: it is the reference that others are measured against
    np.testing.assert_allclose(got, naive(args), atol={F32: 1e-5, F64: 1e-12, F16: 1e-2}[dtype])


def test_encoder_attention_is_that_of_transformers() -> None:
    config = T5Config(d_model=24, d_kv=8, num_heads=3, relative_attention_num_buckets=10, attn_implementation="eager")
    config.relative_attention_max_distance = 31
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    for weight in attention.parameters():
        weight.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(weight.shape[0]))
    attention.o.weight.data.copy_(torch.eye(24))
    x, mask = randn(3, 63, 24), encoder_arguments(3, 63)[3]
    added = torch.zeros(3, 1, 1, 63).masked_fill(~mask[:, None, None], torch.finfo(F32).min)
    with torch.no_grad():
        want = attention(x, mask=added)[0]
        table = ops.relative_band(attention.relative_attention_bias.weight, 31, 7)
        got = ops.encoder_attention(attention.q(x), attention.k(x), attention.v(x), mask, table, 3, 1.0)
        moved = ops.encoder_attention(attention.q(x), attention.k(x), attention.v(x), mask, table.roll(1, 3), 3, 1.0)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert (moved - want).abs().max() > 0.1


def test_gradient_of_encoder_attention() -> None:
    *tensors, mask, weight = (x.requires_grad_() if x.is_floating_point() else x for x in encoder_arguments(2, 9, F64))
    assert torch.autograd.gradcheck(lambda q, k, v, w: encoder(q, k, v, mask, band(w)), (*tensors, weight))


@pytest.mark.parametrize(("B", "S"), SIZES)
@pytest.mark.parametrize("engine", ["run", "evaluate"])
def test_encoder_attention_in_onnx(engine: str, B: int, S: int, exported: Get) -> None:
    args = encoder_arguments(B, S)
    (got,) = getattr(exported("encoder"), engine)(*args[:4], band(args[4]))
    np.testing.assert_allclose(got, naive(args), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("B", "S"), [(1, 1), (3, 8), (2, 63)])
def test_encoder_attention_in_half_precision_in_onnxruntime(B: int, S: int, exported: Get) -> None:
    args = encoder_arguments(B, S, F16)
    (got,) = exported("encoder-float16").run(*args[:4], band(args[4]))
    np.testing.assert_allclose(got, naive(args), rtol=0, atol=1e-2)


@pytest.mark.parametrize("S", [7, 30])
@pytest.mark.parametrize("mistake", [{"shift": 1}, {"shift": -1}, {"sign": -1}, {"masked": False}], ids=str)
def test_a_wrong_bias_or_mask_is_noticed(mistake: dict[str, int], S: int, exported: Get) -> None:
    args = encoder_arguments(3, S)
    (got,) = exported("encoder").run(*args[:4], band(args[4]))
    assert np.abs(got - naive(args, **mistake)).max() > 0.1


@pytest.fixture(scope="module")
def with_band(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The band made and used in one graph, chunks of 8."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return encoder(q, k, v, mask, band(w))

    path = tmp_path_factory.mktemp("together") / "model.onnx"
    return save(call, encoder_arguments(2, 11), (ROWS, ROWS, ROWS, ROWS, {}), path)


@pytest.mark.parametrize(("B", "S"), SIZES)
def test_a_band_made_in_the_graph(B: int, S: int, with_band: Exported) -> None:
    args = encoder_arguments(B, S)
    np.testing.assert_allclose(with_band.run(*args)[0], naive(args), rtol=0, atol=1e-5)


def test_no_tensor_grows_with_the_square_of_the_source(with_band: Exported, tmp_path: Path) -> None:
    """A chunk's bias is the greatest tensor of the mask's and the bias's; the source has 13 chunks."""
    S, R, H = 100, 8, 3
    sizes = largest_outputs(with_band.path, encoder_arguments(1, S), tmp_path)
    assert "Loop" in sizes
    assert sizes["Pad"] == H * R * S * 4
    assert max(sizes.values()) == sizes["Pad"]


def test_a_source_of_one_chunk_takes_no_loop(with_band: Exported, tmp_path: Path) -> None:
    assert not {"Loop", "Pad"} & set(largest_outputs(with_band.path, encoder_arguments(2, 8), tmp_path))
