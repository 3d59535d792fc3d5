"""The operators: formula against loops in float64 and transformers, gradient, and the ONNX function in onnxruntime."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from transformers import BloomConfig, T5Config
from transformers.models.bloom.modeling_bloom import BloomModel
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.t5.modeling_t5 import T5Attention

import pe_onnx.custom_ops as ops
from pe_onnx.custom_ops.t5_relative_bias import bucket_of_distance
from pe_onnx.errors import ConfigError
from pe_onnx.models.attention import CompactStep

Array = np.ndarray
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it does, many times more on a machine that is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def angles(B: int, T: int, half: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 cosines and sines ``[B, T, half]``; row b begins at start + 3 b."""
    positions = start + 3 * torch.arange(B)[:, None] + torch.arange(T)
    angle = positions.double()[..., None] * 10000.0 ** -(torch.arange(half).double() / half)
    return angle.cos().float(), angle.sin().float()


# ---------------------------------------------------------------------------------------------- oracles, float64 loops


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
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ values[b, group, slots]
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


def t5_naive(weight: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, max_distance: int) -> Array:
    n = weight.shape[0]
    relative = keys[:, None, :] - queries[:, :, None]
    bucket = T5Attention._relative_position_bucket(relative, False, n, max_distance)  # transformers' own
    return weight.double().numpy()[bucket.numpy()].transpose(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------- arguments per shape


def masked_arguments(B: int, T: int, P: int, kind: str = "bool", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Four query heads on two key heads of size 5; each row's first slots are padding, its own slot always seen."""
    S = P + T
    own = torch.arange(T)[:, None] + P == torch.arange(S)
    causal = torch.arange(S) <= torch.arange(T)[:, None] + P
    padding = torch.arange(S) < torch.arange(B)[:, None] * 2  # [B, S]
    mask = (causal & ~padding[:, None, None, :]) | own  # [B, 1, T, S]
    if kind == "added":
        mask = torch.where(mask, randn(B, 4, T, S, seed=9), float("-inf")).to(dtype)
    tensors = (randn(B, T, 20), randn(B, T, 10, seed=1), randn(B, T, 10, seed=2))
    tensors += (randn(B, 2, P, 5, seed=3), randn(B, 2, P, 5, seed=4))
    return (*(x.to(dtype) for x in tensors), mask, 4, 2, 0.7)


def cached_arguments(
    T: int,
    P: int,
    lengths: list[int],
    bias: str | None = None,
    dtype: torch.dtype = torch.float32,
    total: int | None = None,
) -> tuple[Any, ...]:
    """Four query heads on two key heads of size 16; row b holds lengths[b] tokens once the new ones are in."""
    B, total = len(lengths), total or max(lengths)
    tensors = (randn(B, T, 64), randn(B, T, 32, seed=1), randn(B, T, 32, seed=2))
    tensors += (randn(B, 2, P, 16, seed=3), randn(B, 2, P, 16, seed=4))
    shape = {None: None, "shared": (1, 1, T, total), "row": (B, 4, T, total), "head": (1, 4, T, total)}[bias]
    added = None if shape is None else (2 * randn(*shape, seed=5)).to(dtype)
    last = torch.tensor(lengths, dtype=torch.int32) - 1
    length = torch.tensor([total], dtype=torch.int32)
    return (*(x.to(dtype) for x in tensors), last, length, added, 4, 2, 0.5)


def positions(*starts: int, count: int) -> torch.Tensor:
    return torch.tensor(starts)[:, None] + torch.arange(count)


F16, F32, F64 = torch.float16, torch.float32, torch.float64
OPCHECKS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "rotary-packed": (ops.rotary_embedding, (randn(3, 17, 5 * 14), *angles(3, 17, 5), 5)),
    "rotary-packed-interleaved-float16": (
        ops.rotary_embedding,
        (randn(3, 17, 5 * 14, dtype=F16), *angles(3, 17, 5), 5, True),
    ),
    "rotary-float16": (ops.rotary_embedding, (randn(1, 3, 63, 10, dtype=F16), *angles(1, 63, 5))),
    "rotary-interleaved": (ops.rotary_embedding, (randn(2, 3, 63, 10), *angles(2, 63, 4), 0, True)),
    "rotary-defaults": (ops.rotary_embedding, (randn(1, 3, 1, 10), *angles(1, 1, 5))),
    "rotary-float64": (ops.rotary_embedding, (randn(2, 3, 17, 8, dtype=F64), *(x.double() for x in angles(2, 17, 3)))),
    "masked-bool": (ops.masked_attention, masked_arguments(3, 17, 6)),
    "masked-added-softcap": (ops.masked_attention, (*masked_arguments(2, 7, 3, "added"), 5.0)),
    "masked-empty-cache-float16": (ops.masked_attention, masked_arguments(1, 63, 0, dtype=F16)),
    "masked-one-token-float64": (ops.masked_attention, masked_arguments(2, 1, 17, "added", F64)),
    "cached-prefill": (ops.cached_attention, cached_arguments(17, 0, [17, 1, 9])),
    "cached-decode-window-softcap": (ops.cached_attention, (*cached_arguments(1, 63, [64, 5], "row"), 3.0, 7)),
    "cached-float16": (ops.cached_attention, cached_arguments(5, 17, [22], "shared", F16)),
    "cached-float64": (ops.cached_attention, cached_arguments(5, 17, [22], "head", F64)),
    "alibi": (ops.alibi_bias, (randn(3), positions(4, 9, count=7), positions(0, 2, count=17))),
    "alibi-float16": (ops.alibi_bias, (randn(3, dtype=F16), positions(4, count=7), positions(0, count=17))),
    "alibi-float64": (ops.alibi_bias, (randn(1, dtype=F64), positions(4, count=7), positions(0, count=17))),
    "alibi-shared-keys-one-token": (ops.alibi_bias, (randn(5), positions(4, 9, count=1), positions(0, count=63))),
    "t5": (ops.t5_relative_bias, (randn(9, 3), positions(4, 60, count=17), positions(0, 2, count=63), 63, 31)),
    "t5-float16": (
        ops.t5_relative_bias,
        (randn(9, 3, dtype=F16), positions(4, count=17), positions(0, count=63), 63, 31),
    ),
    "t5-float64": (ops.t5_relative_bias, (randn(2, 1, dtype=F64), positions(4, count=1), positions(0, count=1), 1)),
    "t5-compact": (ops.t5_relative_bias, (randn(32, 3), positions(4, 60, count=1), None, 61)),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_registration_fake_kernel_and_gradient_formula_hold_together(case: str) -> None:
    operator, args = OPCHECKS[case]
    given = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    result = torch.library.opcheck(operator.overload, tuple(given), test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_is_among_the_cases() -> None:
    names = {"alibi_bias", "cached_attention", "masked_attention", "rotary_embedding", "t5_relative_bias"}
    assert set(ops.operators()) == names
    assert {operator.name for operator, _ in OPCHECKS.values()} == names
    assert set(ops.translation_table()) == {getattr(torch.ops.pe_onnx, name).default for name in names}


# --------------------------------------------------------------------------------------- the formula against an oracle


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "T", "D", "R"), [(1, 1, 1, 2, 2), (2, 3, 17, 10, 6), (1, 5, 63, 16, 16), (3, 2, 1, 9, 8)]
)
def test_rotary_embedding_rotates_pairs(B: int, H: int, T: int, D: int, R: int, interleaved: bool) -> None:
    x, (cos, sin) = randn(B, H, T, D), angles(B, T, R // 2, start=1000)
    want = rotated(x, cos, sin, interleaved)
    np.testing.assert_allclose(ops.rotary_embedding(x, cos, sin, 0, interleaved), want, atol=1e-6)
    packed = ops.rotary_embedding(x.transpose(1, 2).flatten(2), cos, sin, H, interleaved)
    np.testing.assert_allclose(heads_first(packed, H), want, atol=1e-6)
    exact = ops.rotary_embedding(x.double(), cos.double(), sin.double(), 0, interleaved)
    np.testing.assert_allclose(exact, want, atol=1e-14)
    if R > 2:  # the other pairing is another rotation
        assert np.abs(want - rotated(x, cos, sin, not interleaved)).max() > 0.5


@pytest.mark.parametrize("interleaved", [False, True])
def test_half_precision_is_rounded_once(interleaved: bool) -> None:
    x, (cos, sin) = randn(2, 3, 17, 10, dtype=F16), angles(2, 17, 4, start=1000)
    got = ops.rotary_embedding(x, cos, sin, 0, interleaved)
    want = rotated(x, cos, sin, interleaved)
    assert got.dtype == F16
    ulp = np.spacing(np.abs(want).astype(np.float16)).astype(np.float64)
    assert (np.abs(got.double().numpy() - want) <= 0.51 * ulp + 1e-6).all()
    coarse = ops.rotary_embedding(x, cos.half(), sin.half(), 0, interleaved)
    assert not (np.abs(coarse.double().numpy() - want) <= 0.51 * ulp + 1e-6).all()


def test_rotary_embedding_is_that_of_llama_and_cohere() -> None:
    q, k, (cos, sin) = randn(2, 3, 17, 10), randn(2, 1, 17, 10), angles(2, 17, 5)
    llama = modeling_llama.apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    cohere = modeling_cohere.apply_rotary_pos_emb(q, k, cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1))
    for x, half_split, interleaved in zip((q, k), llama, cohere, strict=True):
        torch.testing.assert_close(ops.rotary_embedding(x, cos, sin), half_split, rtol=0, atol=1e-6)
        torch.testing.assert_close(ops.rotary_embedding(x, cos, sin, 0, True), interleaved, rtol=0, atol=1e-6)


def test_a_rotary_size_beyond_the_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rotary size = 12 .* head size = 10"):
        ops.rotary_embedding(randn(1, 3, 5, 10), *angles(1, 5, 6))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize(("B", "T", "P"), [(1, 1, 0), (3, 17, 0), (2, 7, 10), (2, 1, 63)])
def test_masked_attention_is_the_plain_formula(
    B: int, T: int, P: int, kind: str, softcap: float, dtype: torch.dtype
) -> None:
    args = masked_arguments(B, T, P, kind, dtype)
    query, key, value, past_key, past_value, mask, _, K, scale = args
    output, present_key, present_value = ops.masked_attention(*args, softcap)
    keys = np.concatenate([past_key.double().numpy(), heads_first(key, K)], 2)
    values = np.concatenate([past_value.double().numpy(), heads_first(value, K)], 2)
    np.testing.assert_array_equal(present_key, keys)
    np.testing.assert_array_equal(present_value, values)

    def seen(b: int, i: int, j: int) -> bool:
        return bool(mask[b, 0, i, j] if kind == "bool" else mask[b, 0, i, j] > -math.inf)

    want = attended(query, keys, values, seen, scale, softcap, None if kind == "bool" else mask)
    # float64 exact to its own rounding: it is the reference that others are measured against
    np.testing.assert_allclose(output, want, atol=1e-5 if dtype == F32 else 1e-12)
    if T * P:
        uncapped = attended(query, keys, values, seen, scale, 0.0 if softcap else 1.5, None)
        assert np.abs(uncapped - want).max() > 1e-2


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_masked_attention_is_that_of_transformers(softcap: float) -> None:
    query, key, value, past_key, past_value, mask, H, K, scale = masked_arguments(2, 17, 6, "added")
    output, present_key, present_value = ops.masked_attention(
        query, key, value, past_key, past_value, mask, H, K, scale, softcap
    )
    module = nn.Module()
    module.num_key_value_groups = H // K
    module.eval()
    q = query.unflatten(-1, (H, -1)).transpose(1, 2)
    want, _ = modeling_gemma2.eager_attention_forward(
        module, q, present_key, present_value, mask, scaling=scale, softcap=softcap or None
    )
    torch.testing.assert_close(output, want.flatten(2), rtol=0, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of cached_attention: row b holds lengths[b] tokens once its new ones are in."""

    T: int
    P: int
    lengths: list[int]
    window: int = -1
    softcap: float = 0.0
    bias: str | None = None
    total: int | None = None
    """None: the longest row."""

    @property
    def module(self) -> str:
        return f"cached-{self.softcap}-{self.window}-{self.bias is not None}"


CACHED = {
    "prefill": Call(17, 0, [17]),
    "prefill-ragged": Call(17, 0, [17, 1, 9]),
    "prefill-ragged-bias": Call(17, 0, [17, 1, 9], bias="row"),
    "prefill-ragged-window-softcap-bias": Call(17, 0, [4, 17, 9], 7, 1.5, "row"),
    "prefill-every-row-padded": Call(17, 0, [11, 4], total=17),
    "prefill-every-row-padded-bias": Call(17, 0, [11, 4], bias="head", total=17),
    "one-token": Call(1, 0, [1, 1], bias="shared"),
    "decode-ragged": Call(1, 63, [64, 5, 31]),
    "decode-ragged-bias": Call(1, 63, [64, 5, 31], bias="row"),
    "decode-ragged-window": Call(1, 63, [64, 5, 31], 7),
    "decode-ragged-window-bias": Call(1, 63, [64, 5, 31], 7, bias="head"),
    "decode-ragged-softcap": Call(1, 63, [64, 5, 31], -1, 1.5),
    "decode-every-row-short": Call(1, 63, [30, 17], total=64),
    "decode-every-row-short-bias": Call(1, 63, [30, 17], bias="row", total=64),
    "chunk": Call(7, 40, [47]),
    "chunk-bias": Call(7, 40, [47], bias="head"),
    "chunk-window": Call(7, 40, [47], 7),
    "chunk-window-of-one": Call(7, 40, [47], 1),
    "chunk-window-softcap": Call(7, 40, [47], 7, 1.5),
    "softcap-bias": Call(7, 40, [47], -1, 1.5, "row"),
    "softcap-bias-window": Call(7, 40, [47], 7, 1.5, "row"),
    "preallocated-chunk": Call(7, 63, [30]),
    "preallocated-chunk-bias": Call(7, 63, [30], bias="row"),
    "preallocated-decode": Call(1, 63, [30, 17]),
    "preallocated-decode-bias": Call(1, 63, [30, 17], 7, bias="head"),
}


def cached_truth(case: str) -> tuple[tuple[Any, ...], Array, Array, Array, list[int]]:
    """Arguments up to the window, and in float64 output, keys, values, and each row's first new slot."""
    c = CACHED[case]
    args = cached_arguments(c.T, c.P, c.lengths, c.bias, total=c.total)
    query, key, value, past_key, past_value, last, _, added, _, _, scale = args
    (keys, starts), (values, _) = cache_after(past_key, key, last), cache_after(past_value, value, last)

    def seen(b: int, i: int, j: int) -> bool:
        at = starts[b] + i
        padding = at >= c.lengths[b]  # what its output is, is not specified: let it see its own slot
        return j == at if padding else (j <= at and (c.window < 0 or j > at - c.window))

    padded = None if added is None else nn.functional.pad(added, (0, c.P + c.T - added.shape[3]))
    want = attended(query, keys, values, seen, scale, c.softcap, padded)
    return (*args, c.softcap, c.window), want, keys, values, starts


def assert_specified_parts_agree(
    got: tuple[Any, Any, Any], want: tuple[Array, Array, Array], lengths: list[int], starts: list[int], atol: float
) -> None:
    """The outputs of tokens and the slots that hold tokens; padding's are unspecified."""
    for b, length in enumerate(lengths):
        tokens = length - starts[b]
        np.testing.assert_allclose(np.asarray(got[0])[b, :tokens], want[0][b, :tokens], atol=atol)
        for present, rows in zip(got[1:], want[1:], strict=True):
            np.testing.assert_allclose(np.asarray(present)[b, :, :length], rows[b, :, :length], atol=1e-6)


@pytest.mark.parametrize("case", CACHED)
def test_cached_attention_is_the_plain_formula(case: str) -> None:
    args, want, keys, values, starts = cached_truth(case)
    got = ops.cached_attention(*args)
    assert_specified_parts_agree(got, (want, keys, values), CACHED[case].lengths, starts, 1e-5)


def test_the_cases_of_cached_attention_tell_their_options_apart() -> None:
    for case in ("decode-ragged-window", "chunk-window", "decode-ragged-softcap", "chunk-bias", "softcap-bias"):
        args, want, _, _, _ = cached_truth(case)
        plain = list(args)
        plain[7], plain[11], plain[12] = None, 0.0, -1
        assert np.abs(ops.cached_attention(*plain)[0].numpy() - want).max() > 0.1, case
    args, want, _, _, _ = cached_truth("chunk-window")
    assert np.abs(ops.cached_attention(*args[:-1], args[-1] + 1)[0].numpy() - want).max() > 0.1


@pytest.mark.parametrize("dtype", [F32, F16, F64])
@pytest.mark.parametrize("shared", [False, True])
def test_alibi_bias_is_linear_in_the_distance(dtype: torch.dtype, shared: bool) -> None:
    slopes = (2.0 ** -torch.arange(1, 6)).to(dtype)
    queries, keys = positions(4095, 9, count=17), positions(0, 2, count=63)[: 1 if shared else 2]
    got = ops.alibi_bias(slopes, queries, keys)
    want = alibi_naive(slopes, queries, keys)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double(), want, rtol=6e-4 if dtype == F16 else 0)


@pytest.mark.parametrize("H", [1, 3, 8, 12, 17])
def test_alibi_bias_is_that_of_bloom_up_to_a_constant_per_row(H: int) -> None:
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[1, :5] = 0
    bloom = BloomModel(BloomConfig(vocab_size=8, hidden_size=2 * H, n_head=H, n_layer=1))
    want = bloom.build_alibi_tensor(mask, H, F32).view(2, H, 1, 17)
    slopes = want[0, :, 0, 1]  # position 1 against position 0
    at = (mask.cumsum(1) - 1) * mask
    got = ops.alibi_bias(slopes, at, at)
    difference = (got - want).double()
    np.testing.assert_allclose(difference, difference[..., :1].expand_as(difference), atol=2e-6)
    wrong = (ops.alibi_bias(slopes, at, 2 * at) - want).double()
    assert (wrong - wrong[..., :1]).abs().max() > 0.01


BUCKETS = [(2, 2), (2, 17), (3, 2), (3, 63), (8, 5), (8, 1000), (17, 9), (17, 63), (31, 128), (32, 17), (32, 63)]
BUCKETS += [
    (32, 128),
    (32, 1000),
    (64, 128),
    (64, 2048),
    (63, 1000),
    (128, 128),
    (320, 800),
    (4, 16),
    (6, 81),
    (12, 768),
]
# borders that fall on whole distances: max_distance / exact is a power whose roots are whole
BUCKETS += [(2 * exact, exact * 2**power) for exact in (1, 2, 3, 4, 6, 8, 16) for power in (1, 2, 3, 4, 6, 8)]


@pytest.mark.parametrize(("n", "m"), sorted(set(BUCKETS)))
def test_buckets_are_those_of_transformers(n: int, m: int) -> None:
    distance = torch.arange(3 * m + 17)
    got = bucket_of_distance(n, m)
    assert got.shape == (m + 1,)
    assert got.dtype == torch.int64
    want = T5Attention._relative_position_bucket(-distance, False, n, m)
    torch.testing.assert_close(got[distance.clamp(max=m)], want, rtol=0, atol=0)
    one_by_one = [int(T5Attention._relative_position_bucket(-distance[d : d + 1], False, n, m)) for d in range(m + 1)]
    assert got.tolist() == one_by_one  # a vectorised logarithm may round otherwise than a single one


def test_buckets_by_hand() -> None:
    assert bucket_of_distance(2, 2).tolist() == [0, 1, 1]
    assert bucket_of_distance(4, 4).tolist() == [0, 1, 2, 3, 3]
    assert bucket_of_distance(8, 16).tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]


@pytest.mark.parametrize(("n", "m"), [(1, 128), (0, 128), (-2, 128), (32, 16), (32, 1), (32, 0), (2, 1), (3, -5)])
def test_buckets_without_a_meaning_are_refused(n: int, m: int) -> None:
    with pytest.raises(ConfigError, match=f"num_buckets = {n} .*max_distance = {m} "):
        bucket_of_distance(n, m)


@pytest.mark.parametrize("dtype", [F32, F16, F64])
@pytest.mark.parametrize(("n", "m"), [(32, 128), (9, 31), (8, 5)])
def test_t5_relative_bias_looks_the_bucket_up(n: int, m: int, dtype: torch.dtype) -> None:
    weight, queries, keys = randn(n, 3, dtype=dtype), positions(5, 200, count=17), positions(0, 3, count=63)
    got = ops.t5_relative_bias(weight, queries, keys, 63, m)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.double(), t5_naive(weight, queries, keys, m))
    compact = ops.t5_relative_bias(weight, queries, None, 63, m)
    np.testing.assert_array_equal(compact.double(), t5_naive(weight, queries, positions(0, count=63), m))


def test_t5_relative_bias_is_that_of_transformers() -> None:
    config = T5Config(
        d_model=24, d_kv=8, num_heads=3, relative_attention_num_buckets=10, relative_attention_max_distance=40
    )
    config.is_decoder = True
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    weight = attention.relative_attention_bias.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = attention.compute_bias(63, 63)
        step = attention.compute_bias(1, 63, past_seen_tokens=62)
    at = positions(0, count=63)
    torch.testing.assert_close(ops.t5_relative_bias(weight, at, None, 63, 40), whole, rtol=0, atol=0)
    torch.testing.assert_close(ops.t5_relative_bias(weight, at[:, 62:], None, 63, 40), step, rtol=0, atol=0)
    assert (ops.t5_relative_bias(weight, at + 1, None, 63, 40) - whole).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_of_rotary_embedding(interleaved: bool) -> None:
    x = randn(2, 3, 4, 7, dtype=F64).requires_grad_()
    cos, sin = (table.double().requires_grad_() for table in angles(2, 4, 3))
    assert torch.autograd.gradcheck(lambda *a: ops.rotary_embedding(*a, 0, interleaved), (x, cos, sin))


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_gradient_of_masked_attention(kind: str) -> None:
    args = masked_arguments(1, 2, 1, kind, F64)
    tensors = tuple(x.requires_grad_() for x in args[:5])
    assert torch.autograd.gradcheck(lambda *a: ops.masked_attention(*a, *args[5:], 2.0), tensors)


def test_gradient_of_one_output_of_masked_attention() -> None:
    args = masked_arguments(2, 3, 2, "bool", F32)
    tensors = [x.clone().requires_grad_() for x in args[:5]]
    ops.masked_attention(*tensors, *args[5:])[0].sum().backward()
    again = [x.clone().requires_grad_() for x in args[:5]]
    q, keys, values = (
        again[0],
        *(
            torch.cat((past, new.unflatten(-1, (2, -1)).transpose(1, 2)), 2)
            for past, new in zip(again[3:], again[1:3], strict=True)
        ),
    )
    nn.functional.scaled_dot_product_attention(
        q.unflatten(-1, (4, -1)).transpose(1, 2), keys, values, args[5], scale=args[8], enable_gqa=True
    ).sum().backward()
    for got, want in zip(tensors, again, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [positions(0, 2, count=17), None])
def test_gradient_of_t5_relative_bias(keys: torch.Tensor | None) -> None:
    weight = randn(6, 3, dtype=F64).requires_grad_()
    queries = positions(3, 30, count=5)
    assert torch.autograd.gradcheck(lambda w: ops.t5_relative_bias(w, queries, keys, 17, 20), (weight,))


# ------------------------------------------------------------------------------------------ the ONNX function, exported


class Calls(nn.Module):
    """A module of a user's own around one call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.call(*tensors)


@dataclasses.dataclass
class Exported:
    path: Path
    call: Callable[..., Any]

    def __post_init__(self) -> None:
        self.model = onnx.load(self.path)
        self.session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def feed(self, tensors: tuple[torch.Tensor, ...]) -> dict[str, Array]:
        names = [i.name for i in self.session.get_inputs()]
        return {name: x.numpy() for name, x in zip(names, tensors, strict=True)}

    def run(self, *tensors: torch.Tensor) -> list[Array]:
        return self.session.run(None, self.feed(tensors))

    def evaluate(self, *tensors: torch.Tensor) -> list[Array]:
        """By onnx's own reference implementation."""
        return ReferenceEvaluator(self.model).run(None, self.feed(tensors))


def rotary(num_heads: int, interleaved: bool) -> Callable[..., torch.Tensor]:
    return lambda x, cos, sin: ops.rotary_embedding(x, cos, sin, num_heads, interleaved)


def rotary_inputs(B: int, T: int, packed: bool, dtype: torch.dtype = F32) -> tuple[torch.Tensor, ...]:
    """Three heads of size 24, of which 16 channels rotate."""
    x = randn(B, T, 72) if packed else randn(B, 3, T, 24)
    return (x.to(dtype), *angles(B, T, 8, start=100))


def masked(softcap: float) -> Callable[..., Any]:
    return lambda *tensors: ops.masked_attention(*tensors, 4, 2, 0.7, softcap)


def cached(softcap: float, window: int, biased: bool) -> Callable[..., Any]:
    def call(*tensors: torch.Tensor) -> Any:
        return ops.cached_attention(*tensors, *(() if biased else (None,)), 4, 2, 0.5, softcap, window)

    return call


def compact_t5(weight: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ops.t5_relative_bias(weight, queries, None, mask.shape[1], 20)


def general_t5(weight: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return ops.t5_relative_bias(weight, queries, keys, keys.shape[1], 20)


def compact_inputs(S: int, *starts: int, count: int = 1, H: int = 3) -> tuple[torch.Tensor, ...]:
    return randn(8, H), positions(*starts, count=count), torch.ones(len(starts), S, dtype=torch.int64)


ROWS = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
CACHE = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
MASK = {**ROWS, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
QKV = (ROWS, ROWS, ROWS, CACHE, CACHE)
HEADS = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
MODULES: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = {
    # name: operator in the file, call, arguments that are traced, dynamic axes
    "rotary": ("RotaryEmbedding", rotary(0, False), rotary_inputs(2, 5, False), (HEADS, ROWS, ROWS)),
    "rotary-interleaved": ("RotaryEmbedding", rotary(0, True), rotary_inputs(2, 5, False), (HEADS, ROWS, ROWS)),
    "rotary-packed": ("RotaryEmbedding", rotary(3, False), rotary_inputs(2, 5, True), (ROWS, ROWS, ROWS)),
    "rotary-packed-interleaved": ("RotaryEmbedding", rotary(3, True), rotary_inputs(2, 5, True), (ROWS, ROWS, ROWS)),
    "rotary-float16": ("RotaryEmbedding", rotary(3, False), rotary_inputs(2, 5, True, F16), (ROWS, ROWS, ROWS)),
    "masked-bool": (
        "MaskedAttention",
        masked(0.0),
        masked_arguments(2, 3, 4)[:6],
        (*QKV, {0: ROWS[0], 2: ROWS[0], 3: ROWS[0]}),
    ),
    "masked-added": (
        "MaskedAttention",
        masked(1.5),
        masked_arguments(2, 3, 4, "added")[:6],
        (*QKV, {0: ROWS[0], 2: ROWS[0], 3: ROWS[0]}),
    ),
    "alibi": (
        "AlibiBias",
        ops.alibi_bias,
        (randn(5), positions(4, 9, count=3), positions(0, 1, count=7)),
        ({}, ROWS, ROWS),
    ),
    "alibi-float16": (
        "AlibiBias",
        ops.alibi_bias,
        (randn(5, dtype=F16), positions(4, 9, count=3), positions(0, count=7)),
        ({}, ROWS, {1: ROWS[0]}),
    ),
    "t5": (
        "T5RelativeBias",
        general_t5,
        (randn(8, 3), positions(4, 9, count=3), positions(0, 1, count=7)),
        ({}, ROWS, ROWS),
    ),
    "t5-compact": ("T5RelativeBias", compact_t5, compact_inputs(7, 4, 4, count=3), ({}, ROWS, ROWS)),
    **{
        call.module: (
            "CachedAttention",
            cached(call.softcap, call.window, call.bias is not None),
            cached_arguments(3, 4, [7, 5], call.bias and "row")[: 8 if call.bias else 7],
            (*QKV, {0: ROWS[0]}, {}, *([MASK] if call.bias else [])),
        )
        for call in CACHED.values()
    },
}
Get = Callable[[str], Exported]


def save(call: Callable[..., Any], args: tuple[Any, ...], dynamic: tuple[Any, ...] | None, path: Path) -> Exported:
    program = torch.onnx.export(
        Calls(call).eval(),
        args,
        dynamo=True,
        opset_version=23,
        custom_translation_table=ops.translation_table(),
        dynamic_shapes=None if dynamic is None else (dynamic,),
        verbose=False,
    )
    assert program is not None
    program.save(path)
    return Exported(path, call)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Get:
    made: dict[str, Exported] = {}
    folder = tmp_path_factory.mktemp("operators")

    def get(name: str) -> Exported:
        if name not in made:
            _, call, args, dynamic = MODULES[name]
            made[name] = save(call, args, dynamic, folder / f"{name}.onnx")
        return made[name]

    return get


@pytest.mark.parametrize("name", MODULES)
def test_the_file_holds_the_operator_as_a_function_with_a_body(name: str, exported: Get) -> None:
    model = exported(name).model
    own = [node.op_type for node in model.graph.node if node.domain == "pe_onnx"]
    assert own == [MODULES[name][0]]
    (function,) = (f for f in model.functions if f.domain == "pe_onnx")
    assert function.name == MODULES[name][0]
    assert function.node
    assert {o.domain: o.version for o in function.opset_import}[""] == 23
    assert all(node.domain in ("", "com.microsoft") for node in function.node)
    onnx.checker.check_model(model)


ROTARY_MODULES = [name for name in MODULES if name.startswith("rotary")]


@pytest.mark.parametrize("engine", ["run", "evaluate"])
@pytest.mark.parametrize("name", ROTARY_MODULES)
def test_rotary_embedding_in_onnx(name: str, engine: str, exported: Get) -> None:
    model = exported(name)
    dtype = F16 if name.endswith("float16") else F32
    for B, T in [(1, 1), (3, 17), (1, 63), (2, 1)]:
        args = rotary_inputs(B, T, "packed" in name or dtype == F16, dtype)
        (got,) = getattr(model, engine)(*args)
        want = model.call(*args)
        assert got.dtype == want.numpy().dtype
        np.testing.assert_allclose(got, want, rtol=1e-3 if dtype == F16 else 0, atol=1e-5)


def test_float16_is_rotated_by_float32_angles_in_onnx(exported: Get) -> None:
    model, args = exported("rotary-float16"), rotary_inputs(2, 63, True, F16)
    (got,) = model.run(*args)
    x = args[0].unflatten(-1, (3, -1)).transpose(1, 2)
    want = rotated(x, *args[1:], False).transpose(0, 2, 1, 3).reshape(2, 63, 72)
    ulp = np.spacing(np.abs(want).astype(np.float16)).astype(np.float64)
    assert (np.abs(got.astype(np.float64) - want) <= 0.51 * ulp + 1e-6).all()


@pytest.mark.parametrize("engine", ["run", "evaluate"])
@pytest.mark.parametrize("name", ["masked-bool", "masked-added"])
def test_masked_attention_in_onnx(name: str, engine: str, exported: Get) -> None:
    model = exported(name)
    for B, T, P in [(1, 1, 0), (1, 1, 17), (3, 17, 0), (2, 7, 10), (2, 1, 63)]:
        args = masked_arguments(B, T, P, name.removeprefix("masked-"))[:6]
        for got, want in zip(getattr(model, engine)(*args), model.call(*args), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["run", "evaluate"])
def test_alibi_bias_in_onnx(engine: str, exported: Get) -> None:
    for B, T, S in [(1, 1, 1), (3, 17, 1000), (2, 1, 63)]:
        at = positions(*range(5, 5 + B), count=T), positions(*range(B), count=S)
        model = exported("alibi")
        args = (randn(5), *at)
        (got,) = getattr(model, engine)(*args)
        np.testing.assert_allclose(got, model.call(*args), rtol=1e-6)
        model = exported("alibi-float16")  # distances beyond 2048 are exact up to the product
        args = (randn(5, dtype=F16), at[0] + 4097, at[1][:1])
        (got,) = getattr(model, engine)(*args)
        assert got.dtype == np.float16
        np.testing.assert_array_equal(got, model.call(*args).numpy())


@pytest.mark.parametrize("engine", ["run", "evaluate"])
def test_t5_relative_bias_in_onnx(engine: str, exported: Get) -> None:
    model = exported("t5")
    for B, T, S in [(1, 1, 1), (3, 17, 63), (2, 1, 1000)]:
        queries, keys = positions(*range(5, 5 + 40 * B, 40), count=T), positions(*range(B), count=S)
        (got,) = getattr(model, engine)(randn(8, 3), queries, keys)
        np.testing.assert_allclose(got, t5_naive(randn(8, 3), queries, keys, 20), rtol=1e-6)


COMPACT = {  # keys, new tokens, position of each row's first
    "one-row-one-key": (1, 1, [0]),
    "one-row-step": (8, 1, [7]),
    "one-row-step-at-the-border": (21, 1, [20]),
    "one-row-step-beyond-max-distance": (63, 1, [62]),
    "one-row-step-far-beyond": (1000, 1, [999]),
    "rows-step": (63, 1, [62, 0, 19, 20, 21]),
    "rows-step-at-one-position": (17, 1, [16, 16]),
    "rows-step-one-key": (1, 1, [0, 0]),
    "prompt": (17, 17, [0]),
    "prompt-beyond-max-distance": (63, 63, [0]),
    "prompt-rows": (63, 63, [0, 0, 0]),
    "prompt-of-two": (2, 2, [0, 0]),
    "chunk": (24, 7, [17]),
    "chunk-beyond-max-distance": (100, 17, [83]),
    "chunk-rows": (63, 5, [58, 58]),
    "chunk-with-empty-slots": (63, 5, [4]),  # shorter than the cache, as compact rows may be
    "rows-step-with-empty-slots": (63, 1, [40, 4]),
}
NEGATIVE_PAD = {"one-row-one-key", "one-row-step"}
"""numpy, and so onnx's reference, pads by no negative number, which the standard allows and onnxruntime takes."""


@pytest.mark.parametrize(
    ("case", "engine"), [(c, e) for e in ("run", "evaluate") for c in COMPACT if e == "run" or c not in NEGATIVE_PAD]
)
def test_t5_relative_bias_by_slices_in_onnx(case: str, engine: str, exported: Get) -> None:
    S, T, starts = COMPACT[case]
    args = compact_inputs(S, *starts, count=T)
    want = t5_naive(args[0], args[1], positions(0, count=S), 20)
    (got,) = getattr(exported("t5-compact"), engine)(*args)
    assert got.shape[1:] == want.shape[1:]
    assert len(got) in (1, len(want))
    np.testing.assert_allclose(np.broadcast_to(got, want.shape), want, rtol=1e-6)


WITH_BIAS = {  # new tokens, length of past, tokens of each row with the new ones
    "prompt": (17, 0, [17]),
    "prompt-padded": (17, 0, [9, 17, 1]),
    "step": (1, 16, [17]),
    "step-of-rows": (1, 16, [17, 3]),
    "step-of-one-row-with-empty-slots": (1, 16, [5]),
    "step-of-one-row-far-with-empty-slots": (1, 62, [40]),
    "step-of-rows-with-empty-slots": (1, 16, [5, 3]),
    "chunk": (7, 40, [47]),
    "chunk-with-empty-slots": (7, 40, [23]),
}


@pytest.fixture(scope="module")
def biased_attention(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """T5's bias on compact rows, as the decoder of the ``ort`` target has them together."""

    def call(weight: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> Any:
        past_key, past_value, mask = rest
        step = CompactStep(mask, q.shape[1], [(past_key, past_value)])
        bias = ops.t5_relative_bias(weight, step.query_positions, step.key_positions, step.key_length, 20)
        return step.attend(0, q, k, v, num_heads=4, kv_heads=2, scale=0.5, bias=bias)

    args = (randn(8, 4), *cached_arguments(3, 4, [7, 5])[:5], torch.ones(2, 7, dtype=torch.int64))
    return save(call, args, ({}, *QKV, ROWS), tmp_path_factory.mktemp("together") / "model.onnx")


@pytest.mark.parametrize("case", WITH_BIAS)
def test_t5_relative_bias_on_compact_rows_in_onnxruntime(case: str, biased_attention: Exported) -> None:
    """Only the sum of a mask's row is read: a row may be shorter than the cache, in a batch of one too."""
    T, P, lengths = WITH_BIAS[case]
    weight, (query, key, value, past_key, past_value, last) = randn(8, 4), cached_arguments(T, P, lengths)[:6]
    mask = (torch.arange(P + T) < torch.tensor(lengths)[:, None]).long()
    (got,) = biased_attention.run(weight, query, key, value, past_key, past_value, mask)
    (keys, starts), (values, _) = cache_after(past_key, key, last), cache_after(past_value, value, last)
    bias = torch.from_numpy(t5_naive(weight, positions(*starts, count=T), positions(0, count=P + T), 20))
    want = attended(query, keys, values, lambda b, i, j: j <= starts[b] + i, 0.5, bias=bias)
    for b, length in enumerate(lengths):
        tokens = length - starts[b]
        np.testing.assert_allclose(got[b, :tokens], want[b, :tokens], atol=1e-5)


def test_t5_relative_bias_for_a_fixed_length_in_onnx(tmp_path: Path) -> None:
    weight, queries = randn(8, 3), positions(0, count=17)
    model = save(lambda w, q: ops.t5_relative_bias(w, q, None, 17, 20), (weight, queries), None, tmp_path / "m.onnx")
    (got,) = model.run(weight, queries)
    np.testing.assert_allclose(got, t5_naive(weight, queries, queries, 20), rtol=1e-6)


@pytest.mark.parametrize("case", CACHED)
def test_cached_attention_in_onnxruntime(case: str, exported: Get) -> None:
    args, want, keys, values, starts = cached_truth(case)
    got = exported(CACHED[case].module).run(*(x for x in args[:8] if x is not None))
    assert_specified_parts_agree(tuple(got), (want, keys, values), CACHED[case].lengths, starts, 1e-5)


def test_cached_attention_writes_into_a_bound_buffer(exported: Get) -> None:
    model, capacity = exported("cached-0.0--1-False"), 33
    buffers = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 2, capacity, 16), np.float32)) for _ in range(2)]
    names = [i.name for i in model.session.get_inputs()]
    outputs = [o.name for o in model.session.get_outputs()]
    new = cached_arguments(17, 0, [17])[:3]
    for start, stop in [(0, 11), (11, 12), (12, 17)]:
        binding = model.session.io_binding()
        for name, x in zip(names[:3], new, strict=True):
            binding.bind_cpu_input(name, x[:, start:stop].contiguous().numpy())
        binding.bind_output(outputs[0])
        for name, out, buffer in zip(names[3:5], outputs[1:], buffers, strict=True):
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(out, buffer)
        for name, last in zip(names[5:], (stop - 1, stop), strict=True):
            binding.bind_cpu_input(name, np.array([last], np.int32))
        model.session.run_with_iobinding(binding)
    keys, values = heads_first(new[1], 2), heads_first(new[2], 2)
    want = attended(new[0], keys, values, lambda b, i, j: j <= i, 0.5)
    np.testing.assert_allclose(binding.get_outputs()[0].numpy(), want[:, 12:], atol=1e-5)
    for buffer, rows in zip(buffers, (keys, values), strict=True):
        np.testing.assert_allclose(buffer.numpy()[:, :, :17], rows, atol=1e-6)
        assert not buffer.numpy()[:, :, 17:].any()


def test_two_forms_of_an_operator_in_one_model(tmp_path: Path) -> None:
    """Half and single precision rotated, keys given and not: each form keeps its own body."""
    x, cos, sin = rotary_inputs(2, 5, True)
    model = save(
        lambda x, y, cos, sin: (rotary(3, False)(x, cos, sin), rotary(3, True)(y, cos, sin)),
        (x, x.half(), cos, sin),
        None,
        tmp_path / "rotary.onnx",
    )
    single, half = model.run(x, x.half(), cos, sin)
    assert (single.dtype, half.dtype) == (np.float32, np.float16)
    for got, want in zip((single, half), model.call(x, x.half(), cos, sin), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_two_forms_of_t5_in_one_model(tmp_path: Path) -> None:
    weight, at = randn(8, 3), positions(5, 5, count=4)
    keys = positions(0, 1, count=9)
    model = save(
        lambda w, q, k: (ops.t5_relative_bias(w, q, k, 9, 20), ops.t5_relative_bias(w, q, None, 9, 20)),
        (weight, at, keys),
        None,
        tmp_path / "t5.onnx",
    )
    general, compact = model.run(weight, at, keys)
    np.testing.assert_allclose(general, t5_naive(weight, at, keys, 20), rtol=1e-6)
    np.testing.assert_allclose(compact, t5_naive(weight, at, positions(0, count=9), 20), rtol=1e-6)


@pytest.mark.parametrize("name", ["rotary-packed", "alibi", "t5"])
def test_a_changed_body_is_noticed(name: str, exported: Get) -> None:
    """The comparison is of the function's own body: with another one the same file computes something else."""
    model = exported(name)
    args = rotary_inputs(2, 5, True) if name.startswith("rotary") else MODULES[name][2]
    changed = copy.deepcopy(model.model)
    (function,) = (f for f in changed.functions if f.domain == "pe_onnx")
    for node in function.node:
        if node.op_type == "Sub":
            node.input[0], node.input[1] = node.input[1], node.input[0]
        if node.op_type == "RotaryEmbedding":
            node.input[1], node.input[2] = node.input[2], node.input[1]
    session = onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, model.feed(args))
    assert np.abs(got - model.call(*args).numpy()).max() > 0.1
