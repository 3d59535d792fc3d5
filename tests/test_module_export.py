"""A module of a user's own: what it is exported for, and arguments that belong to something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pe_onnx
from pe_onnx.errors import ConfigError, ExportError
from pe_onnx.models.attention import cached_step


class Own(nn.Module):
    """A module of a user's for one target."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.embedding, self.head = nn.Embedding(16, 32), nn.Linear(32, 16)

    def forward(self, input_ids, attention_mask, position_ids, past_key_values):  # type: ignore[no-untyped-def]
        step = cached_step(self.target, attention_mask, input_ids.shape[1], past_key_values)
        x = self.embedding(input_ids)
        x = x + step.attend(0, x, x, x, num_heads=2, kv_heads=2, scale=0.25)
        return self.head(x), step.presents


SIZES = {"layers": 1, "kv_heads": 2, "head_size": 16}


@pytest.mark.parametrize(("target", "other"), [("ort", "portable"), ("portable", "ort")])
def test_a_module_for_the_other_target_is_refused(target: str, other: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"which is for target '{target}'"):
        pe_onnx.export(Own(target), tmp_path / "b", target=other, **SIZES)
    assert not (tmp_path / "b").exists()


def test_half_precision_leaves_the_callers_module_alone(tmp_path: Path) -> None:
    module = Own("ort").train()
    pe_onnx.export(module, tmp_path / "b", dtype="fp16", **SIZES)
    assert module.head.weight.dtype == torch.float32
    assert len(pe_onnx.load(tmp_path / "b").generate([1, 2, 3], 5).tokens) == 5


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    module = Own("ort")
    nn.init.constant_(module.head.weight, 1e5)
    with pytest.raises(ConfigError, match=r"cannot hold module.head.weight: its greatest weight is 1e\+05"):
        pe_onnx.export(module, tmp_path / "b", dtype="fp16", **SIZES)


@pytest.mark.parametrize(
    "call",
    [
        lambda out: pe_onnx.export(encoding="none", layers=7, output=out),
        lambda out: pe_onnx.export(model="x", preset="tiny", output=out),
        lambda out: pe_onnx.export(Own("ort"), out, config={"norm": "layer"}, **SIZES),
    ],
)
def test_an_argument_of_another_kind_is_refused(call: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is for"):
        call(tmp_path / "b")


class Branching(Own):
    """Takes another way for prompts of more than 100 tokens, which no trace of a few tokens sees."""

    def forward(self, input_ids, attention_mask, position_ids, past_key_values):  # type: ignore[no-untyped-def]
        logits, presents = super().forward(input_ids, attention_mask, position_ids, past_key_values)
        return (-logits if input_ids.shape[1] > 100 else logits), presents


def test_a_branch_on_the_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"takes another way where a size .* is more than 100"):
        pe_onnx.export(Branching("ort"), tmp_path / "b", **SIZES)
    assert not (tmp_path / "b").exists()


class Selecting(Own):
    """Works on the positions that a mask picks, whose number nobody knows before the run (X-MOD's adapters)."""

    def forward(self, input_ids, attention_mask, position_ids, past_key_values):  # type: ignore[no-untyped-def]
        logits, presents = super().forward(input_ids, attention_mask, position_ids, past_key_values)
        picked = input_ids > 3
        changed = logits.clone()
        changed[picked] = 2 * logits[picked]
        return changed, presents


def test_a_number_of_picked_positions_is_no_branch(tmp_path: Path) -> None:
    pe_onnx.export(Selecting("ort"), tmp_path / "b", **SIZES, logits="all")
    assert (tmp_path / "b" / "model.onnx").exists()
