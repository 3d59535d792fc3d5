"""A bundle of target ort in onnxruntime-genai, file for file as it was written, with a shared key and value buffer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime_genai
import pytest

import pe_onnx
from pe_onnx.bundle import read_bundle

ENCODINGS = ("rope", "t5_bias", "alibi", "learned", "none", "sinusoidal")
PROMPT, NEW = 20, 48
UNTIED = {"tie_word_embeddings": False}
"""A tied head on random weights answers with the last token of the prompt, whatever the encoding."""

Bundles = Callable[..., Path]


def prompt() -> list[int]:
    return np.random.default_rng(0).integers(1, 256, PROMPT).tolist()


def link(bundle: Path, folder: Path, unused_token: int) -> Path:
    """Hard links of the bundle's files beside a minimal genai_config.json."""
    folder.mkdir()
    for path in bundle.iterdir():
        os.link(path, folder / path.name)
    read, config = read_bundle(bundle), json.loads((bundle / "config.json").read_text())
    pasts = {kind: f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    presents = {kind: f"present.%d.{kind}" for kind in ("key", "value")}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": read.caches[0][1],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": read.caches[0][0],
        "num_hidden_layers": len(read.caches),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": pasts["key"],
            "past_value_names": pasts["value"],
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": presents["key"],
            "present_value_names": presents["value"],
        },
    }
    model = {
        "type": "decoder",
        "bos_token_id": unused_token,
        "eos_token_id": unused_token,  # must be in the vocabulary
        "pad_token_id": unused_token,
        "vocab_size": read.shape["vocab_size"],
        "context_length": 256,
        "decoder": decoder,
    }
    search = {"max_length": PROMPT + NEW, "do_sample": False, "past_present_share_buffer": True}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": search}))
    return folder


def run_genai(folder: Path) -> tuple[list[int], np.ndarray]:
    """New tokens, and the logits ``[NEW, V]`` each was chosen by."""
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=PROMPT + NEW, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt(), np.int32))
    logits = []
    while not generator.is_done():
        logits.append(generator.get_logits().reshape(-1).copy())
        generator.generate_next_token()
    sequence = [int(token) for token in generator.get_sequence(0)]
    assert sequence[:PROMPT] == prompt()
    return sequence[PROMPT:], np.stack(logits)


def run_ours(bundle: Path) -> tuple[list[int], np.ndarray]:
    cache = pe_onnx.load(bundle).cache(1, PROMPT + NEW)
    logits = [cache.prefill([prompt()])[0].copy()]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < NEW:
        logits.append(cache.decode(tokens[-1:])[0].copy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, np.stack(logits)


FAST = ("rope", "t5_bias", "none")


@pytest.mark.parametrize("encoding", [pytest.param(e, marks=() if e in FAST else pytest.mark.slow) for e in ENCODINGS])
def test_same_tokens_and_logits(encoding: str, bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles(encoding, "ort", preset="tiny", config=UNTIED)
    ours, our_logits = run_ours(bundle)
    assert len(set(ours)) > NEW // 4  # one token over and over would agree under any encoding
    assert pe_onnx.load(bundle).generate(prompt(), NEW, ignore_eos=True).tokens == ours
    unused = next(token for token in range(256) if token not in ours)
    folder = link(bundle, tmp_path / "genai", unused)
    assert (folder / "model.onnx").samefile(bundle / "model.onnx")
    theirs, their_logits = run_genai(folder)
    assert theirs == ours
    assert np.abs(their_logits - our_logits).max() / our_logits.std() < 1e-4


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
