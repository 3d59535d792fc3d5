"""A T5 that has learnt to reverse strings answers in onnxruntime as in PyTorch, and fails without its bias."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import t5_task as task
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

import pe_onnx
from pe_onnx.generate import Model

STRINGS = 200
ROWS = 40
"""Strings of one batch, of 4 to 24 letters."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

HELD_OUT = task.held_out(STRINGS, seed=1)


@pytest.fixture(scope="module")
def model() -> T5ForConditionalGeneration:
    """What ``benchmarks/t5_task.py`` trains, in minutes, its weights rounded to float16."""
    weights = {name: x.float() for name, x in load_file(Path(__file__).parent / "t5_reversal.safetensors").items()}
    made = T5ForConditionalGeneration(T5Config(**task.SIZES))
    missing, unknown = made.load_state_dict(weights, strict=False)
    assert (sorted(missing), unknown) == (
        ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"],
        [],
    )
    assert all(made.get_parameter(name) is made.shared.weight for name in missing)
    return made.eval()


def test_the_training_learns() -> None:
    """A few steps of it: the loss of random letters is log(26) = 3.26, and the model is begun anew from its seed."""
    first, second = task.train(steps=40), task.train(steps=40)
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    batch = task.held_out(64, seed=2)
    source, answer = task.padded([task.source_of(x) for x in batch]), task.padded([task.answer_of(x) for x in batch])
    begun = torch.nn.functional.pad(answer[:, :-1], (1, 0), value=task.PAD)
    with torch.no_grad():
        logits = first(input_ids=source, attention_mask=(source != task.PAD).long(), decoder_input_ids=begun).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answer.flatten(), ignore_index=task.PAD)
    assert float(loss) < 3.6


def exported(model: T5ForConditionalGeneration, folder: Path, target: str) -> Model:
    model.save_pretrained(folder / "checkpoint")
    pe_onnx.export(model=folder / "checkpoint", output=folder / "bundle", target=target)
    return pe_onnx.load(folder / "bundle")


def answers(bundle: Model) -> list[list[int]]:
    """Greedy, in ragged batches."""
    given = []
    for begin in range(0, STRINGS, ROWS):
        sources = [task.source_of(letters) for letters in HELD_OUT[begin : begin + ROWS]]
        given += [row.tokens for row in bundle.generate(sources, max_new_tokens=task.LONGEST + 1)]
    return given


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_the_answers_are_those_of_pytorch_and_right(
    target: str, model: T5ForConditionalGeneration, tmp_path: Path
) -> None:
    given = answers(exported(model, tmp_path, target))
    assert given == task.answers(model, HELD_OUT)
    assert task.exact(given, HELD_OUT) >= 0.99


def test_without_its_relative_bias_it_fails(model: T5ForConditionalGeneration, tmp_path: Path) -> None:
    broken = copy.deepcopy(model)
    tables = [table for name, table in broken.named_parameters() if "relative_attention_bias" in name]
    assert len(tables) == 2
    with torch.no_grad():
        for table in tables:
            table.zero_()
    assert task.exact(answers(exported(broken, tmp_path, "ort")), HELD_OUT) < 0.5
