"""The decoder's three steps against each other: padding, ragged rows, windows, a growing cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_logits import TOLERANCE, empty, off, plain, tokens
from drawn_encodings import ENCODINGS

from pe_onnx.config import DecoderConfig
from pe_onnx.errors import ConfigError
from pe_onnx.models.attention import CompactStep, MaskedStep, PlainStep, cached_step
from pe_onnx.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")

STEPPED: dict[str, dict[str, Any]] = {
    **{name: {"encoding": name} for name in ENCODINGS},
    "grouped-capped": {"num_key_value_heads": 2, "attention_softcap": 2.0},
    "t5_bias-near": {
        "encoding": "t5_bias",
        "encoding_parameters": {"num_buckets": 6, "max_distance": 9},
        "num_key_value_heads": 1,
    },
    "partial": {"encoding_parameters": {"rotary_dim": 6, "interleaved": True}},
}


@torch.no_grad()
def stepwise(decoder: Decoder, target: str, ids: torch.Tensor, mask: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """All logits with a cache that grows by chunks of tokens."""
    past, logits, begin = empty(decoder, len(ids)), [], 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    for count in chunks:
        end = begin + count
        step = cached_step(target, mask[:, :end], count, past)
        logits.append(decoder(ids[:, begin:end], at[:, begin:end], step))
        past, begin = step.presents, end
    assert begin == ids.shape[1]
    return torch.cat(logits, 1)


CHUNKS = {"whole": [17], "one-by-one": [1] * 17, "chunks": [5, 1, 8, 3]}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("case", STEPPED)
def test_steps_agree_on_full_rows(case: str, chunks: str) -> None:
    decoder = Decoder(DecoderConfig.from_dict(STEPPED[case]))
    ids = tokens(3, 17)
    want = plain(decoder, ids)
    for target in ("ort", "portable"):
        assert off(stepwise(decoder, target, ids, torch.ones_like(ids), CHUNKS[chunks]), want) < TOLERANCE, target


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("case", STEPPED)
def test_masked_step_takes_any_padding(case: str, chunks: str) -> None:
    decoder = Decoder(DecoderConfig.from_dict(STEPPED[case]))
    ids = tokens(4, 17)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, 9:], mask[3, 4:7] = 0, 0, 0
    valid = mask != 0
    got = stepwise(decoder, "portable", ids, mask, CHUNKS[chunks])
    assert torch.isfinite(got).all()
    assert off(got[valid], plain(decoder, ids, mask)[valid]) < TOLERANCE
    for b in range(4):  # and the padding leaves no trace: the row alone gives the same
        assert off(got[b, valid[b]], plain(decoder, ids[b : b + 1, valid[b]])[0]) < TOLERANCE


@pytest.mark.parametrize("case", STEPPED)
def test_compact_step_takes_ragged_rows(case: str) -> None:
    """A prompt padded on the right, then one token for each row, each at its own length."""
    decoder = Decoder(DecoderConfig.from_dict(STEPPED[case]))
    ids, lengths = tokens(3, 24), torch.tensor([17, 1, 9])
    with torch.no_grad():
        mask = (torch.arange(17) < lengths[:, None]).long()
        step = CompactStep(mask, 17, empty(decoder, 3))
        logits = decoder(ids[:, :17], torch.arange(17).expand(3, 17), step)
        for b, n in enumerate(lengths):
            assert off(logits[b, :n], plain(decoder, ids[b : b + 1, :n])[0]) < TOLERANCE
        for _ in range(7):
            new = ids.gather(1, lengths[:, None])
            mask = (torch.arange(step.presents[0][0].shape[2] + 1) <= lengths[:, None]).long()
            step = CompactStep(mask, 1, step.presents)
            torch.testing.assert_close(step.query_positions, lengths[:, None], rtol=0, atol=0)
            logits = decoder(new, lengths[:, None], step)
            lengths = lengths + 1
            for b, n in enumerate(lengths):
                assert off(logits[b], plain(decoder, ids[b : b + 1, :n])[0, -1:]) < TOLERANCE


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [-1, 1, 5, 17, 100])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_windows_are_the_same_in_every_step(window: int, chunks: str, biased: bool, cap: float) -> None:
    B, T, H, K, D = 2, 17, 4, 2, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, n * D, generator=generator) for n in (H, K, K))
    bias = torch.randn(1, H, T, T, generator=generator) if biased else None
    mask = torch.ones(B, T, dtype=torch.int64)
    options = {"num_heads": H, "kv_heads": K, "scale": 0.4, "softcap": cap}
    want = PlainStep(mask).attend(0, q, k, v, bias=bias, window=window, **options)
    for kind in (CompactStep, MaskedStep):
        past, begin, outputs = [(torch.zeros(B, K, 0, D),) * 2], 0, []
        for count in CHUNKS[chunks]:
            end = begin + count
            step = kind(mask[:, :end], count, past)
            part = None if bias is None else bias[:, :, begin:end, :end]
            rows = (x[:, begin:end] for x in (q, k, v))
            outputs.append(step.attend(0, *rows, bias=part, window=window, **options))
            past, begin = step.presents, end
        got = torch.cat(outputs, 1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        for cached, given in zip(past[0], (k, v), strict=True):
            torch.testing.assert_close(cached, given.unflatten(-1, (K, D)).transpose(1, 2), rtol=0, atol=0)
    other = PlainStep(mask).attend(0, q, k, v, bias=bias, window=4 if window in (-1, 17, 100) else -1, **options)
    assert (other - want).abs().max() > 0.1


def test_positions_count_the_tokens_before() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 0, 0]])
    want = [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]
    past = [(torch.zeros(4, 1, 3, 16),) * 2]
    for step, new in ((PlainStep(mask), 5), (MaskedStep(mask, 2, past), 2)):
        assert step.key_positions.tolist() == want
        assert step.query_positions.tolist() == [row[-new:] for row in want]
    compact = CompactStep(mask[[0, 3]], 1, past)
    assert compact.key_positions is None
    assert compact.query_positions.tolist() == [[4], [1]]
    assert compact.last_slots.tolist() == [4, 1]
    assert CompactStep(mask[[0, 3]], 5, past).query_positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert CompactStep(mask[:1], 2, past).query_positions.tolist() == [[3, 4]]


def test_last_token_is_the_last_that_the_mask_marks() -> None:
    decoder = Decoder(DecoderConfig())
    ids = tokens(3, 17)
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 4:], right[2, 1:] = 0, 0
    left[1, :4], left[2, 3:9] = 0, 0
    with torch.no_grad():
        for mask, kinds in ((right, ("ort", "portable")), (left, ("portable",))):
            at = (mask.cumsum(1) - 1).clamp(min=0)
            every = plain(decoder, ids, mask)
            last = [int(row.nonzero().max()) for row in mask]
            want = torch.stack([every[b, i : i + 1] for b, i in enumerate(last)])
            assert off(decoder(ids, at, PlainStep(mask), True), want) < 1e-6
            for target in kinds:
                step = cached_step(target, mask, 17, empty(decoder, 3))
                got = decoder(ids, at, step, True)
                assert got.shape == (3, 1, 256)
                assert off(got, want) < TOLERANCE
            if mask is right:  # the last column is another token
                assert off(every[:, -1:], want) > 0.01


def test_a_head_size_that_the_fused_attention_refuses() -> None:
    decoder = Decoder(DecoderConfig(head_dim=10))
    mask = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"head size = 10 must be a multiple of 16 .*--target portable"):
        cached_step("ort", mask, 3, empty(decoder, 1))
    assert off(stepwise(decoder, "portable", tokens(1, 3), mask, [2, 1]), plain(decoder, tokens(1, 3))) < TOLERANCE
