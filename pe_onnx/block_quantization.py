"""Matrices in blocks of few bits, as onnxruntime's MatMulNBits and GatherBlockQuantized read them.

A row of K weights is cut into blocks; a block is small integers q, one scale s and one zero point z::

    w[i] = s (q[i] - z)          q in 0 .. 2^bits - 1;   symmetric: z = 2^(bits - 1), not stored

Scales are searched, not read off the greatest weight: of a few candidates the one whose integers, with the scale that
fits them best in the mean square, leave the least error. At 4 bits that takes a tenth off the squared error of rounding
to the nearest with the greatest weight's scale, as onnxruntime's own quantizer has it, at the same size and speed.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)

CANDIDATES = {4: (1.12, 1.06, 1.0, 0.94, 0.88, 0.82), 8: (1.0,)}
"""Scales that are tried, relative to the one that just holds the block's greatest weight."""

PIECE = 1 << 16
"""Weights that one thread works on at a time: what it needs for them stays in the cache."""


class Blocks(NamedTuple):
    """A matrix ``[N, K]`` in blocks along K."""

    packed: Array
    """uint8 ``[N, K/block, block*bits/8]``, of two 4-bit integers the first in the low half."""
    scales: Array
    """float32 ``[N, K/block]``."""
    zero_points: Array | None
    """uint8 ``[N, ceil(K/block * bits/8)]``, packed likewise; None where symmetric."""


def quantize_blocks(weight: Array, bits: int, block: int, symmetric: bool, scale_dtype: Any = np.float32) -> Blocks:
    """weight: float ``[N, K]``, K a multiple of ``block``. scale_dtype: scales are rounded to it, and the integers
    chosen for the rounded ones. Uses all cores."""
    N, K = weight.shape
    packed = np.empty((N, K // block, block * bits // 8), np.uint8)
    scales = np.empty((N, K // block), scale_dtype)
    zeros = np.empty((N, K // block), np.uint8)
    step = max(PIECE // K, 1)

    def work(begin: int) -> None:
        rows = slice(begin, begin + step)
        pieces = np.ascontiguousarray(weight[rows], np.float32).reshape(-1, block)
        q, s, z = _round(pieces, bits, symmetric, scale_dtype)
        count = q.shape[0] // (K // block)
        packed[rows] = _pack(q, bits).reshape(count, K // block, -1)
        scales[rows], zeros[rows] = s.reshape(count, -1), z.reshape(count, -1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, range(0, N, step)))
    return Blocks(packed, scales, None if symmetric else _pack(zeros, bits))


def dequantize_blocks(blocks: Blocks, bits: int) -> Array:
    """float32 ``[N, K]``: the weights that a product with the blocks computes with."""
    N, count, _ = blocks.packed.shape
    q = _unpack(blocks.packed, bits).astype(np.float32)  # [N, K/block, block]
    if blocks.zero_points is None:
        q -= 1 << (bits - 1)
    else:
        q -= _unpack(blocks.zero_points, bits)[:, :count, None]
    q *= blocks.scales.astype(np.float32)[..., None]
    return q.reshape(N, -1)


def bits_per_weight(bits: int, block: int, symmetric: bool, scale_bits: int = 32) -> float:
    """Scales and zero points included."""
    return bits + (scale_bits + (0 if symmetric else bits)) / block


def _round(w: Array, bits: int, symmetric: bool, scale_dtype: Any) -> tuple[Array, Array, Array]:
    """Blocks ``[M, block]`` to integers uint8 ``[M, block]``, scales and zero points ``[M]``."""
    levels, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        greatest = np.take_along_axis(w, np.abs(w).argmax(1)[:, None], 1)  # [M, 1]
        widest, zero = greatest / -middle, np.full_like(greatest, middle)  # the greatest weight takes the longer side
    else:
        low, high = np.minimum(w.min(1, keepdims=True), 0), np.maximum(w.max(1, keepdims=True), 0)
        widest = (high - low) / levels
    best_score = np.full((len(w), 1), -1.0, np.float32)
    best_q = np.zeros_like(w)
    best_scale, best_zero = np.zeros_like(best_score), np.zeros_like(best_score)
    for share in CANDIDATES[bits]:
        scale = widest * np.float32(share)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        if not symmetric:
            zero = np.clip(np.rint(-low * inverse), 0, levels)
        q = w * inverse
        np.rint(q, out=q)
        q += zero
        np.clip(q, 0, levels, out=q)
        q -= zero
        fit, norm = np.einsum("ij,ij->i", w, q)[:, None], np.einsum("ij,ij->i", q, q)[:, None]
        score = np.divide(fit * fit, norm, out=np.zeros_like(norm), where=norm > 0)  # |w|^2 less the squared error
        better = score > best_score
        best_score = np.where(better, score, best_score)
        best_scale = np.where(better, np.divide(fit, norm, out=np.zeros_like(norm), where=norm > 0), best_scale)
        best_zero = np.where(better, zero, best_zero)
        np.copyto(best_q, q, where=better)
    scale = best_scale.astype(scale_dtype).astype(np.float32)
    return (best_q + best_zero).astype(np.uint8), scale[:, 0], best_zero[:, 0].astype(np.uint8)


def _pack(values: Array, bits: int) -> Array:
    """uint8 ``[..., n]`` of small integers to bytes ``[..., ceil(n*bits/8)]``."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate((values, np.zeros((*values.shape[:-1], 1), np.uint8)), -1)
    return values[..., 0::2] | values[..., 1::2] << 4


def _unpack(packed: Array, bits: int) -> Array:
    """uint8, the inverse of ``_pack`` but for one integer more where their number was odd."""
    if bits == 8:
        return packed
    halves = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    halves[..., 0::2], halves[..., 1::2] = packed & 15, packed >> 4
    return halves


def relative_error(weight: Array, rounded: Array) -> float:
    """Root mean square of the rounding, relative to that of the weights."""
    norm = math.sqrt(float(np.square(weight, dtype=np.float64).mean()))
    error = math.sqrt(float(np.square(weight - rounded, dtype=np.float64).mean()))
    return error / norm if norm else 0.0
