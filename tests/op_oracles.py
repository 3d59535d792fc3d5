"""What the operators must compute: loops in float64, with transformers' own buckets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers.models.t5.modeling_t5 import T5Attention

Array = np.ndarray


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> Array:
    """x ``[B, H, T, D]``, pair by pair."""
    given, c, s = x.double().numpy(), cos.double().numpy()[:, None], sin.double().numpy()[:, None]
    out, half = given.copy(), cos.shape[-1]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        out[..., a] = given[..., a] * c[..., i] - given[..., b] * s[..., i]
        out[..., b] = given[..., b] * c[..., i] + given[..., a] * s[..., i]
    return out


def attended(
    query: torch.Tensor,
    keys: Array,
    values: Array,
    seen: Callable[[int, int, int], bool],
    scale: float,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> Array:
    """query ``[B, T, H*D]``, keys and values ``[B, K, S, D]``, seen(b, i, j): ``[B, T, H*D]``, row by row."""
    B, K, S, D = keys.shape
    T, H = query.shape[1], query.shape[2] // D
    q = query.double().numpy().reshape(B, T, H, D)
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(B, T, H):
        slots = [j for j in range(S) if seen(b, i, j)]
        group = h // (H // K)
        scores = scale * (keys[b, group, slots] @ q[b, i, h])
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias.double().numpy()[b % len(bias), h % bias.shape[1], i, slots]
        weights = np.exp(scores)
        sink = 0.0 if sinks is None else np.exp(float(sinks[h]))
        out[b, i, h] = weights / (weights.sum() + sink) @ values[b, group, slots]
    return out.reshape(B, T, H * D)


def heads_first(x: torch.Tensor, heads: int) -> Array:
    """``[B, T, H*D]`` to float64 ``[B, H, T, D]``."""
    return x.double().numpy().reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def cache_after(past: torch.Tensor, new: torch.Tensor, last_slots: torch.Tensor) -> tuple[Array, list[int]]:
    """The rows with their new tokens written so that they end at last_slots, and where each row's begin."""
    (B, K, _, D), T = past.shape, new.shape[1]
    rows = np.concatenate([past.double().numpy(), np.zeros((B, K, T, D))], 2)
    starts = [max(int(last) + 1 - T, 0) for last in last_slots]
    for b, start in enumerate(starts):
        rows[b, :, start : start + T] = heads_first(new, K)[b]
    return rows, starts


def alibi_naive(slopes: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> Array:
    out = np.zeros((len(queries), len(slopes), queries.shape[1], keys.shape[1]))
    for b, h, i, j in np.ndindex(*out.shape):
        out[b, h, i, j] = -float(slopes[h]) * (int(queries[b, i]) - int(keys[b % len(keys), j]))
    return out


def t5_naive(
    weight: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, max_distance: int, bidirectional: bool = False
) -> Array:
    n = weight.shape[0]
    relative = keys[:, None, :] - queries[:, :, None]
    bucket = T5Attention._relative_position_bucket(relative, bidirectional, n, max_distance)  # transformers' own
    return weight.double().numpy()[bucket.numpy()].transpose(0, 3, 1, 2)


def encoder_bias_naive(weight: torch.Tensor, S: int, max_distance: int, shift: int = 0, sign: int = 1) -> Array:
    """``[1, H, S, S]``; shift and sign other than 0 and 1 are a mistake to be noticed."""
    relative = sign * (torch.arange(S) - torch.arange(S)[:, None]) + shift  # key - query
    bucket = T5Attention._relative_position_bucket(relative, True, weight.shape[0], max_distance)
    return weight.double().numpy()[bucket.numpy()].transpose(2, 0, 1)[None]
