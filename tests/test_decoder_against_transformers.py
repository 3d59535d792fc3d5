"""Our decoder's logits against transformers' models with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoder_configs import GPT2, LLAMA, NEOX
from decoder_logits import TOLERANCE, off, plain, tokens
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pe_onnx.config import DecoderConfig
from pe_onnx.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")

Weights = dict[str, torch.Tensor]


def llama(config: DecoderConfig) -> tuple[PreTrainedModel, Callable[[Weights], Weights]]:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.encoding_parameters["theta"]},
        )
    )

    def weights(ours: Weights) -> Weights:
        names = {
            "embedding.": "model.embed_tokens.",
            "blocks.": "model.layers.",
            ".attention_norm.": ".input_layernorm.",
            ".mlp_norm.": ".post_attention_layernorm.",
            ".attention.": ".self_attn.",
            "head.": "lm_head.",
        }
        result = {}
        for name, tensor in ours.items():
            theirs = "model.norm.weight" if name == "norm.weight" else name
            for old, new in names.items():
                theirs = theirs.replace(old, new)
            result[theirs] = tensor
        return result

    return model, weights


def gpt2(config: DecoderConfig) -> tuple[PreTrainedModel, Callable[[Weights], Weights]]:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_inner=config.intermediate_size,
            n_positions=config.max_position_embeddings,
            layer_norm_epsilon=config.norm_eps,
            activation_function="gelu_new",
        )
    )

    def weights(ours: Weights) -> Weights:
        result = {
            "transformer.wte.weight": ours["embedding.weight"],
            "lm_head.weight": ours["head.weight"],
            "transformer.wpe.weight": ours["encoding.table.weight"],
        }
        for kind in ("weight", "bias"):
            result[f"transformer.ln_f.{kind}"] = ours[f"norm.{kind}"]
            for i in range(config.num_hidden_layers):
                here, there = f"blocks.{i}", f"transformer.h.{i}"
                result[f"{there}.ln_1.{kind}"] = ours[f"{here}.attention_norm.{kind}"]
                result[f"{there}.ln_2.{kind}"] = ours[f"{here}.mlp_norm.{kind}"]
                qkv = torch.cat([ours[f"{here}.attention.{x}_proj.{kind}"] for x in "qkv"])
                pairs = {
                    "attn.c_attn": qkv,
                    "attn.c_proj": ours[f"{here}.attention.o_proj.{kind}"],
                    "mlp.c_fc": ours[f"{here}.mlp.up_proj.{kind}"],
                    "mlp.c_proj": ours[f"{here}.mlp.down_proj.{kind}"],
                }
                result |= {f"{there}.{name}.{kind}": x.t() for name, x in pairs.items()}  # Conv1D is transposed
        return result

    return model, weights


def gpt_neox(config: DecoderConfig) -> tuple[PreTrainedModel, Callable[[Weights], Weights]]:
    R = config.encoding_parameters["rotary_dim"]
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act="gelu",
            layer_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            use_parallel_residual=config.parallel_residual,
            attention_bias=config.attention_bias,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": R / config.head_size,
            },
        )
    )

    def weights(ours: Weights) -> Weights:
        H, D = config.num_attention_heads, config.head_size
        result = {"gpt_neox.embed_in.weight": ours["embedding.weight"], "lm_head.weight": ours["head.weight"]}
        for kind in ("weight", "bias"):
            result[f"gpt_neox.final_layer_norm.{kind}"] = ours[f"norm.{kind}"]
            for i in range(config.num_hidden_layers):
                here, there = f"blocks.{i}", f"gpt_neox.layers.{i}"
                qkv = [ours[f"{here}.attention.{x}_proj.{kind}"].unflatten(0, (H, D)) for x in "qkv"]
                result[f"{there}.attention.query_key_value.{kind}"] = torch.cat(qkv, 1).flatten(0, 1)  # head by head
                result[f"{there}.attention.dense.{kind}"] = ours[f"{here}.attention.o_proj.{kind}"]
                result[f"{there}.input_layernorm.{kind}"] = ours[f"{here}.attention_norm.{kind}"]
                result[f"{there}.post_attention_layernorm.{kind}"] = ours[f"{here}.mlp_norm.{kind}"]
                result[f"{there}.mlp.dense_h_to_4h.{kind}"] = ours[f"{here}.mlp.up_proj.{kind}"]
                result[f"{there}.mlp.dense_4h_to_h.{kind}"] = ours[f"{here}.mlp.down_proj.{kind}"]
        return result

    return model, weights


FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (llama, LLAMA),
    "llama-untied": (llama, {**LLAMA, "tie_word_embeddings": False}),
    "llama-biases": (llama, {**LLAMA, "attention_bias": True, "output_bias": True, "mlp_bias": True}),
    "llama-one-key-head": (llama, {**LLAMA, "num_key_value_heads": 1, "num_hidden_layers": 3}),
    "gpt2": (gpt2, GPT2),
    "gpt_neox": (gpt_neox, NEOX),
    "gpt_neox-sequential": (gpt_neox, {**NEOX, "parallel_residual": False, "tie_word_embeddings": True}),
}


def pair(family: str) -> tuple[Decoder, PreTrainedModel]:
    """Our decoder and transformers' model with the same weights."""
    build, fields = FAMILIES[family]
    config = DecoderConfig.from_dict({"vocab_size": 101, **fields})
    decoder = Decoder(config)
    model, weights = build(config)
    theirs = weights(decoder.state_dict())
    model.load_state_dict(theirs, strict=True)
    model.tie_weights()
    assert sum(x.numel() for x in theirs.values()) == sum(x.numel() for x in decoder.state_dict().values())
    return decoder, model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    decoder, model = pair(family)
    for B, T in [(1, 1), (3, 17), (1, 63)]:
        ids = tokens(B, T, vocab_size=101)
        with torch.no_grad():
            want = model(ids).logits
        got = plain(decoder, ids)
        assert got.shape == (B, T, 101)
        assert off(got, want) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_padding_is_ignored_as_in_transformers(family: str) -> None:
    decoder, model = pair(family)
    ids = tokens(4, 17, vocab_size=101)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # left
    mask[2, 9:] = 0  # right
    mask[3, 4:7] = 0  # inside
    with torch.no_grad():
        want = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    valid = mask != 0
    assert off(plain(decoder, ids, mask)[valid], want[valid]) < TOLERANCE
    assert off(plain(decoder, ids)[valid], want[valid]) > 0.01


TWINS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"encoding_parameters": {"theta": 600.0}}),
    ("llama", {"encoding_parameters": {"theta": 500.0, "interleaved": True}}),
    ("llama", {"encoding_parameters": {"theta": 500.0, "rotary_dim": 8}}),
    ("llama", {"encoding": "none", "encoding_parameters": {}}),
    ("llama", {"score_scale": 0.25}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"embedding_scale": 1.5}),
    ("llama", {"attention_softcap": 2.0}),
    ("llama", {"logit_softcap": 5.0}),
    ("gpt2", {"hidden_act": "relu"}),
    ("gpt2", {"encoding": "sinusoidal"}),
    ("gpt_neox", {"encoding_parameters": {"rotary_dim": 6}}),
    ("gpt_neox", {"encoding_parameters": {"rotary_dim": 16}}),
    ("gpt_neox", {"parallel_residual": False}),
]


@pytest.mark.parametrize(("family", "changed"), TWINS, ids=[f"{f}-{c}" for f, c in TWINS])
def test_a_decoder_that_differs_in_one_field_would_fail(family: str, changed: dict[str, Any]) -> None:
    decoder, _ = pair(family)
    other = Decoder(DecoderConfig.from_dict({**decoder.config.to_dict(), **changed}))
    others = other.state_dict()
    other.load_state_dict({name: x for name, x in decoder.state_dict().items() if name in others}, strict=True)
    ids = tokens(3, 17, vocab_size=101)
    assert off(plain(other, ids), plain(decoder, ids)) > 0.01


@pytest.mark.parametrize(("field", "one", "two"), [("hidden_act", "gelu", "gelu_tanh"), ("norm", "rms", "layer")])
def test_near_relatives_are_told_apart(field: str, one: str, two: str) -> None:
    """GELU and its tanh form differ by 5e-4 at most, still above the tolerance."""
    first, second = (Decoder(DecoderConfig.from_dict({field: value})) for value in (one, two))
    second.load_state_dict(first.state_dict(), strict=field != "norm")
    assert off(plain(second, tokens(2, 17)), plain(first, tokens(2, 17))) > 3 * TOLERANCE
