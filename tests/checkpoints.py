"""Tiny random checkpoints in transformers' own format, with weights drawn so that positions matter.

Scores of order 1 (queries and keys of std 1.5), embeddings of std 1, norms near 1: with the usual std of 0.02 softmax
is near uniform and a wrong encoding passes. The numbers depend on the seed and on the shapes only, so that two
configurations of the same shapes have the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
TRAINED = 131
"""max_position_embeddings: a prime that no other size in these models has."""

SCORES = ("q_proj", "k_proj", "qkv_proj", "c_attn", "query_key_value")
INTO_RESIDUAL = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")

Edit = Callable[[dict[str, Any]], None]


def sizes(model_type: str) -> dict[str, Any]:
    """Small sizes under the names that a family's configuration has."""
    wanted = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": TRAINED,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": TRAINED,
        "num_local_experts": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    default = CONFIG_MAPPING[model_type]()
    aliases = set(getattr(default, "attribute_map", {}))
    return {name: value for name, value in wanted.items() if hasattr(default, name) and name not in aliases}


@torch.no_grad()
def draw(model: PreTrainedModel, seed: int = 0, gain: float = 1.5) -> None:
    """gain: std of queries and keys."""
    generator = torch.Generator().manual_seed(seed)
    branches = 2 * model.config.get_text_config(decoder=True).num_hidden_layers
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if not parameter.requires_grad:  # a fixed table
            continue
        if parameter.dim() == 1:
            is_norm = name.endswith("weight")
            parameter.copy_(0.1 * values + (1.0 if is_norm else 0.0))
        elif any(part in name for part in ("embed", "wte", "wpe")):
            parameter.copy_(values)
        else:
            transposed = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
            fan_in = parameter.shape[0] if transposed else parameter.shape[-1]
            scale = gain if any(part in name for part in SCORES) else 1.0
            scale = branches**-0.5 if any(part in name for part in INTO_RESIDUAL) else scale
            parameter.copy_(scale * fan_in**-0.5 * values)


def write(
    folder: Path,
    model_type: str,
    edit: Edit | None = None,
    seed: int = 0,
    gain: float = 1.5,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Save a checkpoint. edit: changes config.json afterwards, to write what older versions wrote."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**sizes(model_type), **config}))
    draw(model, seed, gain)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if edit is not None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))
    return folder


def oracle(folder: Path, attention: str = "eager", **options: Any) -> PreTrainedModel:
    """transformers' own model, loaded by transformers alone."""
    options = {"dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **options).eval()
