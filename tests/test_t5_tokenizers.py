"""Tokenizers of encoder-decoder checkpoints: bytes, Unigram, a file that cannot be read, none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import t5_models
import torch
from conftest import Bundles
from transformers import ByT5Tokenizer, T5Tokenizer

import pe_onnx
from pe_onnx.beam_search import BeamOptions
from pe_onnx.errors import CheckpointError, InputError
from pe_onnx.models import byte_tokenizer
from pe_onnx.tokenizer import TextStream, Tokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

BYTES = ByT5Tokenizer()
WORDS = ["the", "house", "is", "wonderful", "cat", "sat", "mat", "über", "Straße", "translate", "to", "German"]
SENTINELS = 20

TEXTS = [
    "",
    "a line of ASCII, with\ttabs\nand ends ",
    " spaces  around ",
    "Grüße, Straße: äöü ß",
    "emoji 😀 and 👩‍👩‍👧 and \U0001f1e9\U0001f1ea",
    "日本語 العربية",
    "\x00\x01\x7f\xa0\xad\xff",
    "<extra_id_0>",
    "a <extra_id_0> b<extra_id_1><extra_id_124>",
    "  <extra_id_7>  ",
    "<extra_id_125> <extra_id_> <extra",
    "<pad>",
    " x <unk> y",
    "a </s> b",
    "aü😀 " * 2500,
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer.convert(BYTES).save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, {"kind": "tokenizer.json"})


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:16]))
def test_bytes_are_the_ids_of_transformers(text: str, byte_level: Tokenizer) -> None:
    ids = BYTES(text).input_ids
    assert byte_level.encode(text) == ids
    assert byte_level.encode(text, add_special_tokens=False) == BYTES(text, add_special_tokens=False).input_ids
    assert byte_level.decode(ids) == BYTES.decode(ids, skip_special_tokens=True)
    assert byte_level.decode(ids, skip_special_tokens=False) == BYTES.decode(ids)


def test_every_byte_has_its_token(byte_level: Tokenizer) -> None:
    points = [*range(0x800), *range(0x800, 0xD800, 37), *range(0xE000, 0x110000, 37)]
    text = "".join(map(chr, points))
    assert len(set(text.encode())) == 256 - 13, "all but those that UTF-8 never has"
    ids = byte_level.encode(text, add_special_tokens=False)
    assert ids == [byte + 3 for byte in text.encode()]
    assert byte_level.decode(ids) == text


def test_bytes_arrive_as_whole_characters(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level)
    ids = [0, *byte_level.encode("ü <extra_id_3>😀")]
    assert [piece for piece in map(stream.push, ids) if piece] == ["ü", " ", "😀"]
    assert stream.finish() == ""


def test_what_differs_from_transformers(byte_level: Tokenizer) -> None:
    half = [0xC3 + 3, ord("x") + 3]
    assert byte_level.decode(half) == "\ufffdx"
    assert BYTES.decode(half) == "x"
    assert byte_level.encode("x</s>") == [*BYTES("x</s>").input_ids, 1]


def test_a_byt5_checkpoint_answers_as_transformers_does(tmp_path: Path) -> None:
    reference = t5_models.write(tmp_path / "c", "byt5", untied=True)
    BYTES.save_pretrained(tmp_path / "c")
    bundle = pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", target="ort", verify=False)
    assert bundle.manifest["tokenizer"] == {"kind": "tokenizer.json"}
    sources = ["translate: <extra_id_0> Häuser", "x", ""]
    inputs = BYTES(sources, padding=True, return_tensors="pt")
    made = reference.generate(**inputs, max_new_tokens=16)
    model = pe_onnx.load(tmp_path / "b")
    for row, result in zip(made.tolist(), model.generate(sources, 16), strict=True):
        assert result.tokens == row[1 : len(result.tokens) + 1]
        kept = [token for token in result.tokens if 3 <= token < 259]
        assert result.text == bytes(token - 3 for token in kept).decode(errors="replace")
    assert model.generate("x", 1).prompt_tokens == 2


def unigram() -> T5Tokenizer:
    """As a T5's: special tokens first, pieces, sentinels from the last on."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS] + [(word[-2:], -6.0) for word in WORDS[:4]]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyzäöüß.,:"]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return T5Tokenizer(vocab=pieces, extra_ids=SENTINELS)


@pytest.fixture(scope="module")
def unigram_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, T5Tokenizer, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("unigram")
    tokenizer = unigram()
    model = t5_models.write(folder / "c", "flan_untied", vocab_size=len(tokenizer), seed=10)
    tokenizer.save_pretrained(folder / "c")
    pe_onnx.export(model=folder / "c", output=folder / "b", target="ort", verify=False)
    return folder / "b", tokenizer, model


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the house  is wonderful.",
        " über <extra_id_0> Straße: <extra_id_19>",
        "日 the",
        "a\nb",
        "</s> a",
        "cat " * 2500,
    ],
    ids=lambda text: repr(text[:16]),
)
def test_unigram_is_that_of_transformers(text: str, unigram_bundle: tuple[Path, T5Tokenizer, torch.nn.Module]) -> None:
    folder, theirs, _ = unigram_bundle
    ours = load_tokenizer(folder, {"kind": "tokenizer.json"})
    ids = theirs(text).input_ids
    assert ids[-1] == 1
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("beams", [1, 4])
def test_unigram_text_is_that_of_transformers(
    beams: int, unigram_bundle: tuple[Path, T5Tokenizer, torch.nn.Module]
) -> None:
    folder, theirs, reference = unigram_bundle
    sources = ["translate English to German: the house is wonderful", "a cat", "über <extra_id_0>."]
    inputs = theirs(sources, padding=True, return_tensors="pt")
    made = reference.generate(**inputs, max_new_tokens=20, num_beams=beams)  # type: ignore[operator]
    texts = theirs.batch_decode(made, skip_special_tokens=True)
    results = pe_onnx.load(folder).generate(sources, 20, beams=BeamOptions(beams))
    assert [result.text for result in results] == texts
    first = [theirs.convert_ids_to_tokens(result.tokens[0]) for result in results]
    assert any(token.startswith("▁") for token in first), first
    assert not any(text.startswith(" ") or "<" in text for text in texts)


@pytest.mark.parametrize("ends", [pytest.param(1, marks=pytest.mark.slow), [1, 40]])
def test_end_tokens_are_those_of_the_configuration(ends: int | list[int], tmp_path: Path) -> None:
    reference = t5_models.build("flan_untied", seed=1)
    first = reference.generate(torch.tensor([[5, 9, 1]]), max_new_tokens=8)[0, 1:].tolist()
    if isinstance(ends, list):
        ends = [1, first[3]]
    reference.generation_config.eos_token_id = ends
    reference.save_pretrained(tmp_path / "c")
    pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", target="portable", verify=False)
    model = pe_onnx.load(tmp_path / "b")
    assert model.tokenizer.eos_token_ids == {*(ends if isinstance(ends, list) else [ends])}
    wanted = reference.generate(torch.tensor([[5, 9, 1]]), max_new_tokens=8)[0, 1:].tolist()
    result = model.generate([5, 9, 1], 8)
    assert result.tokens == wanted
    assert (result.finish_reason == "stop") == isinstance(ends, list)


def test_a_sentencepiece_file_names_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    t5_models.write(tmp_path / "c", "flan_untied")
    (tmp_path / "c" / "spiece.model").write_bytes(b"\n\x0e\n\x05<pad>\x15")
    with pytest.raises(CheckpointError, match=r"spiece\.model .*: pip install sentencepiece") as caught:
        pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", target="ort")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_without_a_tokenizer_token_ids_do(t5_bundles: Bundles) -> None:
    model = pe_onnx.load(t5_bundles("flan_untied", "ort", eos_token_id=t5_models.ENDS))
    assert len(model.generate([5, 6, 7], 4, ignore_eos=True).tokens) == 4
    with pytest.raises(InputError, match="no tokenizer: give token ids"):
        model.generate("text", 4)
