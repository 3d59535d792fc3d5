"""Encoder-decoders of the T5 kind with random weights, drawn so that positions matter, as checkpoints.

T5 does not scale its scores: queries and keys are drawn so that these have a standard deviation of 2, and the tables
of the relative bias one of 1.5, far above the usual 0.02 under which a wrong bias passes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 80,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
ENDS = [1, *range(5, 17)]
"""So many end tokens that sources end at different steps."""
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {}),
    "t5_v1_1": ("t5", GATED),
    "flan_untied": ("t5", {**GATED, "untied": True}),
    "mt5": ("mt5", GATED),
    "umt5": ("umt5", GATED),
    "byt5": ("t5", {**GATED, "vocab_size": 384, "num_layers": 4, "num_decoder_layers": 1}),
    "deep_decoder": ("t5", {"num_layers": 1, "num_decoder_layers": 3}),
    "few_buckets": ("t5", {"relative_attention_num_buckets": 10, "relative_attention_max_distance": 20}),
    "odd_buckets": ("umt5", {"relative_attention_num_buckets": 13, "relative_attention_max_distance": 300}),
    "odd_heads": ("t5", {"d_kv": 24, "num_heads": 5, "d_model": 40}),
}
"""Name to model_type and configuration; ``untied``: a head of its own."""

REALISTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "t5_small": ("t5", {"vocab_size": 4096, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}),
    "mt5_small": (
        "mt5",
        {**GATED, "vocab_size": 4096, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    ),
    "umt5_small": (
        "umt5",
        {**GATED, "vocab_size": 4096, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    ),
    "byt5_small": (
        "t5",
        {
            **GATED,
            "vocab_size": 384,
            "d_model": 1472,
            "d_kv": 64,
            "d_ff": 3584,
            "num_layers": 12,
            "num_decoder_layers": 4,
            "num_heads": 6,
        },
    ),
}
"""The published sizes, but for vocabularies of 32,128 and 250,112."""


def build(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The model of a variant, in evaluation."""
    model_type, own = {**VARIANTS, **REALISTIC}[name]
    base = {key: x for key, x in TINY.items() if name in VARIANTS or key.endswith("_id")}
    values = {**base, **own, **changes}
    untied = values.pop("untied", False)
    config = CONFIG_MAPPING[model_type](**values)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    draw(model, seed)
    return model.eval()


@torch.no_grad()
def draw(model: PreTrainedModel, seed: int = 0) -> None:
    """Scores of standard deviation 2, biases of 1.5."""
    generator = torch.Generator().manual_seed(seed)
    D, layers = model.config.d_kv, model.config.num_layers
    score = (2 / D**0.5) ** 0.5
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter.shape[-1] ** -0.5
        if parameter.dim() == 1:
            parameter.copy_(1 + 0.1 * values)
        elif "relative_attention_bias" in name:
            parameter.copy_(1.5 * values)
        elif "shared" in name or "embed_tokens" in name:
            parameter.copy_(values)
        elif name.endswith((".q.weight", ".k.weight")):
            parameter.copy_(score * fan_in * values)
        elif name.endswith((".o.weight", ".wo.weight")):
            parameter.copy_((3 * layers) ** -0.5 * fan_in * values)
        else:
            parameter.copy_((3.0 if "lm_head" in name else 1.0) * fan_in * values)


def write(folder: Path, name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A checkpoint folder, and its model."""
    model = build(name, seed, **changes)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
