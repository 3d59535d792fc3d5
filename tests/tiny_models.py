"""A tiny model of every family that transformers has: two layers or so, weights drawn so that positions matter.

``SIZES`` are set where a family's configuration has the name; ``FAMILIES`` adds what else it needs to be small, or to
be of use (a window that is reached, layers of each kind). A value of ``DEFAULT`` leaves the family's own.
"""

from __future__ import annotations

import contextlib
from typing import Any

import checkpoints
import torch
from checkpoints import TRAINED, VOCAB
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

WINDOW = 30
"""More than the 24 tokens on which the bridge proves itself."""
PARAMETERS = 20_000_000
"""More are no tiny model."""
DEFAULT = object()

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": TRAINED,
    "sliding_window": WINDOW,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": TRAINED,
    "d_model": 64,
    "ffn_dim": 96,
    "encoder_layers": 2,
    "encoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_ffn_dim": 96,
    "decoder_attention_heads": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "kv_lora_rank": 24,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

DECODER = {"is_decoder": True}
LATENT = {"num_key_value_heads": 4, "head_dim": DEFAULT}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
FULL = {"layer_types": ["full_attention", "full_attention"]}
LANGUAGES = {"languages": ["en"], "default_language": "en"}
GEMMA4 = {
    **SLIDING,
    "per_layer_config": {"01": {"head_dim": 32}},
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 900.0},
    },
}

FAMILIES: dict[str, dict[str, Any]] = {
    "axk1": {**LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "bart": DECODER,
    "blenderbot": DECODER,
    "blenderbot-small": DECODER,
    "mbart": DECODER,
    "pegasus": DECODER,
    "plbart": DECODER,
    "trocr": DECODER,
    "whisper": DECODER,
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {**DECODER, "attention_type": "original_full"},
    "camembert": DECODER,
    "codegen": {"rotary_dim": 8},
    "cohere2": SLIDING,
    "ctrl": {"dff": 96},
    "data2vec-text": DECODER,
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "electra": {**DECODER, "embedding_size": 32},
    "ernie": DECODER,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "exaone4": SLIDING,
    "falcon": {"head_dim": DEFAULT},
    "gpt_bigcode": {"num_key_value_heads": DEFAULT},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gemma3n_text": {
        **SLIDING,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {**GEMMA4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB},
    "gemma4_unified_text": GEMMA4,
    "glm4_moe_lite": {**LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["local", "global"], 1]], "window_size": WINDOW},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "gptj": {"rotary_dim": 8},
    "llama4_text": {
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 96,
        "attention_chunk_size": WINDOW,
        "floor_scale": 16,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0, 1, 0],
        "num_experts_per_tok": 1,
    },
    "longcat_flash": {
        **LATENT,
        "head_dim": 16,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "marian": {**DECODER, "decoder_vocab_size": VOCAB},
    "megatron-bert": DECODER,
    "minicpm3": {**LATENT, "dim_model_base": 32},
    "mistral": {},
    "modernbert-decoder": {"local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 300},
    "mvp": DECODER,
    "olmo3": SLIDING,
    "opt": {"word_embed_proj_dim": 64},
    "prophetnet": {
        "num_hidden_layers": DEFAULT,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "num_attention_heads": DEFAULT,
    },
    "rembert": {**DECODER, "input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": {**DECODER, "enable_pronunciation": False, "enable_shape": False},
    "roformer": {**DECODER, "embedding_size": 64},
    "cohere_compass_text": {
        **FULL,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
    },
    "dbrx": {
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": TRAINED,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 500.0, "clip_qkv": 4.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {**FULL, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "reformer": {
        **DECODER,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "attention_head_size": 16,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"v_head_dim": DEFAULT, "head_dim": DEFAULT},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention"] * 5 + ["hybrid"]},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention"] * 5 + ["hybrid"]},
    "xglm": {"num_layers": 2, "attention_heads": 4},
    "xlm": {"emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xlnet": {"d_inner": 96, "d_head": 16, "max_position_embeddings": DEFAULT},
    "xmod": {**DECODER, **LANGUAGES},
    "youtu": LATENT,
}
"""``model_type`` to what it needs beside SIZES."""


def config(model_type: str, **options: Any) -> Any:
    """The tiny configuration of a family, with options on top."""
    kind = CONFIG_MAPPING[model_type]
    values = {**_sizes(kind), **_parts(kind), **FAMILIES.get(model_type, {}), **options}
    return kind(**{k: v for k, v in values.items() if v is not DEFAULT})


def _sizes(kind: Any) -> dict[str, Any]:
    known = set(dir(kind))
    with contextlib.suppress(Exception):  # some have no default that is valid
        known |= set(kind().to_dict())
    aliases = set(getattr(kind, "attribute_map", {}))
    return {k: v for k, v in SIZES.items() if k in known and k not in aliases}


def _parts(kind: Any) -> dict[str, Any]:
    """The tiny configurations inside one of several modalities."""
    parts = {}
    with contextlib.suppress(Exception):
        default = kind()
        for name in kind.sub_configs:
            part = getattr(default, name)
            own = type(part)
            parts[name] = {**_sizes(own), **FAMILIES.get(own.model_type, {})}
            parts[name] = {k: v for k, v in parts[name].items() if v is not DEFAULT} | {"model_type": own.model_type}
    return parts


def build(model_type: str, seed: int = 0, gain: float = 1.5, **options: Any) -> PreTrainedModel:
    """The tiny model of a family. Raises what transformers raises where it cannot be built, ValueError for a size."""
    tiny = config(model_type, **options)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny).parameters())
    if count > PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f}M parameters")
    model = AutoModelForCausalLM.from_config(tiny, attn_implementation="eager").eval()
    checkpoints.draw(model, seed, gain)
    return model
