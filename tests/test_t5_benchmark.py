"""The contestants of ``benchmarks/t5.py`` compute the same, so that their times may be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import t5_contestants as contestants
import torch
from transformers import T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.t5 import modeling_t5

import pe_onnx

TINY = {"vocab_size": 97, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 3}
SOURCE = [5, 9, 11, 4, 33, 8, 1]
TOKENS = [0, 12, 7, 80, 3, 45, 9, 9, 2, 60, 31]
NEXT = 17
TOLERANCE = 5e-5
"""Of the logits' spread."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def model() -> T5ForConditionalGeneration:
    return contestants.small_model(**TINY)


@pytest.fixture(scope="module")
def past(model: T5ForConditionalGeneration) -> contestants.Past:
    return contestants.Eager(model).past_of(SOURCE, TOKENS)


@pytest.fixture(scope="module")
def wanted(model: T5ForConditionalGeneration) -> np.ndarray:
    """transformers without any cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([SOURCE]), decoder_input_ids=torch.tensor([[*TOKENS, NEXT]])).logits
    return logits[0, -1].numpy()


@pytest.fixture(scope="module")
def folder(model: T5ForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder / "checkpoint")
    pe_onnx.export(model=folder / "checkpoint", output=folder / "ours")
    contestants.export_rotated(folder / "checkpoint", folder / "rotated")
    contestants.export_stock(model, folder / "stock")
    return folder


def error(have: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(have - want).max() / want.std())


@pytest.mark.parametrize("name", ["ours", "eager", "stock"])
def test_a_step_is_that_of_transformers(
    name: str, folder: Path, model: T5ForConditionalGeneration, past: contestants.Past, wanted: np.ndarray
) -> None:
    contestant = {
        "ours": lambda: contestants.Ours(folder / "ours"),
        "eager": lambda: contestants.Eager(model),
        "stock": lambda: contestants.Stock(folder / "stock"),
    }[name]()
    contestant.begin(past)
    for _ in range(2):  # a step leaves the past as it was
        assert error(contestant.step(NEXT), wanted) < TOLERANCE
    assert error(contestant.step(NEXT + 1), wanted) > 0.1


def test_a_longer_past(folder: Path, model: T5ForConditionalGeneration, past: contestants.Past) -> None:
    """The stock graph was traced on other lengths."""
    longer = past.random(300, np.random.default_rng(0))
    three = [contestants.Ours(folder / "ours"), contestants.Eager(model), contestants.Stock(folder / "stock")]
    found = []
    for contestant in three:
        contestant.begin(longer)
        found.append(contestant.step(NEXT).copy())
    assert error(found[0], found[1]) < TOLERANCE
    assert error(found[2], found[1]) < TOLERANCE


def test_the_rotated_twin_is_t5_with_rotation(
    folder: Path, model: T5ForConditionalGeneration, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers' own eager attention, its queries and keys turned by Llama's function, without a cache."""
    plain = modeling_t5.eager_attention_forward

    def rotated(module, query, key, value, mask, position_bias=None, **others):  # type: ignore[no-untyped-def]
        if module.is_causal:
            D = query.shape[-1]
            angles = torch.arange(query.shape[2])[:, None] * contestants.THETA ** (-torch.arange(0, D, 2) / D)
            angles = torch.cat((angles, angles), -1)[None]  # [1, T, D]
            query, key = apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
            position_bias = None
        return plain(module, query, key, value, mask, position_bias=position_bias, **others)

    monkeypatch.setattr(modeling_t5, "eager_attention_forward", rotated)
    for part in (model, model.get_encoder(), model.get_decoder()):
        monkeypatch.setattr(part.config, "_attn_implementation_internal", "eager")
    with torch.no_grad():
        want = model(input_ids=torch.tensor([SOURCE]), decoder_input_ids=torch.tensor([[*TOKENS, NEXT]])).logits
    cache = pe_onnx.load(folder / "rotated").cache(1, 32, sources=[SOURCE])
    first = cache.prefill([TOKENS])[0].copy()
    assert error(first, want[0, -2].numpy()) < TOLERANCE
    assert error(cache.decode([NEXT])[0], want[0, -1].numpy()) < TOLERANCE
    assert error(wanted, want[0, -1].numpy()) > 0.1
