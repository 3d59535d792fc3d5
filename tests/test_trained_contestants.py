"""The trained decoders that come with pe-onnx, compared: in onnxruntime they are what they are in PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Shared
from test_text_bits import NEAR, WORDS, pytorch_bits

import pe_onnx
from pe_onnx import trained_weights
from pe_onnx.bundle import read_bundle
from pe_onnx.comparison import MULTIPLES, TOKENS, compare
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import ConfigError
from pe_onnx.models.decoder import Decoder
from pe_onnx.quality import TEXT
from pe_onnx.session import Session
from pe_onnx.text_bits import window_bits
from pe_onnx.trained_contestants import Spec, extended_rope, shipped, trained_for

SIX = ("alibi", "learned", "none", "rope", "sinusoidal", "t5_bias")
LONGER = ("rope_linear:factor=4", "rope_ntk:factor=4", "rope_yarn:factor=4")

SINGLE = 5e-3
"""Bits of one token far past the trained length, where PyTorch's float32 is 1.1e-3 off its float64 (RoPE at 2,048)."""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecoderConfig:
    """Random weights in place of those that come with pe-onnx, RoPE's alone."""
    config = DecoderConfig("rope", max_position_embeddings=32, seed=3)
    monkeypatch.setattr(trained_weights, "FOLDER", tmp_path)
    monkeypatch.setattr(trained_weights, "HELD_OUT", TEXT)
    trained_weights.write(tmp_path, "rope", Decoder(config).state_dict(), {"config": config.to_dict()})
    return config


@pytest.mark.usefixtures("one_thread")
def test_a_variant_has_the_weights_of_rope(made_up: DecoderConfig) -> None:
    spec = extended_rope()[2]
    assert spec == Spec("rope_yarn", {"factor": 4})
    found = compare(encodings=[spec], lengths=[64], tokens=640, budget_s=1e-6, threads=1)
    (contestant,) = found.contestants
    assert (contestant.name, contestant.encoding_weights) == ("rope_yarn:factor=4", 0)
    named = {
        "encoding": "rope_yarn",
        "encoding_parameters": spec.parameters,
        "weights": "rope",
        "max_position_embeddings": 128,
    }
    right = dataclasses.replace(made_up, **named)
    others = [
        dataclasses.replace(right, encoding="rope", encoding_parameters={}),
        dataclasses.replace(right, weights=None, seed=4),
        dataclasses.replace(right, max_position_embeddings=32),
    ]
    bits = contestant.at(64).bits_per_byte
    assert bits == pytest.approx(pytorch_bits(right, WORDS[:640], 64).mean(), abs=NEAR)
    for wrong in others:
        assert abs(pytorch_bits(wrong, WORDS[:640], 64).mean() - bits) > 10 * NEAR


@pytest.mark.usefixtures("made_up", "one_thread")
def test_the_longer_context_is_a_finding() -> None:
    """At the length that the variant is for, which is not the greatest."""
    found = compare(encodings=[Spec("rope", {}), extended_rope()[1]], lengths=[128, 160], tokens=320, budget_s=1e-6)
    plain, longer = (c.at(128).bits_per_byte for c in found.contestants)
    words = f"At 128 tokens, without further training: rope {plain:.3f}, rope_ntk:factor=4 {longer:.3f} bits per byte."
    assert words in list(found.findings())


@pytest.mark.usefixtures("made_up")
def test_names() -> None:
    assert [spec.name for spec in shipped()] == ["rope"]
    assert tuple(spec.name for spec in extended_rope()) == LONGER
    assert trained_for(Spec("rope_longrope", {})) == "rope"
    with pytest.raises(ConfigError, match=r"'roppe' has no trained weights; did you mean 'rope'\? .*\(known: rope\)"):
        trained_for(Spec("roppe", {}))


def test_without_weights_bundles_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_weights, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match="name bundles"):
        compare()


def spec_of(name: str) -> Spec:
    return next(spec for spec in [*(Spec(n, {}) for n in SIX), *extended_rope()] if spec.name == name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SIX, *LONGER])
def test_bits_are_pytorchs_at_every_length(name: str, shared: Shared) -> None:
    """At all lengths of a comparison; the text is a quarter of what one reads, twice its greatest window."""
    spec = spec_of(name)

    def make(folder: Path) -> None:
        options: dict[str, Any] = {"encoding_parameters": spec.parameters, "weights": trained_for(spec)}
        pe_onnx.export(encoding=spec.encoding, output=folder, logits="all", **options)

    bundle = read_bundle(shared(("trained", name), make))
    config = DecoderConfig.from_dict(bundle.manifest["source"]["config"])
    assert config.weights is not None
    ids, session = list(trained_weights.held_out())[: TOKENS // 4], Session(bundle)
    trained_length = trained_weights.config(config.weights)["max_position_embeddings"]
    lengths = [int(m * trained_length) for m in MULTIPLES]
    for length in [n for n in lengths if bundle.max_length is None or n <= bundle.max_length]:
        bits = window_bits(session, ids, length)[:, 1:]
        want = np.concatenate([pytorch_bits(config, ids[i : i + length], length) for i in range(0, len(ids), length)])
        assert abs(bits.mean() - want.mean()) < 1e-4
        assert np.abs(bits - want).max() < SINGLE


@pytest.mark.slow
def test_the_comparison_of_all() -> None:
    found = compare(extended=True, tokens=4096, budget_s=5)
    assert [c.name for c in found.contestants] == [*SIX, *LONGER]
    assert found.lengths == [128, 256, 512, 1024, 2048]
    own = {c.name: c.encoding_weights for c in found.contestants}
    assert {name: count for name, count in own.items() if count} == {"learned": 256 * 128, "t5_bias": 32 * 4}
    for c in found.contestants:
        stopped = [row.length_tokens for row in c.lengths if row.cannot]
        assert stopped == ([512, 1024, 2048] if c.name == "learned" else [])
        assert all(row.bits_per_byte is not None for row in c.lengths if not row.cannot)
    at = {(c.name, row.length_tokens): row.bits_per_byte or 0 for c in found.contestants for row in c.lengths}
    assert max(at[name, 256] for name in SIX if name != "none") < 2 < at["none", 256] < 3
    assert at["alibi", 2048] < at["alibi", 256]
    assert at["rope", 1024] > at["rope", 256] + 1 > at["rope_yarn:factor=4", 1024]
