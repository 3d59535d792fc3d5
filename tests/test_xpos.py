"""xPos against its paper in float64, its limit by dtype; learned and sinusoidal positions behind offsets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.xglm.modeling_xglm import XGLMSinusoidalPositionalEmbedding

import pe_onnx
from pe_onnx.bundle import read_bundle
from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import build_encoding
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.parity import check_parity


def make(name: str, config: dict[str, Any] | None = None, **parameters: Any) -> Any:
    return build_encoding(DecoderConfig(encoding=name, encoding_parameters=parameters, **(config or {})))


def paper_score(q: np.ndarray, k: np.ndarray, n: int, m: int, base: float) -> float:
    """Sun et al. 2022, equation 12: pairs of neighbours as complex numbers, q at n, k at m <= n; float64."""
    D = len(q)
    total = 0.0
    for i in range(D // 2):
        zeta = (2 * i + 0.4 * D) / (1.4 * D)
        turn = np.exp(1j * (n - m) * 10_000.0 ** (-2 * i / D))
        product = complex(q[2 * i], q[2 * i + 1]) * np.conj(complex(k[2 * i], k[2 * i + 1])) * turn
        total += product.real * zeta ** ((n - m) / base)
    return total


@pytest.mark.parametrize("base", [512.0, 64.0])
@pytest.mark.parametrize("start", [0, 900, 2500])
def test_xpos_scores_are_those_of_the_paper(start: int, base: float) -> None:
    made = make("xpos", {"hidden_size": 16, "num_attention_heads": 1}, scale_base=base)
    q, k = torch.randn(2, 1, 63, 16, generator=torch.Generator().manual_seed(0))
    turned_q, turned_k = made.rotate(q, k, made.tables(start + torch.arange(63)[None]))
    got = (turned_q[0].double() @ turned_k[0].double().T).numpy()
    for n in range(0, 63, 5):
        for m in range(n + 1):
            want = paper_score(q[0, n].double().numpy(), k[0, m].double().numpy(), n, m, base)
            assert got[n, m] == pytest.approx(want, abs=1e-5)


def test_a_cached_key_does_not_change_and_far_scores_fade() -> None:
    made = make("xpos", {"hidden_size": 16, "num_attention_heads": 1})
    x = torch.ones(1, 2000, 16)
    query, key = made.rotate(x, x, made.tables(torch.arange(2000)[None]))
    _, short = made.rotate(x[:, :10], x[:, :10], made.tables(torch.arange(10)[None]))
    torch.testing.assert_close(key[:, :10], short, rtol=0, atol=0)
    norms = query[0, -1].unflatten(0, (-1, 2)).norm(dim=-1) * key[0, 0].unflatten(0, (-1, 2)).norm(dim=-1)
    zeta = (torch.arange(0, 16, 2) + 6.4) / 22.4
    torch.testing.assert_close(norms, 2 * zeta ** (1999 / 512), rtol=1e-5, atol=0)


def test_xpos_ends_where_its_factors_leave_the_dtype() -> None:
    """Every table entry is finite and normal up to the end, in float32 and, smaller, in float16."""
    made = make("xpos", {"max_position_embeddings": 16_384})
    assert 26_000 < made.max_length_in("fp32") == made.max_length < 28_000
    assert 4_800 < made.max_length_in("fp16") < 5_000
    assert make("xpos", scale_base=1024.0).max_length > 1.9 * make("xpos").max_length - 2048
    for dtype, greatest, least in (("fp32", 3e38, 1.2e-38), ("fp16", 65_504, 6.2e-5)):
        last = made.max_length_in(dtype) - 1
        shrunk_cos, shrunk_sin, cos, sin = made.tables(torch.tensor([[0, last]]))
        for a, b in ((shrunk_cos, shrunk_sin), (cos, sin)):
            sizes = torch.hypot(a.double(), b.double())
            assert sizes.max() < greatest / 50
            assert sizes.min() > least * 10


@pytest.mark.parametrize("target", ["ort", pytest.param("portable", marks=pytest.mark.slow)])
def test_a_longer_text_is_refused(target: str, tmp_path: Path) -> None:
    pe_onnx.export(encoding="xpos", encoding_parameters={"scale_base": 8}, target=target, output=tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.max_length is not None
    assert bundle.max_length == make("xpos", scale_base=8).max_length < 1000
    report = check_parity(tmp_path / "bundle", tokens=bundle.max_length, modes=["whole", "chunks"])
    assert report.relative_error < 2e-5  # at the very end of what it takes
    with pytest.raises(InputError, match=f"{bundle.max_length + 1} tokens are more than the {bundle.max_length}"):
        pe_onnx.load(tmp_path / "bundle").cache(1).prefill([[1] * (bundle.max_length + 1)])


@pytest.mark.slow
def test_half_precision_has_its_own_limit(tmp_path: Path) -> None:
    fields = {"max_position_embeddings": 16_384}
    pe_onnx.export(encoding="xpos", dtype="fp16", config=fields, output=tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.max_length == make("xpos", fields).max_length_in("fp16") == bundle.trained_length
    report = check_parity(tmp_path / "bundle", tokens=bundle.max_length, modes=["whole"])
    assert report.passed, report.to_dict()


FAR = torch.tensor([[0, 1, 2, 63, 500], [7, 8, 9, 1000, 2045]])


@pytest.mark.parametrize("C", [4, 64, 33])
def test_fairseq_sinusoids_are_those_of_xglm(C: int) -> None:
    config = {"hidden_size": C, "num_attention_heads": 1}
    got = make("sinusoidal_fairseq", config).embed(FAR)
    assert got.shape == (2, 5, C)
    theirs = XGLMSinusoidalPositionalEmbedding(2046, C, padding_idx=1)
    near = FAR < 64  # theirs are float32 angles
    torch.testing.assert_close(got[near], theirs(FAR)[near], rtol=0, atol=1e-5)
    half = C // 2
    for b, t in np.ndindex(2, 5):
        for i in range(half):
            angle = (int(FAR[b, t]) + 2) * 10_000.0 ** (-i / (half - 1))
            assert float(got[b, t, i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(got[b, t, half + i]) == pytest.approx(math.cos(angle), abs=1e-6)
    if C % 2:
        assert (got[..., -1] == 0).all()


def test_the_two_sinusoidal_layouts_differ() -> None:
    a, b, c = make("sinusoidal"), make("sinusoidal_fairseq"), make("sinusoidal_fairseq", offset=0)
    assert (a.embed(FAR) - b.embed(FAR)).abs().max() > 0.5
    torch.testing.assert_close(c.embed(FAR + 2), b.embed(FAR), rtol=0, atol=0)


def test_learned_offset_is_opts() -> None:
    made = make("learned_offset", {"max_position_embeddings": 63})
    made.draw_weights(torch.Generator().manual_seed(0))
    theirs = OPTLearnedPositionalEmbedding(63, 64)
    theirs.load_state_dict({"weight": made.table.weight.detach()})
    positions = torch.tensor([[0, 62, 17], [3, 2, 1]])
    mask = torch.ones(1, 63, dtype=torch.int64)
    torch.testing.assert_close(made.embed(positions), theirs(mask, position_ids=positions), rtol=0, atol=0)
    torch.testing.assert_close(made.embed(torch.arange(63)[None]), theirs(mask), rtol=0, atol=0)
    assert made.max_length == 63


WRONG = [
    ("xpos", {"scale_base": 0}, "scale_base = 0.0 must be positive"),
    ("xpos", {"scale_base": 1e-3}, "scale_base = 0.001 must be greater"),
    ("learned_offset", {"offset": -1}, "offset = -1 must be at least 0"),
    ("sinusoidal_fairseq", {"theta": 0}, "theta = 0.0 must be positive"),
    ("sinusoidal_fairseq", {"offset": -2}, "offset = -2 must be at least 0"),
    ("rope_linear", {"factor": 0.5}, "factor = 0.5 must be at least 1"),
    ("rope_linear", {"theta": -1}, "theta = -1.0 must be positive"),
    ("rope_ntk", {"rotary_dim": 2}, "rotary size = 2 must be at least 4"),
    ("rope_dynamic", {"factor": 0}, "factor = 0.0 must be at least 1"),
    ("rope_yarn", {"beta_fast": 0.5}, "beta_fast = 0.5 must be at least beta_slow = 1.0"),
    ("rope_yarn", {"attention_factor": "much"}, "attention_factor = 'much' must be a finite number or none"),
    ("rope_yarn", {"atention_factor": 1}, "unknown parameter 'atention_factor'; did you mean 'attention_factor'"),
    ("rope_yarn", {"original_max_position_embeddings": -4}, "original_max_position_embeddings = -4"),
    ("rope_longrope", {"short_factor": "1;2"}, r"short_factor = \(1.0, 2.0\) must be 8 numbers"),
    ("rope_longrope", {"long_factor": "1;2;x"}, "long_factor = '1;2;x' must be finite numbers, as 1;1.2;2"),
    ("rope_longrope", {"long_factor": [1.0] * 7 + [0.0]}, "long_factor = .* must be positive"),
    ("rope_longrope", {"long_factor": 3}, "long_factor = 3 must be finite numbers"),
    ("rope_llama3", {"high_freq_factor": 1}, "high_freq_factor = 1.0 must be greater than low_freq_factor = 1.0"),
    ("rope_proportional", {"partial_rotary_factor": 2}, "partial_rotary_factor = 2.0 must be at most 1"),
    ("rope_partial", {"partial_rotary_factor": 0.2}, "partial_rotary_factor = 0.2 must be at most 1"),
    ("rope_two_bases", {"global_every": 0}, "global_every = 0 must be at least 1"),
    ("rope_nope", {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0 must be at least 1"),
]


@pytest.mark.parametrize(("name", "parameters", "message"), WRONG, ids=[f"{name}-{given}" for name, given, _ in WRONG])
def test_a_wrong_parameter_is_named(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **parameters)


@pytest.mark.parametrize("none", [None, "none", "None"])
def test_none_may_be_given(none: Any) -> None:
    assert make("rope_yarn", attention_factor=none).parameters_used["attention_factor"] is None
