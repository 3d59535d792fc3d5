"""ALiBi, T5, KERPLE and FIRE against transformers' builders and the papers' formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import build_encoding
from pe_onnx.errors import ConfigError
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder

KEYS = 700
QUERIES = torch.tensor([[0, 1, 511, 699], [2, 3, 300, 301]])


def make(name: str, heads: int = 12, layers: int = 2, **parameters: Any) -> Any:
    """With its weights drawn."""
    config = DecoderConfig(
        encoding=name,
        encoding_parameters=parameters,
        hidden_size=16 * heads,
        num_attention_heads=heads,
        num_hidden_layers=layers,
    )
    made = build_encoding(config)
    made.draw_weights(torch.Generator().manual_seed(0))
    return made


def up_to_a_constant_in_each_row(bias: torch.Tensor) -> np.ndarray:
    """What softmax sees of ``[B, H, T, S]`` where each query sees the keys before it and itself."""
    own = bias.gather(3, QUERIES[:, None, :, None].expand(-1, bias.shape[1], -1, 1).expand(len(bias), -1, -1, -1))
    seen = torch.arange(bias.shape[3]) <= QUERIES[:, None, :, None]
    return torch.where(seen, bias - own, 0.0).double().numpy()


ONES = torch.ones(1, KEYS, dtype=torch.int64)
ORACLES = {
    "alibi_bloom": lambda heads: bloom_alibi(ONES, heads, torch.float32),
    "alibi_mpt": lambda heads: build_mpt_alibi_tensor(heads, KEYS),
    "alibi_falcon": lambda heads: falcon_alibi(ONES, heads, torch.float32) / math.sqrt(16),
}


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 20, 31, 32, 40, 71, 112])
@pytest.mark.parametrize("name", ORACLES)
def test_alibi_is_that_of_transformers(name: str, heads: int) -> None:
    """Heads of 16 channels. Theirs grows with the key's position: the same scores but for a constant in each row."""
    made = make(name, heads)
    theirs = ORACLES[name](heads).view(1, heads, 1, KEYS).float().expand(2, -1, 4, -1)
    want = up_to_a_constant_in_each_row(theirs)
    for keys in (None, torch.arange(KEYS)[None]):
        got = made.bias(QUERIES, keys, KEYS)
        assert got.shape == (2, heads, 4, KEYS)
        np.testing.assert_allclose(up_to_a_constant_in_each_row(got), want, atol=2e-4, rtol=2e-6)


def test_the_definitions_differ_where_they_should() -> None:
    """Else one would pass for another: MPT's range, Falcon's rounding and scale. ALiBi, BLOOM and MPT at 8 are one."""
    queries = torch.tensor([[600]])
    bias = {name: make(name, 12).bias(queries, None, KEYS) for name in ("alibi", *ORACLES)}
    torch.testing.assert_close(bias["alibi"], bias["alibi_bloom"], rtol=5e-6, atol=0)
    torch.testing.assert_close(bias["alibi"], bias["alibi_mpt"], rtol=1e-6, atol=0)
    assert (bias["alibi"] - make("alibi_mpt", alibi_bias_max=6.0).bias(queries, None, KEYS)).abs().max() > 1
    rounded = 4 * bias["alibi_falcon"] - bias["alibi_bloom"]
    assert 0.1 < rounded.abs().max() < 4  # half of a bfloat16 step at 600 is 2, and of its slopes 0.2 %


def test_mpt_takes_another_maximum_where_transformers_does_not() -> None:
    made = make("alibi_mpt", 8, alibi_bias_max=4.0)
    np.testing.assert_allclose(made.slopes, [2.0 ** (-4 * (h + 1) / 8) for h in range(8)])
    theirs = build_mpt_alibi_tensor(8, 5, alibi_bias_max=4)[:, 0, 0] / -4
    torch.testing.assert_close(made.slopes, theirs)


@pytest.mark.parametrize("positions", [None, torch.arange(63)[None].repeat(2, 1)])
def test_t5_per_layer_has_a_table_for_each(positions: torch.Tensor | None) -> None:
    made = make("t5_bias_per_layer", heads=4, layers=3, num_buckets=8, max_distance=20)
    assert [tuple(p.shape) for p in made.parameters()] == [(8, 4)] * 3
    queries = torch.tensor([[5, 6], [62, 40]])
    config = type("Config", (), {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20})
    umt5 = UMT5Attention.__new__(UMT5Attention)
    torch.nn.Module.__init__(umt5)
    umt5.is_decoder = True
    umt5.relative_attention_num_buckets = config.relative_attention_num_buckets
    umt5.relative_attention_max_distance = config.relative_attention_max_distance
    bucket = umt5._relative_position_bucket(torch.arange(63)[None, None] - queries[:, :, None])
    for i in range(3):
        want = made.layer(i).weight[bucket].permute(0, 3, 1, 2)
        torch.testing.assert_close(made.layer(i).bias(queries, positions, 63), want, rtol=0, atol=0)
    assert (made.layer(0).weight - made.layer(1).weight).abs().max() > 0.1


def kerple(name: str, r1: float, r2: float, d: int) -> float:
    return -r1 * math.log(1 + r2 * d) if name == "kerple_log" else -r1 * float(d) ** r2


@pytest.mark.parametrize("name", ["kerple_log", "kerple_power"])
def test_kerple_is_the_formula_of_the_paper(name: str) -> None:
    made = make(name, 5)
    r1, r2 = made.r1.tolist(), made.r2.tolist()
    assert min(r1 + r2) > 0.01
    for keys in (None, torch.arange(KEYS)[None].repeat(2, 1)):
        got = made.bias(QUERIES, keys, KEYS).detach()
        for b, h, i in np.ndindex(2, 5, 4):
            t = int(QUERIES[b, i])
            want = [kerple(name, r1[h], r2[h], t - j) for j in range(t + 1)]
            np.testing.assert_allclose(got[b, h, i, : t + 1], want, rtol=5e-6, atol=1e-6)


def test_kerple_keeps_its_weights_in_range() -> None:
    """As the authors do: at least 0.01, and the power at most 2."""
    for name, greatest in (("kerple_log", 50.0), ("kerple_power", 2.0)):
        made = make(name, 3)
        with torch.no_grad():
            made.r1.copy_(torch.tensor([-1.0, 0.0, 3.0]))
            made.r2.copy_(torch.tensor([-1.0, 0.5, 50.0]))
        got = made.bias(torch.tensor([[9]]), None, 10)[0, :, 0].detach()
        for h, (r1, r2) in enumerate([(0.01, 0.01), (0.01, 0.5), (3.0, greatest)]):
            np.testing.assert_allclose(got[h], [kerple(name, r1, r2, 9 - j) for j in range(10)], rtol=1e-5, atol=1e-7)


def test_kerple_power_of_one_is_alibi() -> None:
    made, alibi = make("kerple_power", 12), make("alibi", 12)
    with torch.no_grad():
        made.r1.copy_(alibi.slopes)
        made.r2.fill_(1.0)
    ours, theirs = (up_to_a_constant_in_each_row(x.bias(QUERIES, None, 200 + 500).detach()) for x in (made, alibi))
    slow = alibi.slopes >= 0.01
    np.testing.assert_allclose(ours[:, slow], theirs[:, slow], rtol=1e-5, atol=1e-5)


def fire(made: Any, i: int, j: int) -> np.ndarray:
    """Li et al. 2024 in float64, one pair of positions: ``[H]``."""
    c, threshold = made.c_and_threshold.detach().double().tolist()
    w1, b1 = (x.detach().double().numpy() for x in (made.hidden.weight[:, 0], made.hidden.bias))
    w2, b2 = (x.detach().double().numpy() for x in (made.output.weight, made.output.bias))
    x = math.log(c * (i - j) + 1) / math.log(c * max(i, threshold) + 1)
    return w2 @ np.maximum(w1 * x + b1, 0) + b2


@pytest.mark.parametrize("threshold", [512.0, 40.0])
def test_fire_is_the_formula_of_the_paper(threshold: float) -> None:
    made = make("fire_shared", 5, threshold=threshold)
    c, L = made.c_and_threshold.tolist()
    assert 0.08 <= c <= 0.12
    assert 0.8 * threshold <= L <= 1.2 * threshold
    for keys in (None, torch.arange(KEYS)[None].repeat(2, 1)):
        got = made.bias(QUERIES, keys, KEYS).detach()
        for b, i in np.ndindex(2, 4):
            t = int(QUERIES[b, i])
            want = np.stack([fire(made, t, j) for j in range(t + 1)], -1)
            np.testing.assert_allclose(got[b, :, i, : t + 1], want, rtol=1e-5, atol=5e-6)


def test_fire_per_layer_and_shared() -> None:
    per_layer, shared = (Decoder(DecoderConfig(encoding=name)) for name in ("fire", "fire_shared"))
    count = {id(x): x.numel() for x in shared.encoding.parameters()}
    assert sum(x.numel() for x in per_layer.encoding.parameters()) == 2 * sum(count.values())
    assert per_layer.encoding.layer(0) is not per_layer.encoding.layer(1)


@pytest.mark.parametrize(("name", "calls"), [("t5_bias", 1), ("fire_shared", 1), ("kerple_log", 1), ("fire", 3)])
def test_a_shared_bias_is_made_once_per_step(name: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(DecoderConfig(encoding=name, num_hidden_layers=3))
    cls = type(decoder.encoding.layer(0))
    seen = []
    original = cls.bias
    monkeypatch.setattr(cls, "bias", lambda self, *args: seen.append(self) or original(self, *args))
    ids = torch.arange(7)[None]
    with torch.no_grad():
        decoder(ids, ids, PlainStep(torch.ones_like(ids)))
    assert len(seen) == calls


WRONG = [
    ("alibi_mpt", {"alibi_bias_max": 0}, "alibi_bias_max = 0.0 must be positive"),
    ("fire", {"width": 0}, "width = 0 must be at least 1"),
    ("fire_shared", {"c": -1}, "c = -1.0 must be positive"),
    ("fire_shared", {"threshold": 0}, "threshold = 0.0 must be positive"),
    ("alibi_bloom", {"slope": 1}, r"unknown parameter 'slope' \(takes no parameters\)"),
    ("t5_bias_per_layer", {"num_buckets": 1}, "num_buckets = 1 must be at least 2"),
    ("kerple_log", {"r1": 1}, "unknown parameter 'r1'"),
]


@pytest.mark.parametrize(("name", "parameters", "message"), WRONG)
def test_a_wrong_parameter_is_named(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **parameters)
