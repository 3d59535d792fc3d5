"""Keys about positions in a checkpoint's config.json: read with their origin, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pe_onnx
from pe_onnx.errors import CheckpointError, ConfigError
from pe_onnx.models.attention import cached_step
from pe_onnx.models.encoding_config import read_encoding


def llama(**config: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40, **config))


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "original_max_position_embeddings": 64}


def test_origins_tell_the_file_from_the_default() -> None:
    model = llama(rope_parameters=YARN)
    name, parameters, limit = read_encoding(model, {"rope_parameters": YARN})
    assert (name, limit) == ("rope", None)
    assert parameters["rope_theta"] == {"value": 5e5, "origin": "config.json"}
    assert parameters["factor"]["origin"] == "config.json"
    plain = read_encoding(llama(), {})[1]
    assert plain["rope_theta"] == {"value": 10000.0, "origin": "transformers' default"}
    old = read_encoding(llama(), {"rope_theta": 10000.0, "rope_scaling": None})[1]
    assert old["rope_theta"]["origin"] == "config.json"


def test_gpt2_has_a_hard_limit() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=48)
    name, parameters, limit = read_encoding(GPT2LMHeadModel(config), {"n_positions": 48})
    assert (name, limit) == ("learned", 48)
    assert parameters["max_position_embeddings"] == {"value": 48, "origin": "config.json"}


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({"alibi": True}, "'alibi'"),
        ({"no_rope_layers": [0]}, "'no_rope_layers'"),
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type'"),
        ({"rotary_dim": 8}, "'rotary_dim'"),
        ({"sliding_window": 16}, "'sliding_window'"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(raw: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        read_encoding(llama(), raw)


def test_a_key_that_is_switched_off_is_let_through() -> None:
    assert read_encoding(llama(), {"rope_interleaved": False, "alibi": None})[0] == "rope"


def test_a_misspelt_scaling_key_is_refused_with_the_nearest() -> None:
    model = llama(rope_parameters={**YARN, "beta_fst": 8})
    with pytest.raises(CheckpointError, match=r"'beta_fst'.*did you mean 'beta_fast'"):
        read_encoding(model, {})
    with pytest.raises(CheckpointError, match="nothing reads 'factor' for rope_type 'default'"):
        read_encoding(llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "factor": 4.0}), {})


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
