"""Positions matter to the decoder: absolute ones, the order of the past, distances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_logits import TOLERANCE, off, plain, tokens
from drawn_encodings import ENCODINGS

from pe_onnx.config import DecoderConfig
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_absolute_positions_matter(name: str) -> None:
    decoder = Decoder(DecoderConfig(encoding=name))
    ids = tokens(2, 17)
    assert off(plain(decoder, ids, shift=1), plain(decoder, ids)) > 0.01


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_order_of_the_past_matters(name: str) -> None:
    """One layer: turning the earlier tokens round is seen by the last one, save without an encoding."""
    decoder = Decoder(DecoderConfig(encoding=name, num_hidden_layers=1))
    ids = tokens(1, 17)
    turned = torch.cat([ids[:, :16].flip(1), ids[:, 16:]], 1)
    change = off(plain(decoder, turned)[:, -1], plain(decoder, ids)[:, -1])
    assert change > 0.01 if name != "none" else change < TOLERANCE


@pytest.mark.parametrize("name", ["rope", "alibi", "t5_bias"])
def test_relative_encodings_do_not_see_a_shift_but_a_stretch(name: str) -> None:
    decoder = Decoder(DecoderConfig(encoding=name))
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.int64)
    at, want = torch.arange(17).expand(2, 17), plain(decoder, ids)

    def logits(positions: torch.Tensor) -> torch.Tensor:
        step = PlainStep(mask)
        step.query_positions = step.key_positions = positions
        with torch.no_grad():
            return decoder(ids, positions, step)

    assert off(logits(at + 1234), want) < TOLERANCE
    assert off(logits(2 * at), want) > 0.01


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("preset", ["tiny", "wide"])
def test_scores_and_logits_are_of_order_one(name: str, preset: str) -> None:
    """Else softmax is uniform, or saturated, and a wrong encoding would pass."""
    wide = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408}
    decoder = Decoder(DecoderConfig(encoding=name, **(wide if preset == "wide" else {})))
    seen: list[torch.Tensor] = []

    class Watched(PlainStep):
        def attend(self, layer: int, query: Any, key: Any, value: Any, *, scale: float, **options: Any) -> torch.Tensor:
            H = options["num_heads"]
            q, k = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in (query, key))
            seen.append(q @ k.mT * scale)
            return super().attend(layer, query, key, value, scale=scale, **options)

    ids = tokens(2, 63)
    with torch.no_grad():
        logits = decoder(ids, torch.arange(63).expand(2, 63), Watched(torch.ones_like(ids)))
    assert all(0.5 < float(scores.std()) < 5 for scores in seen)
    assert 0.5 < float(logits.std()) < 10
