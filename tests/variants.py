"""The checkpoints that are exported and compared, token by token, with transformers: name to family and options."""

from __future__ import annotations

from typing import Any

from tiny_models import FULL, SLIDING, WINDOW


def rope(kind: str, theta: float = 500.0, **others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **others}}


def old_rope(kind: str, theta: float = 500.0, **others: Any) -> dict[str, Any]:
    """As transformers wrote it before version 5."""
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **others}}


def by_layer(full: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_theta": 900.0, **full},
        }
    }


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
QWEN2_WINDOW = {"use_sliding_window": True, "max_window_layers": 1}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", rope("default")),
    "llama_bias": ("llama", {**rope("default"), "attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("llama", rope("linear", factor=4.0)),
    "llama_linear_old": ("llama", old_rope("linear", factor=4.0)),
    "llama_dynamic": ("llama", rope("dynamic", factor=2.0)),
    "llama_dynamic_old": ("llama", old_rope("dynamic", factor=2.0)),
    "llama_yarn": ("llama", rope("yarn", **YARN)),
    "llama_yarn_old": ("llama", old_rope("yarn", **YARN)),
    "llama_yarn_truncate": ("llama", rope("yarn", **YARN, truncate=False)),
    "llama_yarn_factor": ("llama", rope("yarn", **YARN, attention_factor=1.4)),
    "llama_yarn_mscale": ("llama", rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.5)),
    "llama_yarn_factor_1": ("llama", rope("yarn", factor=1.0, original_max_position_embeddings=131)),
    "llama_longrope": ("llama", rope("longrope", **LONG)),
    "llama_longrope_old": ("llama", old_rope("longrope", **LONG)),
    "llama_llama3": ("llama", rope("llama3", **LLAMA3)),
    "llama_llama3_old": ("llama", old_rope("llama3", **LLAMA3)),
    "mistral": ("mistral", rope("default")),
    "qwen2": ("qwen2", rope("default")),
    "qwen2_window": ("qwen2", {**rope("default"), **QWEN2_WINDOW}),
    "qwen3": ("qwen3", {**rope("default"), "head_dim": 32}),
    "qwen3_dynamic": ("qwen3", rope("dynamic", factor=2.0)),
    "gemma": ("gemma", rope("default")),
    "gemma2": ("gemma2", {**rope("default"), "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3_text": ("gemma3_text", by_layer({"rope_type": "linear", "factor": 8.0}) | {"query_pre_attn_scalar": 5}),
    "gemma4_text": ("gemma4_text", {}),
    "phi": ("phi", rope("default", partial_rotary_factor=0.5)),
    "phi3": ("phi3", rope("default")),
    "phi3_longrope": ("phi3", rope("longrope", **LONG) | {"original_max_position_embeddings": 32}),
    "smollm3": ("smollm3", {**rope("default"), "no_rope_layers": [1, 0]}),
    "llama4_text": ("llama4_text", rope("default")),
    "olmo2": ("olmo2", rope("default")),
    "olmo3": ("olmo3", {**SLIDING}),
    "granite": ("granite", {**rope("default"), "attention_multiplier": 0.4, "embedding_multiplier": 3.0}),
    "stablelm": ("stablelm", rope("default", partial_rotary_factor=0.25)),
    "starcoder2": ("starcoder2", rope("default")),
    "nemotron": ("nemotron", rope("default", partial_rotary_factor=0.5)),
    "persimmon": ("persimmon", rope("default", partial_rotary_factor=0.5)),
    "cohere": ("cohere", rope("default")),
    "cohere2": ("cohere2", rope("default")),
    "glm": ("glm", rope("default", partial_rotary_factor=0.5)),
    "glm4": ("glm4", rope("default", partial_rotary_factor=0.5)),
    "ernie4_5": ("ernie4_5", rope("default")),
    "helium": ("helium", rope("default")),
    "exaone4": ("exaone4", rope("default")),
    "gpt_oss": ("gpt_oss", rope("yarn", **YARN, truncate=False)),
    "mixtral": ("mixtral", rope("default")),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", rope("default")),
    "nanochat": ("nanochat", rope("default")),
    "modernbert_decoder": ("modernbert-decoder", {}),
    "gpt_neox": ("gpt_neox", rope("default", partial_rotary_factor=0.25)),
    "gptj": ("gptj", {}),
    "codegen": ("codegen", {}),
    "gpt2": ("gpt2", {}),
    "gpt2_inverse": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neo": ("gpt_neo", {}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "opt": ("opt", {}),
    "opt_350m": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "biogpt": ("biogpt", {}),
    "xglm": ("xglm", {}),
    "ctrl": ("ctrl", {}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "mpt_six_heads": ("mpt", {"d_model": 96, "n_heads": 6}),
    "falcon": ("falcon", rope("default")),
    "falcon_old": ("falcon", {**rope("default"), "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon_new": ("falcon", {**rope("default"), "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("falcon", {"alibi": True}),
    "falcon_alibi_old": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "roformer": ("roformer", {}),
    "deepseek_v3": ("deepseek_v3", rope("default")),
    "dbrx": ("dbrx", {}),
    "phimoe_longrope": ("phimoe", rope("longrope", **LONG, short_mscale=1.1, long_mscale=1.3)),
    "granitemoehybrid": ("granitemoehybrid", {**FULL, "position_embedding_type": "rope"}),
    "gemma3n_text": ("gemma3n_text", {}),
    "minicpm3_longrope": ("minicpm3", rope("longrope", **LONG)),
}

assert WINDOW < 37
