"""Configurations of our decoder that are those of known families."""

from __future__ import annotations

LLAMA = {"hidden_size": 72, "encoding_parameters": {"theta": 500.0}, "num_attention_heads": 6, "num_key_value_heads": 2}
LLAMA |= {"tie_word_embeddings": True, "head_dim": 10, "intermediate_size": 63, "norm_eps": 1e-5}
GPT2 = {"encoding": "learned", "max_position_embeddings": 100, "norm": "layer", "norm_eps": 1e-5, "mlp": "plain"}
GPT2 |= {
    "tie_word_embeddings": True,
    "hidden_act": "gelu_tanh",
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}
NEOX = {**GPT2, "encoding": "rope", "encoding_parameters": {"rotary_dim": 4}, "hidden_act": "gelu"}
NEOX |= {"parallel_residual": True, "tie_word_embeddings": False}
GEMMA2 = {"attention_softcap": 2.0, "logit_softcap": 3.0, "hidden_act": "gelu_tanh", "embedding_scale": 8.0}
GEMMA2 |= {"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 24, "score_scale": 0.3}
