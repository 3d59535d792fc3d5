"""Each encoding's numbers against its paper's formula in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from drawn_encodings import ENCODINGS, FAR, encoding
from torch import nn
from transformers import LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from pe_onnx.encodings.alibi import slopes


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
@pytest.mark.parametrize("C", [2, 34, 64])
def test_sinusoidal_is_the_matrix_of_the_paper(C: int, theta: float) -> None:
    config = {"hidden_size": C, "num_attention_heads": 1}
    got = encoding("sinusoidal", config, theta=theta).embed(FAR)
    assert got.shape == (1, FAR.shape[1], C)
    assert got.dtype == torch.float32
    want = np.zeros(got.shape)
    for n, t in enumerate(FAR[0].tolist()):
        for i in range(C // 2):
            want[0, n, 2 * i] = math.sin(t / theta ** (2 * i / C))
            want[0, n, 2 * i + 1] = math.cos(t / theta ** (2 * i / C))
    np.testing.assert_allclose(got, want, atol=1e-6)
    if C > 2:  # sines first and cosines after them, as tensor2tensor has it, is another matrix
        halves = np.concatenate([want[..., ::2], want[..., 1::2]], -1)
        assert np.abs(got.numpy() - halves).max() > 0.1


def rope_truth(theta: float, R: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.array([[t * theta ** (-2 * i / R) for i in range(R // 2)] for t in FAR[0].tolist()])[None]
    return np.cos(angle), np.sin(angle)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 100.0])
@pytest.mark.parametrize("R", [0, 6, 128])
def test_rope_is_exact_up_to_a_million_tokens(theta: float, R: int) -> None:
    config = {"hidden_size": 128, "num_attention_heads": 1}
    tables = encoding("rope", config, theta=theta, rotary_dim=R).tables(FAR)
    for got, want in zip(tables, rope_truth(theta, R or 128), strict=True):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_float32_angle_would_fail() -> None:
    """The twin of the test before: transformers' own tables are float32, and off far from the start."""
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}
    )
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), FAR)[0][..., :64]
    ours, _ = encoding("rope", {"hidden_size": 128, "num_attention_heads": 1}).tables(FAR)
    want, _ = rope_truth(10_000.0, 128)
    assert np.abs(theirs.numpy() - want).max() > 1e-3
    near = slice(0, 4)  # where float32 is good enough the two are one
    torch.testing.assert_close(ours[:, near], theirs[:, near], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["rope", "sinusoidal"])
def test_the_exported_angles_are_exact_too(name: str, tmp_path: Path) -> None:
    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoding = encoding(name)

        def forward(self, positions: torch.Tensor) -> Any:
            return self.encoding.tables(positions) if name == "rope" else (self.encoding.embed(positions),)

    program = torch.onnx.export(
        Angles().half().eval(),
        (torch.arange(6).view(2, 3),),
        dynamo=True,
        opset_version=23,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},),
        verbose=False,
    )
    assert program is not None
    program.save(tmp_path / "angles.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "angles.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: FAR.numpy()})
    size = 16 if name == "rope" else 64
    cos, sin = rope_truth(10_000.0, size)
    wants = (cos, sin) if name == "rope" else (np.stack([sin, cos], -1).reshape(*sin.shape[:2], -1),)
    for got, want in zip(outputs, wants, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 16])
def test_partial_rotary_leaves_the_rest_untouched(rotary_dim: int, interleaved: bool) -> None:
    made = encoding("rope", rotary_dim=rotary_dim, interleaved=interleaved)
    x = torch.randn(2, 17, 4 * 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(1, 18).repeat(2, 1)
    got, key = (y.unflatten(-1, (4, 16)) for y in made.rotate(x, x, made.tables(positions)))
    torch.testing.assert_close(key, got, rtol=0, atol=0)
    given = x.unflatten(-1, (4, 16))
    torch.testing.assert_close(got[..., rotary_dim:], given[..., rotary_dim:], rtol=0, atol=0)
    for i in range(rotary_dim // 2):  # as a product of complex numbers
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary_dim // 2)
        turn = torch.polar(torch.ones(17).double(), positions[0].double() * 10_000.0 ** (-2 * i / rotary_dim))
        want = torch.complex(given[..., a], given[..., b]) * turn[None, :, None]
        torch.testing.assert_close(torch.complex(got[..., a], got[..., b]).to(want.dtype), want, rtol=0, atol=1e-5)


def test_rope_scores_depend_on_the_distance_alone() -> None:
    made = encoding("rope")
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 17, 16)

    def scores(start: int) -> torch.Tensor:
        query, key = made.rotate(q, k, made.tables(start + torch.arange(17)[None]))
        return query[0] @ key[0].T

    torch.testing.assert_close(scores(0), scores(12_345), rtol=0, atol=1e-4)
    assert (scores(0)[:, 0] - scores(0)[:, 1]).abs().max() > 0.1


def slopes_by_the_authors_rule(heads: int) -> list[float]:
    """A geometric sequence from 2^(-8/n) with that ratio; for other counts filled up with every other one of 2n."""
    n = 1
    while 2 * n <= heads:
        n *= 2
    ratio = 2 ** (-8 / n)
    sequence = [ratio ** (h + 1) for h in range(n)]
    finer = [math.sqrt(ratio) ** (h + 1) for h in range(2 * n)]
    return sequence + finer[0::2][: heads - n]


@pytest.mark.parametrize("heads", range(1, 41))
def test_alibi_slopes_are_the_authors(heads: int) -> None:
    got = slopes(heads)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, slopes_by_the_authors_rule(heads), rtol=1e-14)
    assert len(set(got.tolist())) == heads
    bloom = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(got.float(), bloom, rtol=2e-6)  # float32 powers


def test_alibi_slopes_by_hand() -> None:
    assert slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


def test_alibi_penalises_the_distance() -> None:
    made = encoding("alibi", {"hidden_size": 48, "num_attention_heads": 3})
    queries, keys = torch.tensor([[1, 2], [70_000, 70_001]]), torch.arange(5)[None]
    got = made.bias(queries, keys, 5)
    assert got.shape == (2, 3, 2, 5)
    for b, h, i, j in np.ndindex(*got.shape):
        want = -slopes_by_the_authors_rule(3)[h] * (int(queries[b, i]) - j)
        assert float(got[b, h, i, j]) == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(made.bias(queries, None, 5), got, rtol=0, atol=0)


def test_learned_positions_are_the_rows_of_the_table() -> None:
    made = encoding("learned", {"max_position_embeddings": 63})
    table = made.state_dict()["table.weight"]
    assert table.shape == (63, 64)
    positions = torch.tensor([[0, 62, 17], [3, 2, 1]])
    got = made.embed(positions)
    for b, t in np.ndindex(2, 3):
        torch.testing.assert_close(got[b, t], table[positions[b, t]], rtol=0, atol=0)
    assert made.max_length == 63


@pytest.mark.parametrize(("n", "m"), [(32, 128), (7, 40)])
def test_t5_bias_is_the_weight_of_the_bucket(n: int, m: int) -> None:
    made = encoding("t5_bias", num_buckets=n, max_distance=m)
    (weight,) = made.parameters()
    assert weight.shape == (n, 4)
    queries, keys = torch.tensor([[5, 6], [1000, 40]]), torch.arange(63)[None].repeat(2, 1)
    bucket = T5Attention._relative_position_bucket(keys[:, None] - queries[:, :, None], False, n, m)
    want = weight[bucket].permute(0, 3, 1, 2)
    torch.testing.assert_close(made.bias(queries, keys, 63), want, rtol=0, atol=0)
    torch.testing.assert_close(made.bias(queries, None, 63), want, rtol=0, atol=0)


def test_only_tables_and_xpos_limit_the_length() -> None:
    limited = {name for name in ENCODINGS if encoding(name).max_length is not None}
    assert limited == {"learned", "learned_offset", "xpos"}


def test_none_has_no_hook() -> None:
    made = encoding("none")
    for call in (made.embed, made.tables):
        with pytest.raises(NotImplementedError):
            call(FAR)
    assert not list(made.parameters())


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("rope", lambda made: torch.cat(made.tables(FAR))),
        ("sinusoidal", lambda made: made.embed(FAR)),
        ("alibi", lambda made: made.bias(FAR, None, 63)),
    ],
)
def test_a_half_precision_model_keeps_exact_constants(name: str, numbers: Any, cast: str) -> None:
    made = encoding(name, {"hidden_size": 48, "num_attention_heads": 3})
    before = numbers(made)
    halved = getattr(nn.Sequential(copy.deepcopy(made)), cast)()[0]
    torch.testing.assert_close(numbers(halved), before, rtol=0, atol=0)
    assert numbers(halved).dtype == torch.float32
    assert not made.state_dict()  # nor are they weights that a checkpoint would have to hold
