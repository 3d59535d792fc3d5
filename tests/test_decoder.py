"""Our decoder against transformers and against plain loops, its three steps against each other, its configuration."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pe_onnx.config import PRESETS, DecoderConfig
from pe_onnx.discovery import names
from pe_onnx.errors import ConfigError
from pe_onnx.models.attention import CompactStep, MaskedStep, PlainStep, cached_step
from pe_onnx.models.decoder import Decoder

ENCODINGS = names("encodings")
Weights = dict[str, torch.Tensor]
TOLERANCE = 5e-6
"""Of float32 logits, in units of their spread."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it does, many times more on a machine that is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(B: int, T: int, seed: int = 0, vocab_size: int = 256) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed + 100 * T + B))


@torch.no_grad()
def plain(decoder: Decoder, ids: torch.Tensor, mask: torch.Tensor | None = None, shift: int = 0) -> torch.Tensor:
    """All logits by the reference step; positions count the mask's ones, from shift on."""
    mask = torch.ones_like(ids) if mask is None else mask
    return decoder(ids, (mask.cumsum(1) - 1).clamp(min=0) + shift, PlainStep(mask))


def off(got: torch.Tensor | np.ndarray, want: torch.Tensor | np.ndarray) -> float:
    """The greatest difference in units of the logits' spread (max - min of a row, averaged)."""
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    return float((got - want).abs().max() / (want.amax(-1) - want.amin(-1)).mean())


# ------------------------------------------------------------------------------------------------- against transformers


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


# ------------------------------------------------------------------------------------------- against loops, in float64


class Loops:
    """The decoder in numpy, token by token, written from the papers: RMS norm, rotation, soft-caps, gated MLP."""

    def __init__(self, decoder: Decoder) -> None:
        self.config = decoder.config
        self.weights = {name: x.double().numpy() for name, x in decoder.state_dict().items()}

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + self.config.norm_eps) * self.weights[f"{name}.weight"]

    def rotate(self, x: np.ndarray, t: int) -> np.ndarray:
        half = len(x) // 2
        pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * t * 10_000.0 ** (-np.arange(half) / half))
        return np.concatenate([pairs.real, pairs.imag])

    def bias(self, head: int, distance: int) -> float:
        if self.config.encoding == "alibi":
            return -distance * 2.0 ** (-8 * (head + 1) / self.config.num_attention_heads)
        return 0.0

    def logits(self, ids: list[int]) -> np.ndarray:
        c, w = self.config, self.weights
        H, D, group = c.num_attention_heads, c.head_size, c.num_attention_heads // c.kv_heads
        xs = [w["embedding.weight"][i] * c.embedding_scale for i in ids]
        for layer in range(c.num_hidden_layers):
            block = f"blocks.{layer}"
            keys, values, after = [], [], []
            for t, x in enumerate(xs):
                normed = self.norm(x, f"{block}.attention_norm")
                q, k, v = ((w[f"{block}.attention.{n}_proj.weight"] @ normed).reshape(-1, D) for n in "qkv")
                if c.encoding == "rope":
                    q, k = ([self.rotate(head, t) for head in heads] for heads in (q, k))
                keys.append(k)
                values.append(v)
                attended = []
                for h in range(H):
                    scores = np.array([float(np.dot(q[h], key[h // group])) for key in keys]) * c.score_scale
                    if c.attention_softcap:
                        scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
                    scores = scores + [self.bias(h, t - j) for j in range(t + 1)]
                    weights = np.exp(scores - scores.max())
                    attended.append(
                        sum(p * value[h // group] for p, value in zip(weights, values, strict=True)) / weights.sum()
                    )
                x = x + w[f"{block}.attention.o_proj.weight"] @ np.concatenate(attended)
                normed = self.norm(x, f"{block}.mlp_norm")
                gate = w[f"{block}.mlp.gate_proj.weight"] @ normed
                gate = np.array([self.activation(g) for g in gate])
                after.append(
                    x + w[f"{block}.mlp.down_proj.weight"] @ (gate * (w[f"{block}.mlp.up_proj.weight"] @ normed))
                )
            xs = after
        out = np.stack([w["head.weight"] @ self.norm(x, "norm") for x in xs])
        return c.logit_softcap * np.tanh(out / c.logit_softcap) if c.logit_softcap else out

    def activation(self, g: float) -> float:
        return {
            "silu": lambda: g / (1 + math.exp(-g)),
            "gelu": lambda: g * (1 + math.erf(g / math.sqrt(2))) / 2,
            "gelu_tanh": lambda: g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2,
            "relu": lambda: max(g, 0.0),
        }[self.config.hidden_act]()


GEMMA2 = {"attention_softcap": 2.0, "logit_softcap": 3.0, "hidden_act": "gelu_tanh", "embedding_scale": 8.0}
GEMMA2 |= {"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 24, "score_scale": 0.3}
LOOPS: dict[str, dict[str, Any]] = {
    "gemma-2": GEMMA2,
    "gemma-2-untied": {**GEMMA2, "tie_word_embeddings": False, "seed": 3},
    "score-cap": {"attention_softcap": 1.5},
    "logit-cap": {"logit_softcap": 1.5},
    "alibi-score-cap": {"encoding": "alibi", "attention_softcap": 1.5, "num_key_value_heads": 1},
    "alibi": {"encoding": "alibi", "hidden_act": "relu"},
    "none": {"encoding": "none", "num_hidden_layers": 1, "hidden_act": "gelu"},
}


@pytest.mark.parametrize("case", LOOPS)
def test_logits_are_those_of_plain_loops(case: str) -> None:
    decoder = Decoder(DecoderConfig.from_dict({"vocab_size": 63, **LOOPS[case]}))
    ids = tokens(1, 17, vocab_size=63)
    got, want = plain(decoder, ids), Loops(decoder).logits(ids[0].tolist())
    assert off(got[0], want) < TOLERANCE
    for cap in ("attention_softcap", "logit_softcap"):
        if LOOPS[case].get(cap):  # without the cap it is another model
            uncapped = Decoder(DecoderConfig.from_dict({"vocab_size": 63, **LOOPS[case], cap: 0.0}))
            assert off(plain(uncapped, ids)[0], want) > 0.01


def naive_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: Callable[..., bool], cap: float) -> np.ndarray:
    """q ``[T, H, D]``, k and v ``[S, K, D]``, one row: ``[T, H*D]``; scale 0.4."""
    T, H, _ = q.shape
    out = np.zeros_like(q)
    for i, h in np.ndindex(T, H):
        group = h // (H // k.shape[1])
        slots = [j for j in range(len(k)) if seen(i, j)]
        scores = np.array([0.4 * float(q[i, h] @ k[j, group]) for j in slots])
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.exp(scores - scores.max())
        out[i, h] = sum(p * v[j, group] for p, j in zip(weights, slots, strict=True)) / weights.sum()
    return out.reshape(T, -1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [-1, 1, 5, 17, 100])
def test_the_reference_step_is_attention(window: int, cap: float, causal: bool) -> None:
    B, T, H, K, D = 2, 17, 6, 2, 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, n * D, generator=generator) for n in (H, K, K))
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 3:6] = 0
    step = PlainStep(mask, causal)
    got = step.attend(0, q, k, v, num_heads=H, kv_heads=K, scale=0.4, softcap=cap, window=window)
    for b in range(B):

        def seen(i: int, j: int, b: int = b) -> bool:
            near = (j <= i or not causal) and (window < 0 or i - j < window)
            return (bool(mask[b, j]) and near) or i == j

        rows = (x[b].double().numpy().reshape(T, -1, D) for x in (q, k, v))
        np.testing.assert_allclose(got[b], naive_attention(*rows, seen, cap), atol=1e-5)


# ------------------------------------------------------------------------------------------------ the three steps agree

STEPPED: dict[str, dict[str, Any]] = {
    **{name: {"encoding": name} for name in ENCODINGS},
    "grouped-capped": {"num_key_value_heads": 2, "attention_softcap": 2.0},
    "t5_bias-near": {
        "encoding": "t5_bias",
        "encoding_parameters": {"num_buckets": 6, "max_distance": 9},
        "num_key_value_heads": 1,
    },
    "partial": {"encoding_parameters": {"rotary_dim": 6, "interleaved": True}},
}


def empty(decoder: Decoder, B: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    c = decoder.config
    return [(torch.zeros(B, c.kv_heads, 0, c.head_size),) * 2 for _ in range(c.num_hidden_layers)]


@torch.no_grad()
def stepwise(decoder: Decoder, target: str, ids: torch.Tensor, mask: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """All logits with a cache that grows by chunks of tokens."""
    past, logits, begin = empty(decoder, len(ids)), [], 0
    at = (mask.cumsum(1) - 1).clamp(min=0)
    for count in chunks:
        end = begin + count
        step = cached_step(target, mask[:, :end], count, past)
        logits.append(decoder(ids[:, begin:end], at[:, begin:end], step))
        past, begin = step.presents, end
    assert begin == ids.shape[1]
    return torch.cat(logits, 1)


CHUNKS = {"whole": [17], "one-by-one": [1] * 17, "chunks": [5, 1, 8, 3]}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("case", STEPPED)
def test_steps_agree_on_full_rows(case: str, chunks: str) -> None:
    decoder = Decoder(DecoderConfig.from_dict(STEPPED[case]))
    ids = tokens(3, 17)
    want = plain(decoder, ids)
    for target in ("ort", "portable"):
        assert off(stepwise(decoder, target, ids, torch.ones_like(ids), CHUNKS[chunks]), want) < TOLERANCE, target


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("case", STEPPED)
def test_masked_step_takes_any_padding(case: str, chunks: str) -> None:
    decoder = Decoder(DecoderConfig.from_dict(STEPPED[case]))
    ids = tokens(4, 17)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, 9:], mask[3, 4:7] = 0, 0, 0
    valid = mask != 0
    got = stepwise(decoder, "portable", ids, mask, CHUNKS[chunks])
    assert torch.isfinite(got).all()
    assert off(got[valid], plain(decoder, ids, mask)[valid]) < TOLERANCE
    for b in range(4):  # and the padding leaves no trace: the row alone gives the same
        assert off(got[b, valid[b]], plain(decoder, ids[b : b + 1, valid[b]])[0]) < TOLERANCE


@pytest.mark.parametrize("case", STEPPED)
def test_compact_step_takes_ragged_rows(case: str) -> None:
    """A prompt padded on the right, then one token for each row, each at its own length."""
    decoder = Decoder(DecoderConfig.from_dict(STEPPED[case]))
    ids, lengths = tokens(3, 24), torch.tensor([17, 1, 9])
    with torch.no_grad():
        mask = (torch.arange(17) < lengths[:, None]).long()
        step = CompactStep(mask, 17, empty(decoder, 3))
        logits = decoder(ids[:, :17], torch.arange(17).expand(3, 17), step)
        for b, n in enumerate(lengths):
            assert off(logits[b, :n], plain(decoder, ids[b : b + 1, :n])[0]) < TOLERANCE
        for _ in range(7):
            new = ids.gather(1, lengths[:, None])
            mask = (torch.arange(step.presents[0][0].shape[2] + 1) <= lengths[:, None]).long()
            step = CompactStep(mask, 1, step.presents)
            torch.testing.assert_close(step.query_positions, lengths[:, None], rtol=0, atol=0)
            logits = decoder(new, lengths[:, None], step)
            lengths = lengths + 1
            for b, n in enumerate(lengths):
                assert off(logits[b], plain(decoder, ids[b : b + 1, :n])[0, -1:]) < TOLERANCE


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [-1, 1, 5, 17, 100])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_windows_are_the_same_in_every_step(window: int, chunks: str, biased: bool, cap: float) -> None:
    B, T, H, K, D = 2, 17, 4, 2, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, n * D, generator=generator) for n in (H, K, K))
    bias = torch.randn(1, H, T, T, generator=generator) if biased else None
    mask = torch.ones(B, T, dtype=torch.int64)
    options = {"num_heads": H, "kv_heads": K, "scale": 0.4, "softcap": cap}
    want = PlainStep(mask).attend(0, q, k, v, bias=bias, window=window, **options)
    for kind in (CompactStep, MaskedStep):
        past, begin, outputs = [(torch.zeros(B, K, 0, D),) * 2], 0, []
        for count in CHUNKS[chunks]:
            end = begin + count
            step = kind(mask[:, :end], count, past)
            part = None if bias is None else bias[:, :, begin:end, :end]
            rows = (x[:, begin:end] for x in (q, k, v))
            outputs.append(step.attend(0, *rows, bias=part, window=window, **options))
            past, begin = step.presents, end
        got = torch.cat(outputs, 1)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        for cached, given in zip(past[0], (k, v), strict=True):
            torch.testing.assert_close(cached, given.unflatten(-1, (K, D)).transpose(1, 2), rtol=0, atol=0)
    other = PlainStep(mask).attend(0, q, k, v, bias=bias, window=4 if window in (-1, 17, 100) else -1, **options)
    assert (other - want).abs().max() > 0.1


def test_positions_count_the_tokens_before() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 0, 0, 0]])
    want = [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]
    past = [(torch.zeros(4, 1, 3, 16),) * 2]
    for step, new in ((PlainStep(mask), 5), (MaskedStep(mask, 2, past), 2)):
        assert step.key_positions.tolist() == want
        assert step.query_positions.tolist() == [row[-new:] for row in want]
    compact = CompactStep(mask[[0, 3]], 1, past)
    assert compact.key_positions is None
    assert compact.query_positions.tolist() == [[4], [1]]
    assert compact.last_slots.tolist() == [4, 1]
    assert CompactStep(mask[[0, 3]], 5, past).query_positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert CompactStep(mask[:1], 2, past).query_positions.tolist() == [[3, 4]]


def test_last_token_is_the_last_that_the_mask_marks() -> None:
    decoder = Decoder(DecoderConfig())
    ids = tokens(3, 17)
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 4:], right[2, 1:] = 0, 0
    left[1, :4], left[2, 3:9] = 0, 0
    with torch.no_grad():
        for mask, kinds in ((right, ("ort", "portable")), (left, ("portable",))):
            at = (mask.cumsum(1) - 1).clamp(min=0)
            every = plain(decoder, ids, mask)
            last = [int(row.nonzero().max()) for row in mask]
            want = torch.stack([every[b, i : i + 1] for b, i in enumerate(last)])
            assert off(decoder(ids, at, PlainStep(mask), True), want) < 1e-6
            for target in kinds:
                step = cached_step(target, mask, 17, empty(decoder, 3))
                got = decoder(ids, at, step, True)
                assert got.shape == (3, 1, 256)
                assert off(got, want) < TOLERANCE
            if mask is right:  # the last column is another token
                assert off(every[:, -1:], want) > 0.01


def test_a_head_size_that_the_fused_attention_refuses() -> None:
    decoder = Decoder(DecoderConfig(head_dim=10))
    mask = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"head size = 10 must be a multiple of 16 .*--target portable"):
        cached_step("ort", mask, 3, empty(decoder, 1))
    assert off(stepwise(decoder, "portable", tokens(1, 3), mask, [2, 1]), plain(decoder, tokens(1, 3))) < TOLERANCE


# ----------------------------------------------------------------------------------------------------- positions matter


@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_absolute_positions_matter(name: str) -> None:
    decoder = Decoder(DecoderConfig(encoding=name))
    ids = tokens(2, 17)
    assert off(plain(decoder, ids, shift=1), plain(decoder, ids)) > 0.01


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_order_of_the_past_matters(name: str) -> None:
    """One layer: turning the earlier tokens round is seen by the last one, save without an encoding."""
    decoder = Decoder(DecoderConfig(encoding=name, num_hidden_layers=1))
    ids = tokens(1, 17)
    turned = torch.cat([ids[:, :16].flip(1), ids[:, 16:]], 1)
    change = off(plain(decoder, turned)[:, -1], plain(decoder, ids)[:, -1])
    assert change > 0.01 if name != "none" else change < TOLERANCE


@pytest.mark.parametrize("name", ["rope", "alibi", "t5_bias"])
def test_relative_encodings_do_not_see_a_shift_but_a_stretch(name: str) -> None:
    decoder = Decoder(DecoderConfig(encoding=name))
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.int64)
    at, want = torch.arange(17).expand(2, 17), plain(decoder, ids)

    def logits(positions: torch.Tensor) -> torch.Tensor:
        step = PlainStep(mask)
        step.query_positions = step.key_positions = positions
        with torch.no_grad():
            return decoder(ids, positions, step)

    assert off(logits(at + 1234), want) < TOLERANCE
    assert off(logits(2 * at), want) > 0.01


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("preset", ["tiny", "wide"])
def test_scores_and_logits_are_of_order_one(name: str, preset: str) -> None:
    """Else softmax is uniform, or saturated, and a wrong encoding would pass."""
    wide = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408}
    decoder = Decoder(DecoderConfig(encoding=name, **(wide if preset == "wide" else {})))
    seen: list[torch.Tensor] = []

    class Watched(PlainStep):
        def attend(self, layer: int, query: Any, key: Any, value: Any, *, scale: float, **options: Any) -> torch.Tensor:
            H = options["num_heads"]
            q, k = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in (query, key))
            seen.append(q @ k.mT * scale)
            return super().attend(layer, query, key, value, scale=scale, **options)

    ids = tokens(2, 63)
    with torch.no_grad():
        logits = decoder(ids, torch.arange(63).expand(2, 63), Watched(torch.ones_like(ids)))
    assert all(0.5 < float(scores.std()) < 5 for scores in seen)
    assert 0.5 < float(logits.std()) < 10


# ------------------------------------------------------------------------------------------------- weights, from a seed


def test_the_same_seed_gives_the_same_weights() -> None:
    for name in ENCODINGS:
        one, two, other = (Decoder(DecoderConfig(encoding=name, seed=seed)).state_dict() for seed in (7, 7, 8))
        assert list(one) == list(two)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=0)
            assert not torch.equal(other[key], value), key
    torch.manual_seed(1)
    a = Decoder(DecoderConfig()).state_dict()["embedding.weight"]
    torch.manual_seed(2)
    torch.testing.assert_close(Decoder(DecoderConfig()).state_dict()["embedding.weight"], a, rtol=0, atol=0)


def test_every_weight_is_drawn_and_counts() -> None:
    """No parameter is left as torch allocated it, and each moves the logits."""
    everything = {**NEOX, "encoding": "t5_bias", "encoding_parameters": {}, "mlp": "gated", "hidden_act": "silu"}
    decoder = Decoder(DecoderConfig.from_dict(everything))
    ids, want = tokens(2, 63), None
    want = plain(decoder, ids)
    for name, parameter in decoder.named_parameters():
        assert 0 < float(parameter.detach().std()) < 2, name
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        # a bias on the keys adds one number to a whole row of scores
        assert (off(plain(decoder, ids), want) > 1e-3) == ("k_proj.bias" not in name), name
        with torch.no_grad():
            parameter.copy_(kept)


def test_tied_heads_share_one_tensor() -> None:
    tied, untied = (Decoder(DecoderConfig(tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert not torch.equal(untied.head.weight, untied.embedding.weight)
    size = sum(x.numel() for x in untied.parameters()) - sum(x.numel() for x in tied.parameters())
    assert size == 256 * 64


def test_a_decoder_that_trains_learns() -> None:
    """The operators stand in a module that trains: a few steps on one sequence through the compact step."""
    decoder = Decoder(DecoderConfig(encoding="t5_bias", num_hidden_layers=1))
    ids = tokens(1, 17)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        step = CompactStep(torch.ones(1, 16, dtype=torch.int64), 16, empty(decoder, 1))
        logits = decoder(ids[:, :-1], torch.arange(16)[None], step)
        loss = nn.functional.cross_entropy(logits[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert decoder.encoding.weight.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -------------------------------------------------------------------------------------------------------- configuration

FULL = {**NEOX, **GEMMA2, "num_key_value_heads": 1, "seed": 5, "encoding_parameters": {"theta": 500.0}}


@pytest.mark.parametrize("fields", [{}, FULL, {"head_dim": 10, "num_attention_heads": 3}, *PRESETS.values()])
def test_a_configuration_survives_the_round_trip(fields: dict[str, Any]) -> None:
    config = DecoderConfig.from_dict(fields)
    values = config.to_dict()
    assert DecoderConfig.from_dict(values) == config
    assert DecoderConfig.from_dict(json.loads(json.dumps(values))) == config
    assert set(values) == {field.name for field in dataclasses.fields(DecoderConfig)}
    assert {key: values[key] for key in fields} == fields
    values["encoding_parameters"]["theta"] = -1  # a copy
    assert config == DecoderConfig.from_dict(fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3  # type: ignore[misc]


def test_defaults_are_resolved() -> None:
    config = DecoderConfig(hidden_size=60, num_attention_heads=5)
    assert (config.kv_heads, config.head_size, config.score_scale) == (5, 12, pytest.approx(12**-0.5))
    assert DecoderConfig(head_dim=10).score_scale == pytest.approx(10**-0.5)
    assert DecoderConfig(score_scale=1.0).score_scale == 1.0


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("hiden_size", "hidden_size"), ("rope_theta", ""), ("num_kv_heads", ""), ("Encoding", "encoding"), ("", "")],
)
def test_an_unknown_key_is_named(key: str, nearest: str) -> None:
    for build in (DecoderConfig.from_dict, lambda values: DecoderConfig.preset("tiny", **values)):
        with pytest.raises(ConfigError, match=f"unknown configuration key '{key}'") as caught:
            build({key: 1})
        assert not nearest or f"did you mean '{nearest}'?" in str(caught.value)


def test_presets_are_the_sizes_they_say() -> None:
    assert {name: DecoderConfig.preset(name).hidden_size for name in PRESETS} == {"tiny": 64, "small": 512, "base": 768}
    assert DecoderConfig.preset("small", seed=3, hidden_size=64).seed == 3
    with pytest.raises(ConfigError, match="unknown preset 'smal'; did you mean 'small'"):
        DecoderConfig.preset("smal")


BAD: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, f"{name} = 0 must be a positive integer") for name in ("vocab_size", "hidden_size")),
    *(({name: -1}, f"{name} = -1") for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")),
    ({"intermediate_size": 1.5}, "intermediate_size = 1.5"),
    ({"max_position_embeddings": "many"}, "max_position_embeddings = 'many'"),
    ({"num_hidden_layers": True}, "num_hidden_layers = True"),
    ({"hidden_size": None}, "hidden_size = None"),
    ({"norm": "batch"}, "norm = 'batch' must be one of rms, layer"),
    ({"mlp": "deep"}, "mlp = 'deep' must be one of gated, plain"),
    ({"hidden_act": "tanh"}, "hidden_act = 'tanh' must be one of silu, gelu, gelu_tanh, relu"),
    ({"hidden_act": None}, "hidden_act = None"),
    ({"num_attention_heads": 5}, "num_attention_heads = 5 must be a divisor of hidden_size = 64"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3 must be a divisor of num_attention_heads = 4"),
    ({"head_dim": 0}, "head_dim = 0"),
    ({"head_dim": -16}, "head_dim = -16"),
    ({"head_dim": 12.5}, "head_dim = 12.5"),
    ({"head_dim": "wide"}, "head_dim = 'wide'"),
    ({"seed": "lucky"}, "seed = 'lucky'"),
    ({"norm_eps": -1.0}, "norm_eps = -1.0"),
    ({"norm_eps": "small"}, "norm_eps = 'small'"),
    ({"attention_softcap": -5.0}, "attention_softcap = -5.0"),
    ({"logit_softcap": -5.0}, "logit_softcap = -5.0"),
    ({"score_scale": "1/8"}, "score_scale = '1/8'"),
    ({"score_scale": float("nan")}, "score_scale = nan"),
    ({"embedding_scale": None}, "embedding_scale = None"),
    ({"attention_bias": "no"}, "attention_bias = 'no'"),
    ({"parallel_residual": 2}, "parallel_residual = 2"),
    ({"encoding": 3}, "encoding = 3"),
    ({"encoding_parameters": [1]}, r"encoding_parameters = \[1\]"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_a_bad_value_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_dict(fields)


def test_a_score_scale_of_zero_is_zero_or_refused() -> None:
    """Never another number in silence."""
    try:
        config = DecoderConfig(encoding="none", score_scale=0.0, num_hidden_layers=1)
    except ConfigError:
        return
    decoder = Decoder(config)
    ids = tokens(1, 17)
    logits = plain(decoder, ids)
    decoder.blocks[0].attention.q_proj.weight.data.zero_()
    torch.testing.assert_close(plain(decoder, ids), logits)
