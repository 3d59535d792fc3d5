"""The benchmark of the known claim: what it times is the same decoder, and how it counts."""

from __future__ import annotations

import claims
import pytest
import torch

from pe_onnx.config import DecoderConfig
from pe_onnx.models.decoder import Decoder


def test_ratios_are_of_neighbours_and_by_time() -> None:
    times = {
        "sinusoidal": [1.0, 2.0, 4.0],
        "rope": [2.0, 4.0, 8.0],
        "t5_bias": [3.0, 3.0, 3.0],
        "alibi": [1.0, 2.0, 2.0],
    }
    found = claims.summary(times, 100, "torch_training")
    assert {name: one["time_ratio"] for name, one in found.items()} == {
        "sinusoidal": 1.0,
        "rope": 2.0,
        "t5_bias": 1.5,
        "alibi": 1.0,
    }
    assert found["rope"]["tokens_per_s"] == 25.0
    assert claims.summary(times, 100, "bundle_decode")["rope"]["ms_per_token"] == 4000.0


def test_every_contestant_has_a_figure_of_every_round() -> None:
    times = claims.in_rounds({name: lambda value=value: value for name, value in (("a", 1.0), ("b", 2.0))}, 3)  # type: ignore[misc]
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_the_table_has_a_row_for_each_length_and_encoding() -> None:
    times = {name: [float(1 + i)] for i, name in enumerate(claims.ENCODINGS)}
    figures = {n: {measure: claims.summary(times, n, measure) for measure in claims.MEASURES} for n in (512, 1024)}
    lines = claims.table(figures).splitlines()
    assert len(lines) == 2 + 2 * len(claims.ENCODINGS)
    assert "| 1,024 | `alibi` | 256 (4.00) | 256 (4.00) | 256 (4.00) | 4000.00 (4.00) |" in lines


@pytest.mark.parametrize("training", [False, True])
def test_training_has_a_backward_pass_and_inference_none(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(DecoderConfig(encoding="t5_bias"))
    seen: list[bool] = []
    clear = decoder.zero_grad
    weights = decoder.encoding.parameters()
    monkeypatch.setattr(
        decoder,
        "zero_grad",
        lambda set_to_none: (seen.append(all(w.grad is not None for w in weights)), clear(set_to_none)),
    )
    assert claims.torch_calls({"t5_bias": decoder}, 17, training)["t5_bias"]() > 0
    assert seen == [training]
    assert torch.is_grad_enabled()
