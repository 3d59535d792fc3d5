"""The decoder's weights: drawn from a seed, each of use, tied or not, trained."""

from __future__ import annotations

import pytest
import torch
from decoder_configs import NEOX
from decoder_logits import empty, off, plain, tokens
from drawn_encodings import ENCODINGS
from torch import nn

from pe_onnx.config import DecoderConfig
from pe_onnx.models.attention import CompactStep
from pe_onnx.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_same_seed_gives_the_same_weights() -> None:
    for name in ENCODINGS:
        one, two, other = (Decoder(DecoderConfig(encoding=name, seed=seed)).state_dict() for seed in (7, 7, 8))
        assert list(one) == list(two)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=0)
            assert not torch.equal(other[key], value), key
    torch.manual_seed(1)
    a = Decoder(DecoderConfig()).state_dict()["embedding.weight"]
    torch.manual_seed(2)
    torch.testing.assert_close(Decoder(DecoderConfig()).state_dict()["embedding.weight"], a, rtol=0, atol=0)


def test_every_weight_is_drawn_and_counts() -> None:
    """No parameter is left as torch allocated it, and each moves the logits."""
    everything = {**NEOX, "encoding": "t5_bias", "encoding_parameters": {}, "mlp": "gated", "hidden_act": "silu"}
    decoder = Decoder(DecoderConfig.from_dict(everything))
    ids, want = tokens(2, 63), None
    want = plain(decoder, ids)
    for name, parameter in decoder.named_parameters():
        assert 0 < float(parameter.detach().std()) < 2, name
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        # a bias on the keys adds one number to a whole row of scores
        assert (off(plain(decoder, ids), want) > 1e-3) == ("k_proj.bias" not in name), name
        with torch.no_grad():
            parameter.copy_(kept)


def test_tied_heads_share_one_tensor() -> None:
    tied, untied = (Decoder(DecoderConfig(tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert not torch.equal(untied.head.weight, untied.embedding.weight)
    size = sum(x.numel() for x in untied.parameters()) - sum(x.numel() for x in tied.parameters())
    assert size == 256 * 64


def test_a_decoder_that_trains_learns() -> None:
    """The operators stand in a module that trains: a few steps on one sequence through the compact step."""
    decoder = Decoder(DecoderConfig(encoding="t5_bias", num_hidden_layers=1))
    ids = tokens(1, 17)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        step = CompactStep(torch.ones(1, 16, dtype=torch.int64), 16, empty(decoder, 1))
        logits = decoder(ids[:, :-1], torch.arange(16)[None], step)
        loss = nn.functional.cross_entropy(logits[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert decoder.encoding.weight.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
