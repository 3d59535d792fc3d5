"""Packages in onnxruntime-genai: the bundle's own files, target ort with a shared key and value buffer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import pytest
from conftest import Bundles

import pe_onnx
from pe_onnx.errors import ConfigError
from pe_onnx.packager import package
from pe_onnx.packages import Options
from pe_onnx.quantization import quantize

ENCODINGS = ("rope", "t5_bias", "alibi", "learned", "none", "sinusoidal")
PROMPT, NEW = 20, 64
CONTEXT = 256
UNTIED = {"tie_word_embeddings": False}
"""A tied head on random weights answers with the last token of the prompt, whatever the encoding."""
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["hello", " a  b\n\t", "Grüße 🙂 東京", "it's 1234 \r\n x"]


def prompt() -> list[int]:
    return np.random.default_rng(0).integers(1, 256, PROMPT).tolist()


def run_genai(folder: Path, tokens: list[int], new: int = NEW) -> tuple[list[int], np.ndarray]:
    """New tokens, without the one that ends a text, and the logits ``[NEW, V]`` each was chosen by."""
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(tokens) + new)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array(tokens, np.int32))
    logits = []
    while not generator.is_done():
        logits.append(generator.get_logits().reshape(-1).copy())
        generator.generate_next_token()
    sequence = [int(token) for token in generator.get_sequence(0)]
    assert sequence[: len(tokens)] == tokens
    return sequence[len(tokens) :], np.stack(logits)


def run_ours(bundle: Path) -> tuple[list[int], np.ndarray]:
    cache = pe_onnx.load(bundle).cache(1, PROMPT + NEW)
    logits = [cache.prefill([prompt()])[0].copy()]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < NEW:
        logits.append(cache.decode(tokens[-1:])[0].copy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, np.stack(logits)


def compare(bundle: Path, folder: Path, tolerance: float = 1e-4) -> None:
    """Package, run, and compare tokens and logits with ours."""
    ours, our_logits = run_ours(bundle)
    assert len(set(ours)) > NEW // 4  # one token over and over would agree under any encoding
    assert pe_onnx.load(bundle).generate(prompt(), NEW, ignore_eos=True, max_length=PROMPT + NEW).tokens == ours
    unused = next(token for token in range(256) if token not in ours)
    package(bundle, "genai", folder, Options(eos=(unused,), context=CONTEXT))
    assert (folder / "model.onnx").samefile(bundle / "model.onnx")
    theirs, their_logits = run_genai(folder, prompt())
    assert theirs == ours
    assert np.abs(their_logits - our_logits).max() / our_logits.std() < tolerance


FAST = ("rope", "t5_bias", "none")


@pytest.mark.parametrize("encoding", [pytest.param(e, marks=() if e in FAST else pytest.mark.slow) for e in ENCODINGS])
def test_same_tokens_and_logits(encoding: str, bundles: Bundles, tmp_path: Path) -> None:
    compare(bundles(encoding, "ort", preset="tiny", config=UNTIED), tmp_path / "g")
    search = json.loads((tmp_path / "g" / "genai_config.json").read_text())["search"]
    assert search["past_present_share_buffer"] is True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "target", "options"),
    [
        ("alibi", "portable", {}),
        ("rope", "ort", {"dtype": "fp16"}),
        ("rope_dynamic", "ort", {"config": {**UNTIED, "max_position_embeddings": 40}}),
        ("rope", "ort", {"config": {**UNTIED, "num_key_value_heads": 2, "head_dim": 32}}),
    ],
    ids=["portable", "half", "depends on its run", "grouped"],
)
def test_other_bundles(encoding: str, target: str, options: dict[str, Any], bundles: Bundles, tmp_path: Path) -> None:
    tolerance = 5e-3 if "dtype" in options else 1e-4
    compare(bundles(encoding, target, **{"preset": "tiny", "config": UNTIED, **options}), tmp_path / "g", tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"cache": "int8", "bits": None}, {"bits": 4}], ids=str)
def test_rounded_bundles(options: dict[str, Any], bundles: Bundles, tmp_path: Path) -> None:
    quantize(bundles("rope", "ort", preset="tiny", config=UNTIED), tmp_path / "q", **options)
    compare(tmp_path / "q", tmp_path / "g", 1e-3)


def test_it_stops_where_the_text_ends(bundles: Bundles, tmp_path: Path) -> None:
    """At the given id, before it; where none is given genai would end a text at 0."""
    bundle = bundles("rope", "ort", preset="tiny", config=UNTIED)
    ours, _ = run_ours(bundle)
    end = next(token for i, token in enumerate(ours) if i > 4 and token not in ours[:i])
    package(bundle, "genai", tmp_path / "g", Options(eos=(end,), context=CONTEXT))
    assert run_genai(tmp_path / "g", prompt())[0] == ours[: ours.index(end)]
    with pytest.raises(ConfigError, match="names none: give --eos ID"):
        package(bundle, "genai", tmp_path / "h")


def test_texts_are_bytes(bundles: Bundles, tmp_path: Path) -> None:
    package(bundles("rope", "ort", preset="tiny", config=UNTIED), "genai", tmp_path / "g", Options(eos=(0,)))
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(tmp_path / "g")))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("encodings", [FAST, pytest.param(ENCODINGS, marks=pytest.mark.slow)])
def test_encodings_give_different_tokens(encodings: tuple[str, ...], bundles: Bundles) -> None:
    """The twin: with the encoding switched off, or another in its place, the comparison above fails."""
    results = {name: run_ours(bundles(name, "ort", preset="tiny", config=UNTIED)) for name in encodings}
    for a in encodings:
        for b in encodings:
            if a < b:
                assert results[a][0] != results[b][0], (a, b)
                error = np.abs(results[a][1][0] - results[b][1][0]).max() / results[a][1].std()
                assert error > 1e-2, (a, b, error)


@pytest.mark.slow
def test_smollm2(smollm2_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    """Its tokenizer and chat template too, and the end of its answer."""
    bundle = smollm2_bundles("ort")
    package(bundle, "genai", tmp_path / "g", Options(context=512))
    ours = pe_onnx.load(bundle, verify=False)
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(tmp_path / "g")))
    chat = ours.tokenizer.apply_chat_template(CHAT)
    assert tokenizer.apply_chat_template(json.dumps(CHAT), add_generation_prompt=True) == chat
    for text in (*TEXTS, chat):
        ids = tokenizer.encode(text)
        assert ids.tolist() == ours.tokenizer.encode(text, False)
        assert tokenizer.decode(ids) == ours.tokenizer.decode(ids.tolist())
    for text in (chat, "The capital of France is"):
        tokens = ours.tokenizer.encode(text, False)
        want = ours.generate(tokens, NEW).tokens
        theirs, _ = run_genai(tmp_path / "g", tokens)
        assert theirs == [token for token in want if token not in ours.tokenizer.eos_token_ids]
        assert "Paris" in ours.tokenizer.decode(theirs)
