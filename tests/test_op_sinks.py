"""Sinks in the two attention operators, and chunks in the steps that call them: against loops, and in onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_exports import CACHE, HEADS, MASK, QKV, ROWS, Exported, save
from op_inputs import CACHED, F64, cached_arguments, masked_arguments, randn
from op_oracles import Array, attended, cache_after, heads_first

import pe_onnx.custom_ops as ops
from pe_onnx.models.attention import CompactStep, MaskedStep

pytestmark = pytest.mark.usefixtures("one_thread")

SINKS = torch.tensor([0.7, -1.5, 2.0, -0.2])
"""Of four heads of queries, on two of keys."""
Get = Callable[..., Exported]


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """``onnx(name, call, args, dynamic)``: the file, written at the first call of that name."""
    folder, made = tmp_path_factory.mktemp("sinks"), dict[str, Exported]()

    def get(name: str, call: Callable[..., Any], args: tuple[Any, ...], dynamic: tuple[Any, ...]) -> Exported:
        if name not in made:
            made[name] = save(call, args, dynamic, Path(folder) / f"{name}.onnx")
        return made[name]

    return get


def masked_truth(args: tuple[Any, ...], softcap: float, sinks: torch.Tensor | None) -> Array:
    query, key, value, past_key, past_value, mask, _, K, scale = args
    keys = np.concatenate([past_key.double().numpy(), heads_first(key, K)], 2)
    values = np.concatenate([past_value.double().numpy(), heads_first(value, K)], 2)
    added = None if mask.dtype == torch.bool else mask

    def seen(b: int, i: int, j: int) -> bool:
        return bool(mask[b, 0, i, j] if added is None else mask[b, 0, i, j] > -math.inf)

    return attended(query, keys, values, seen, scale, softcap, added, sinks)


SIZES = [(1, 1, 0), (3, 17, 0), (2, 7, 10), (2, 1, 63), (1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize(("B", "T", "P"), SIZES)
def test_masked_attention_is_the_plain_formula(B: int, T: int, P: int, kind: str, softcap: float, dtype: Any) -> None:
    args = masked_arguments(B, T, P, kind, dtype)
    output, present_key, _ = ops.masked_attention(*args, softcap, SINKS.to(dtype))
    want = masked_truth(args, softcap, SINKS)
    np.testing.assert_allclose(output, want, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert present_key.shape == (B, 2, P + T, 5)  # a sink is not cached
    for other in (None, SINKS.flip(0), SINKS + 0.1):
        assert np.abs(masked_truth(args, softcap, other) - want).max() > 1e-3


@pytest.mark.parametrize("engine", ["run", "evaluate"])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masked_attention_in_onnx(kind: str, softcap: float, engine: str, onnx: Get) -> None:
    def call(*tensors: torch.Tensor) -> Any:
        return ops.masked_attention(*tensors[:6], 4, 2, 0.7, softcap, tensors[6])

    traced = (*masked_arguments(2, 3, 4, kind)[:6], SINKS)
    model = onnx(f"masked-{kind}-{softcap}", call, traced, (*QKV, {**ROWS, 0: HEADS[0], 2: HEADS[2], 3: MASK[3]}, {}))
    for B, T, P in SIZES:
        args = masked_arguments(B, T, P, kind)
        got = getattr(model, engine)(*args[:6], SINKS)
        np.testing.assert_allclose(got[0], masked_truth(args, softcap, SINKS), atol=1e-5)
        for have, want in zip(got[1:], call(*args[:6], SINKS)[1:], strict=True):
            np.testing.assert_array_equal(have, want)


def cached_truth(case: str, sinks: torch.Tensor | None) -> tuple[tuple[Any, ...], list[tuple[Array, Array]]]:
    """Arguments up to the window, and of each row the output that is wanted and that of its tokens."""
    c = CACHED[case]
    args = cached_arguments(c.T, c.P, c.lengths, c.bias, total=c.total)
    query, key, value, past_key, past_value, last, _, added, _, _, scale = args
    (keys, starts), (values, _) = cache_after(past_key, key, last), cache_after(past_value, value, last)

    def seen(b: int, i: int, j: int) -> bool:
        at = starts[b] + i
        padding = at >= c.lengths[b]
        return j == at if padding else (j <= at and (c.window < 0 or j > at - c.window))

    room = keys.shape[2]
    padded = None if added is None else torch.nn.functional.pad(added, (0, room - added.shape[3]))
    want = attended(query, keys, values, seen, scale, c.softcap, padded, sinks)
    tokens = [slice(0, length - start) for length, start in zip(c.lengths, starts, strict=True)]
    return (*args, c.softcap, c.window), [(want[b, t], b) for b, t in enumerate(tokens)]  # type: ignore[misc]


def assert_tokens_agree(output: Any, want: list[tuple[Array, Any]], atol: float = 1e-5) -> None:
    for rows, b in want:
        np.testing.assert_allclose(np.asarray(output)[b, : len(rows)], rows, atol=atol)


@pytest.mark.parametrize("case", CACHED)
def test_cached_attention_is_the_plain_formula(case: str) -> None:
    args, want = cached_truth(case, SINKS)
    assert_tokens_agree(ops.cached_attention(*args, SINKS)[0], want)
    for other in (None, SINKS.flip(0)):
        with pytest.raises(AssertionError):
            assert_tokens_agree(ops.cached_attention(*args, other)[0], want, 1e-3)


@pytest.mark.parametrize("case", CACHED)
def test_cached_attention_in_onnxruntime(case: str, onnx: Get) -> None:
    c = CACHED[case]
    bias = [0] if c.bias else []

    def call(*tensors: torch.Tensor) -> Any:
        given = tensors[7] if bias else None
        return ops.cached_attention(*tensors[:7], given, 4, 2, 0.5, c.softcap, c.window, tensors[-1])

    traced = cached_arguments(3, 4, [7, 5], c.bias and "row")
    axes = (*QKV, {0: ROWS[0]}, {}, *(MASK for _ in bias), {})
    model = onnx(c.module, call, (*traced[: 7 + len(bias)], SINKS), axes)
    args, want = cached_truth(case, SINKS)
    assert_tokens_agree(model.run(*args[: 7 + len(bias)], SINKS)[0], want)


def test_a_sink_of_no_weight_and_one_of_all() -> None:
    masked, cached = masked_arguments(2, 7, 10), cached_truth("decode-ragged", None)[0]
    for call in (
        lambda sinks: ops.masked_attention(*masked, 0.0, sinks)[0],
        lambda sinks: ops.cached_attention(*cached, sinks)[0],
    ):
        torch.testing.assert_close(call(torch.full((4,), -torch.inf)), call(None))
        assert call(torch.full((4,), 60.0)).abs().max() < 1e-6
        assert call(None).abs().max() > 0.1


CHUNK = 4
H, K, D = 4, 2, 16
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    # T, P, and of each row its slots: a token or padding
    "prefill": (11, 0, ["11111111111"]),
    "prefill, ragged": (11, 0, ["11111111111", "11110000000", "11111111100"]),
    "prefill, on the left": (11, 0, ["11111111111", "00000001111", "00111111111"]),
    "prefill, in between": (11, 0, ["10110111011", "00110111110"]),
    "decode": (1, 13, ["11111111111111", "11111000000000"]),
    "decode, on the left": (1, 13, ["11111111111111", "00000000011111"]),
    "first of a chunk": (1, 8, ["111111111"]),
    "last of a chunk": (1, 7, ["11111111"]),
    "tokens behind a past": (7, 6, ["1111111111111"]),
    "tokens behind a past, on the left": (7, 6, ["0001111111111", "1111111111111"]),
}
COMPACT = [name for name in LAYOUTS if "left" not in name and "between" not in name]
PADDED = [name for name in LAYOUTS if name != "decode"]  # a row with room behind it is for ort alone
CASES = [("ort", name) for name in COMPACT] + [("portable", name) for name in PADDED]


def chunk_inputs(name: str) -> tuple[torch.Tensor, ...]:
    T, P, rows = LAYOUTS[name]
    B = len(rows)
    tensors = (randn(B, T, H * D), randn(B, T, K * D, seed=1), randn(B, T, K * D, seed=2))
    tensors += (randn(B, K, P, D, seed=3), randn(B, K, P, D, seed=4))
    return (*tensors, torch.tensor([[int(slot) for slot in row] for row in rows]))


def chunk_truth(target: str, name: str, chunk: int, window: int, sinks: torch.Tensor | None) -> list[tuple[Array, Any]]:
    """Of each row, the output at its new tokens, and where they are."""
    query, key, value, past_key, past_value, mask = chunk_inputs(name)
    T, P, _ = LAYOUTS[name]
    if target == "ort":
        last = mask.sum(1) - 1
        (keys, starts), (values, _) = cache_after(past_key, key, last), cache_after(past_value, value, last)
    else:
        keys = np.concatenate([past_key.double().numpy(), heads_first(key, K)], 2)
        values, starts = np.concatenate([past_value.double().numpy(), heads_first(value, K)], 2), [P] * len(mask)
    position = (mask.cumsum(1) - 1).tolist()

    def seen(b: int, i: int, j: int) -> bool:
        at = starts[b] + i
        if at >= mask.shape[1] or not mask[b, at]:
            return j == at
        p, q = position[b][at], position[b][j] if j < mask.shape[1] else 10**6
        near = (window < 0 or p - q < window) and (not chunk or p // chunk == q // chunk)
        return q <= p and j <= at and bool(mask[b, j]) and near

    out = attended(query, keys, values, seen, 0.5, 0.0, None, sinks)
    tokens = [[i for i in range(T) if s + i < mask.shape[1] and mask[b, s + i]] for b, s in enumerate(starts)]
    return [(out[b, t], (b, t)) for b, t in enumerate(tokens)]


def difference(output: Any, want: list[tuple[Array, Any]]) -> float:
    return max(float(np.abs(np.asarray(output)[at] - rows).max()) for rows, at in want)


def attending(target: str, chunk: int, window: int) -> Callable[..., Any]:
    """``call(query, key, value, past_key, past_value, attention_mask, sinks)`` through a step."""
    kind = CompactStep if target == "ort" else MaskedStep

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        past_key, past_value, mask, sinks = others
        step = kind(mask, query.shape[1], [(past_key, past_value)])
        options = {"scale": 0.5, "sinks": sinks, "chunk": chunk, "window": window}
        return step.attend(0, query, key, value, num_heads=H, kv_heads=K, **options)

    return call


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize(("target", "name"), CASES)
def test_chunks_are_the_plain_formula(target: str, name: str, window: int) -> None:
    have = attending(target, CHUNK, window)(*chunk_inputs(name), SINKS)
    assert difference(have, chunk_truth(target, name, CHUNK, window, SINKS)) < 1e-5
    others = [(CHUNK, window, None), (CHUNK, 2, SINKS), (CHUNK + 1, window, SINKS), (0, window, SINKS)]
    if name in ("prefill", "tokens behind a past"):
        assert all(difference(have, chunk_truth(target, name, *other)) > 1e-2 for other in others)


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize(("target", "name"), CASES)
def test_chunks_in_onnxruntime(target: str, name: str, window: int, onnx: Get) -> None:
    traced = chunk_inputs("tokens behind a past, on the left" if target == "portable" else "decode")
    call = attending(target, CHUNK, window)
    model = onnx(f"chunk-{target}-{window}", call, (*traced, SINKS), (*QKV[:3], CACHE, CACHE, ROWS, {}))
    (have,) = model.run(*chunk_inputs(name), SINKS)
    assert difference(have, chunk_truth(target, name, CHUNK, window, SINKS)) < 1e-5
