"""The ways in which a parity check runs the same tokens: whole, in chunks, step by step, ragged, padded.

A mode takes an opener of caches and the rows of tokens, and gives the bundle's logits position by position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pe_onnx.bundle import Bundle
from pe_onnx.errors import ConfigError
from pe_onnx.kv_cache import GrowingCache, KVCache

Array = np.ndarray[Any, Any]


class Opener(Protocol):
    """Opens empty caches that note their runs."""

    bundle: Bundle

    def __call__(self, rows: Sequence[int], max_length: int, chunk_tokens: int | None = None) -> KVCache:
        """rows: which of the parity check's rows the cache is for."""
        ...


class Pair(NamedTuple):
    """The bundle's logits ``[V]`` after token ``position`` of ``row``, which is row ``slot`` of the cache."""

    row: int
    position: int
    logits: Array
    cache: KVCache
    slot: int


def _whole(open_cache: Opener, rows: list[Array]) -> Iterator[Pair]:
    """Each row in one run, at full length and at odd shorter ones; every position where the bundle gives all."""
    for b, row in enumerate(rows):
        for n in sorted({1, 2, row.size // 3 | 1, row.size}):
            yield from _prefilled(open_cache, row[:n], b, row.size)


def _chunks(open_cache: Opener, rows: list[Array]) -> Iterator[Pair]:
    """Each row in chunks of 13 tokens."""
    for b, row in enumerate(rows):
        for n in sorted({row.size // 2, row.size}):
            yield from _prefilled(open_cache, row[:n], b, 13)


def _prefilled(open_cache: Opener, tokens: Array, row: int, chunk: int) -> Iterator[Pair]:
    every = open_cache.bundle.logits == "all"
    cache = open_cache([row], tokens.size, chunk)
    logits = cache.prefill([tokens.tolist()], all_logits=every)[0]
    if every:
        yield from (Pair(row, i, x, cache, 0) for i, x in enumerate(logits))
    else:
        yield Pair(row, tokens.size - 1, logits, cache, 0)


def _steps(open_cache: Opener, rows: list[Array]) -> Iterator[Pair]:
    """The first row token by token from an empty cache."""
    cache = open_cache([0], rows[0].size)
    for i, token in enumerate(rows[0]):
        yield Pair(0, i, cache.decode([int(token)])[0], cache, 0)


def _ragged(open_cache: Opener, rows: list[Array]) -> Iterator[Pair]:
    """All rows in one batch with prompts of different lengths, then steps, then a second prompt each."""
    cache = open_cache(range(len(rows)), max(row.size for row in rows))
    first = [max(1, row.size * (1 + 3 * (b % 3)) // 8) for b, row in enumerate(rows)]  # 1/8, 4/8, 7/8
    for b, logits in enumerate(cache.prefill([row[:n].tolist() for row, n in zip(rows, first, strict=True)])):
        yield Pair(b, first[b] - 1, logits, cache, b)
    at = first
    for _ in range(8):
        if any(n >= row.size for row, n in zip(rows, at, strict=True)):
            return
        logits = cache.decode([int(row[n]) for row, n in zip(rows, at, strict=True)])
        yield from (Pair(b, n, logits[b], cache, b) for b, n in enumerate(at))
        at = [n + 1 for n in at]
    ends = [min(row.size, n + 1 + 4 * b) for b, (row, n) in enumerate(zip(rows, at, strict=True))]
    if any(end <= n for end, n in zip(ends, at, strict=True)):
        return
    second = [row[n:end].tolist() for row, n, end in zip(rows, at, ends, strict=True)]
    for b, logits_b in enumerate(cache.prefill(second)):
        yield Pair(b, ends[b] - 1, logits_b, cache, b)


def _padded(open_cache: Opener, rows: list[Array], side: str) -> Iterator[Pair]:
    """A batch with zeros in the mask on one side, or everywhere; then steps."""
    cache = open_cache(range(len(rows)), max(row.size for row in rows))
    if not isinstance(cache, GrowingCache):
        raise ConfigError(f"mode {side}_padding is for the portable target; ort takes compact rows only")
    longest = max(row.size for row in rows)
    used = [max(1, row.size // 2 - 5 * b) for b, row in enumerate(rows)]
    rng = np.random.default_rng(1)
    ids, valid = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
    for b, (row, n) in enumerate(zip(rows, used, strict=True)):
        slots = {
            "left": np.arange(longest - n, longest),
            "right": np.arange(n),
            "interior": np.sort(rng.choice(longest, n, replace=False)),
        }[side]
        ids[b, slots], valid[b, slots] = row[:n], 1
    logits = cache.run(ids, valid)
    for b, n in enumerate(used):
        slots = np.flatnonzero(valid[b])
        if open_cache.bundle.logits == "all":
            yield from (Pair(b, i, logits[b, slot], cache, b) for i, slot in enumerate(slots))
        else:
            yield Pair(b, n - 1, logits[b, 0], cache, b)
    for k in range(min(5, *(row.size - n for row, n in zip(rows, used, strict=True)))):
        step = cache.decode([int(row[n + k]) for row, n in zip(rows, used, strict=True)])
        yield from (Pair(b, n + k, step[b], cache, b) for b, n in enumerate(used))


def _left_padding(open_cache: Opener, rows: list[Array]) -> Iterator[Pair]:
    return _padded(open_cache, rows, "left")


def _right_padding(open_cache: Opener, rows: list[Array]) -> Iterator[Pair]:
    return _padded(open_cache, rows, "right")


def _interior_padding(open_cache: Opener, rows: list[Array]) -> Iterator[Pair]:
    return _padded(open_cache, rows, "interior")


MODES: dict[str, Callable[[Opener, list[Array]], Iterator[Pair]]] = {
    "whole": _whole,
    "chunks": _chunks,
    "steps": _steps,
    "ragged": _ragged,
    "left_padding": _left_padding,
    "right_padding": _right_padding,
    "interior_padding": _interior_padding,
}
