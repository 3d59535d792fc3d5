"""Our decoder and its reference step against plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from decoder_configs import GEMMA2
from decoder_logits import TOLERANCE, off, plain, tokens

from pe_onnx.config import DecoderConfig
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")


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
