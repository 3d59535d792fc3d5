"""The operators' arguments, drawn from a seed: odd sizes, ragged rows, an empty cache, one token."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def angles(B: int, T: int, half: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 cosines and sines ``[B, T, half]``; row b begins at start + 3 b."""
    positions = start + 3 * torch.arange(B)[:, None] + torch.arange(T)
    angle = positions.double()[..., None] * 10000.0 ** -(torch.arange(half).double() / half)
    return angle.cos().float(), angle.sin().float()


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


def rotary_inputs(B: int, T: int, packed: bool, dtype: torch.dtype = F32) -> tuple[torch.Tensor, ...]:
    """Three heads of size 24, of which 16 channels rotate."""
    x = randn(B, T, 72) if packed else randn(B, 3, T, 24)
    return (x.to(dtype), *angles(B, T, 8, start=100))


def compact_inputs(S: int, *starts: int, count: int = 1, H: int = 3) -> tuple[torch.Tensor, ...]:
    return randn(8, H), positions(*starts, count=count), torch.ones(len(starts), S, dtype=torch.int64)


def source_mask(B: int, S: int) -> torch.Tensor:
    """Padding on the left in the first row, on the right in the second, inside in the third; never all of a row."""
    mask = torch.ones(B, S, dtype=torch.bool)
    if S > 3:
        mask[0, : S // 3] = False
        mask[1:2, -(S // 4) :] = False
        mask[2:3, 1 : S // 2] = False
    return mask


def encoder_arguments(B: int, S: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Three heads of size 5, twelve buckets; query, key, value, mask and the table of the bias."""
    tensors = tuple(randn(B, S, 15, seed=seed).to(dtype) for seed in range(3))
    return (*tensors, source_mask(B, S), (2 * randn(12, 3, seed=3)).to(dtype))


def cross_arguments(
    B: int, T: int, S: int, first: bool, dtype: torch.dtype = torch.float32, read: int = 0
) -> tuple[Any, ...]:
    """Three heads of size 5 over an encoder of width 7; read: states that a later run is given, and shall not read."""
    tensors = (randn(B, T, 15), randn(B, S if first else read, 7, seed=1), randn(7, 15, seed=2), randn(7, 15, seed=3))
    tensors += tuple(randn(B, 3, 0 if first else S, 5, seed=seed) for seed in (4, 5))
    return (*(x.to(dtype) for x in tensors), source_mask(B, S))
