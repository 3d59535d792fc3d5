"""Bits per byte in onnxruntime against PyTorch's decoder, whole, in pieces and token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Bundles

from pe_onnx import text_bits
from pe_onnx.bundle import read_bundle
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import ConfigError, InputError
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder
from pe_onnx.quality import TEXT
from pe_onnx.session import Session
from pe_onnx.text_bits import counted, read_text, tokenized, why_no_bits, why_not, window_bits

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = list(TEXT.read_bytes())
SIX = ("none", "learned", "sinusoidal", "t5_bias", "alibi", "rope")
NEAR = 1e-4
"""Bits of a token."""


def pytorch_bits(config: DecoderConfig, ids: list[int], length: int, shift: int = 0) -> Any:
    """``[windows, length - 1]`` of the plain formula, all tokens of a window at once. shift: of positions."""
    windows = len(ids) // length
    rows = torch.tensor(ids[: windows * length]).view(windows, length)
    positions = torch.arange(shift, length + shift).expand(windows, length)
    with torch.no_grad():
        logits = Decoder(config)(rows, positions, PlainStep(torch.ones(windows, length, dtype=torch.int64)))
    logs = logits.double().log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
    return (-logs / math.log(2)).numpy()


def bits(folder: Path, ids: list[int], length: int) -> Any:
    return window_bits(Session(read_bundle(folder), threads=1), ids, length)


def config_of(folder: Path) -> DecoderConfig:
    return DecoderConfig.from_dict(read_bundle(folder).manifest["source"]["config"])


@pytest.mark.parametrize(
    ("encoding", "target"),
    [
        pytest.param(e, t, marks=() if (e, t) in (("rope", "portable"), ("alibi", "ort")) else pytest.mark.slow)
        for e in SIX
        for t in ("ort", "portable")
    ],
)
def test_bits_are_pytorchs(encoding: str, target: str, bundles: Bundles) -> None:
    """By default target ort gives the logits of the last token alone, and portable all of them."""
    folder = bundles(encoding, target)
    for length, tokens in ((2, 5), (7, 70), (300, 700)):
        found = bits(folder, WORDS[:tokens], length)
        assert found.shape == (tokens // length, length)
        assert np.isnan(found[:, 0]).all()
        assert np.abs(found[:, 1:] - pytorch_bits(config_of(folder), WORDS[:tokens], length)).max() < NEAR


def test_another_decoder_has_other_bits(bundles: Bundles) -> None:
    """Other weights, positions off by one, no encoding: each moves the mean by more than what passes as equal."""
    folder = bundles("alibi", "ort")
    found = bits(folder, WORDS[:200], 100)[:, 1:]
    config = config_of(folder)
    for wrong in ({"seed": 1}, {"encoding": "none"}, {"encoding": "sinusoidal"}):
        other = pytorch_bits(DecoderConfig.from_dict(config.to_dict() | wrong), WORDS[:200], 100)
        assert abs((found - other).mean()) > 100 * NEAR
    rope = config_of(bundles("rope", "portable"))
    learned = DecoderConfig.from_dict(rope.to_dict() | {"encoding": "learned"})
    moved = pytorch_bits(learned, WORDS[:200], 100) - pytorch_bits(learned, WORDS[:200], 100, shift=1)
    assert abs(moved.mean()) > 100 * NEAR


def test_a_path_dependent_window_runs_whole(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces its keys would be those of shorter texts."""
    folder = bundles("rope_dynamic", "portable", config={"max_position_embeddings": 64})
    monkeypatch.setattr(text_bits, "PIECE_TOKENS", 32)
    want = pytorch_bits(config_of(folder), WORDS[:400], 200)
    assert np.abs(bits(folder, WORDS[:400], 200)[:, 1:] - want).max() < NEAR
    bundle = read_bundle(folder)
    manifest = {**bundle.manifest, "encoding": {**bundle.manifest["encoding"], "path_dependent": False}}
    session = Session(type(bundle)(folder, manifest), threads=1)
    assert abs((window_bits(session, WORDS[:400], 200)[:, 1:] - want).mean()) > 10 * NEAR


def test_a_path_dependent_bundle_that_gives_the_last_logits_is_named(bundles: Bundles) -> None:
    bundle = read_bundle(bundles("rope_dynamic", "portable", config={"max_position_embeddings": 64}))
    last = type(bundle)(bundle.folder, {**bundle.manifest, "logits": "last"})
    assert why_no_bits(bundle) is None
    assert "--logits all" in (why_no_bits(last) or "")


def test_more_windows_than_run_at_once(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_bits, "STEP_ROWS", 3)
    folder = bundles("alibi", "ort")
    assert np.abs(bits(folder, WORDS[:80], 10)[:, 1:] - pytorch_bits(config_of(folder), WORDS[:80], 10)).max() < NEAR


@pytest.mark.parametrize(
    ("tokens", "lengths"), [(24, [2, 4, 8]), (25, [3, 7]), (5, [5]), (16, [2]), (30, [4, 6, 9, 31])]
)
def test_counted_tokens_are_predicted_at_every_length(tokens: int, lengths: list[int]) -> None:
    predicted = [
        {start + i for start in range(0, tokens - length + 1, length) for i in range(1, length)} for length in lengths
    ]
    assert set(np.flatnonzero(counted(tokens, lengths))) == set.intersection(*predicted)


def test_a_text_in_tokens(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(bundles("rope", "portable"))
    ids, sizes = tokenized(bundle, "Größe", 6)
    assert (ids, sizes.tolist()) == (list("Größ".encode())[:6], [1] * 6)

    class Words:
        def encode(self, text: str) -> list[int]:
            return [len(word) for word in text.split()]

        def decode(self, ids: Sequence[int]) -> str:
            return "".join("é" * n for n in ids)

    monkeypatch.setattr(text_bits, "load_tokenizer", lambda folder, held: Words())
    words = type(bundle)(bundle.folder, {**bundle.manifest, "tokenizer": {"kind": "tokenizer.json"}})
    ids, sizes = tokenized(words, "ab c def", 2)
    assert (ids, sizes.tolist()) == ([2, 1], [4, 2])
    assert tokenized(words, "", 2).sizes.shape == (0,)
    none = type(bundle)(bundle.folder, {**bundle.manifest, "tokenizer": None})
    assert why_no_bits(none) == "has no tokenizer"
    with pytest.raises(InputError, match="no tokenizer"):
        tokenized(none, "ab", 2)


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_tokens_have_the_bytes_that_they_stand_for(kind: str, bundles: Bundles, tmp_path: Path) -> None:
    """Of GPT-2's kind, where a token may be a part of a character, and of Llama's, which loses the first space."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    text = "a word and another word, größere Wörter und Größen " * 9 + "自然言語 words"
    made = Tokenizer(models.BPE(unk_token="?"))
    if kind == "bytes":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
        alphabet = sorted(set(text))
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False, max_token_length=6)
    made.train_from_iterator([text], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    bundle = read_bundle(bundles("rope", "portable"))
    held = type(bundle)(tmp_path, {**bundle.manifest, "tokenizer": {"kind": "tokenizer.json"}})
    ids, sizes = tokenized(held, text, 400)
    assert len(set(sizes.tolist())) > 3
    assert (sizes >= 0).all()
    assert sizes.sum() == len(made.decode(ids).encode())
    whole = [len(made.decode(ids[: n + 1]).encode()) - len(made.decode(ids[:n]).encode()) for n in range(len(ids))]
    assert sum(a != b for a, b in zip(sizes.tolist(), whole, strict=True)) <= (8 if kind == "bytes" else 0)


def test_limits(bundles: Bundles) -> None:
    learned = read_bundle(bundles("learned", config={"max_position_embeddings": 64}))
    assert why_not(learned, 64) is None
    assert why_not(learned, 65) == "takes 64 tokens at most"
    with pytest.raises((ConfigError, InputError), match="64 positions"):
        window_bits(Session(learned, threads=1), WORDS[:65], 65)
    with pytest.raises(InputError, match="fewer than a window of 65"):
        window_bits(Session(learned, threads=1), WORDS[:64], 65)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    for name in ("b", "nothing"):
        with pytest.raises(InputError, match=f"{name} cannot be read as UTF-8"):
            read_text(tmp_path / name)
