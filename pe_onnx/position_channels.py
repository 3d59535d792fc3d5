"""Channels of a head that hold positions: with them ALiBi's penalty is part of the product of query and key.

Softmax ignores what all scores of a query share, so ``slope * key position`` is as good a penalty as the distance. A
key's channels hold its position, a query's the slope of its head, in pieces that half precision holds exactly; no bias
is made, added or read, and attention stays on its fastest kernel::

    position / 256 = sum over i of digit[i] 2^(i bits - 8)      0 <= digit[i] < 2^bits
    256 slope / scale = sum over j of piece[j]                  each what is left, rounded
    scale q k = scale (q k of the head's own channels) + slope position

Products are added in float32, and slopes are as exact as in it: in two pieces of float16, which has 11 bits, and three
of bfloat16, which has 8. The third piece is so small that it meets the position in one channel, rounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pe_onnx.contract import stored

CHANNELS = 8
"""That a head has more; onnxruntime's CUDA kernels take heads of multiples of 8."""
MOST_POSITIONS = 1 << 24
"""What three digits reach in either dtype: float16 holds no fourth of 2^22."""
SHIFT = 8
"""Powers of two that slopes have more and digits fewer, so that float16 holds both."""
BITS = {"float16": 11, "bfloat16": 8}
"""Of a digit, by the dtype of the cache."""

Array = np.ndarray[Any, Any]


class Channel(NamedTuple):
    """A key's holds ``position // lowest % modulus * lowest / 256``, a query's the piece of that number."""

    lowest: int
    modulus: int
    piece: int


def _channels(bits: int, exact: int, rounded: int) -> tuple[Channel, ...]:
    """exact: pieces that meet each digit; rounded: those that meet the whole position."""
    digits = [Channel(1 << i * bits, 1 << bits, piece) for i in range(3) for piece in range(exact)]
    return (*digits, *(Channel(1, MOST_POSITIONS, exact + i) for i in range(rounded)))


USED = {11: _channels(11, 2, 0), 8: _channels(8, 2, 1)}
"""Of CHANNELS, by the bits of a digit; those left over are zeros."""


def of_keys(positions: Array, bits: int) -> Array:
    """A key's channels, float32: positions ``[...]``, integers below MOST_POSITIONS, to ``[..., CHANNELS]``."""
    made = np.zeros((*positions.shape, CHANNELS), np.float32)
    for i, channel in enumerate(USED[bits]):
        made[..., i] = (positions // channel.lowest % channel.modulus) * (channel.lowest / (1 << SHIFT))
    return made


def of_queries(slopes: Array, scale: float, dtype: str) -> Array | None:
    """A query's channels, float64 ``[H, CHANNELS]``, each a number of ``dtype``; None where it does not hold them.

    slopes: ``[H]``. scale: of the scores. dtype: ``float16`` or ``bfloat16``.
    """
    left = np.asarray(slopes, np.float64) * 2.0**SHIFT / scale
    bits, pieces = BITS[dtype], []
    for _ in range(1 + max(channel.piece for channel in USED[bits])):
        pieces.append(_rounded(left, dtype))
        if not np.isfinite(pieces[-1]).all():
            return None
        left = left - pieces[-1]
    if (np.abs(left) > 2.0**-22 * np.maximum(np.abs(sum(pieces)), 1)).any():
        return None
    used = [pieces[channel.piece] for channel in USED[bits]]
    return np.stack(used + [np.zeros_like(left)] * (CHANNELS - len(used)), -1)


def _rounded(values: Array, dtype: str) -> Array:
    """float64, to numbers of float16 or bfloat16."""
    with np.errstate(over="ignore", invalid="ignore"):
        made = stored(values.astype(np.float32), dtype)
    return (made if dtype == "float16" else (made.astype(np.uint32) << 16).view(np.float32)).astype(np.float64)


def widened(values: Array, positions: Array | None, bits: int, dtype: str) -> Array:
    """Keys or values ``[..., n, D]`` with the channels of a cache that has them, ``[..., n, D + CHANNELS]``, stored
    alike.

    positions: of keys, ``[n]``; None for values, whose channels are zeros.
    """
    more = np.zeros(CHANNELS, np.float32) if positions is None else of_keys(positions, bits)
    return np.concatenate((values, np.broadcast_to(stored(more, dtype), (*values.shape[:-1], CHANNELS))), -1)
