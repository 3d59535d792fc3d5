"""What the tests' command lines name: bundles, and checkpoints with one thing wrong each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from conftest import Bundles
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)


def write(root: Path, bundles: Bundles) -> dict[str, str]:
    """Name, as a command line has it in braces, to what stands in its place; the checkpoints are written below root."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    bart = BartConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
    )
    BartForConditionalGeneration(bart).save_pretrained(root / "bart")
    MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(
        root / "mamba"
    )
    weights = load_file(root / "llama" / "model.safetensors")

    def variant(name: str) -> Path:
        shutil.copytree(root / "llama", root / name)
        return root / name

    def with_weights(name: str, changed: dict[str, torch.Tensor | None]) -> None:
        kept = {key: value for key, value in {**weights, **changed}.items() if value is not None}
        save_file(kept, variant(name) / "model.safetensors", metadata={"format": "pt"})

    with_weights("missing_weight", {"model.layers.1.self_attn.q_proj.weight": None})
    with_weights("extra_weight", {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with_weights("other_shape", {"model.norm.weight": torch.zeros(65)})
    content = (root / "llama" / "model.safetensors").read_bytes()
    for name, length in (("truncated", len(content) // 2), ("header_only", 100), ("empty_weights", 0)):
        (variant(name) / "model.safetensors").write_bytes(content[:length])
    (variant("no_weights") / "model.safetensors").unlink()
    (variant("bad_json") / "config.json").write_text("{nope")
    (variant("bad_vocabulary") / "vocab.json").write_text("{nope")
    values = json.loads((root / "llama" / "config.json").read_text())
    (variant("unknown_family") / "config.json").write_text(json.dumps({**values, "model_type": "nonesuch"}))
    (root / "no_config").mkdir()
    shutil.copytree(bundles("rope"), root / "corrupted")
    model = bytearray((root / "corrupted" / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (root / "corrupted" / "model.onnx").write_bytes(model)
    return {
        **{path.name: str(path) for path in root.iterdir()},
        "rope": str(bundles("rope")),
        "learned": str(bundles("learned", config={"max_position_embeddings": 32})),
        "no_tokenizer": str(bundles("rope", config={"vocab_size": 300})),
        "long_name": "x" * 300,
        "nine": "9" * 30,
        "a33": "a" * 33,
    }
