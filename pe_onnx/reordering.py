"""Reorder the rows of arrays in place: row b becomes what row ``parents[b]`` was; one row of memory is to spare.

``parents[b]`` gives every row one arrow to what it reads. A row that no other waits to read can be overwritten; when
there is none left, what remains are cycles, and each takes one row out through ``SPARE``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pe_onnx.device_arrays import DeviceArray
from pe_onnx.errors import InputError

SPARE = -1
"""Stands for the row to spare."""

BLOCK_TOKENS = 64

Move = tuple[int, int, int]
"""``(to, source, row)``: copy ``source`` over ``to``, the part of it that ``row`` will need."""


def moves(parents: Sequence[int]) -> list[Move]:
    """The copies, in an order in which no row is overwritten before it was read for the last time."""
    waiting = {b: int(parent) for b, parent in enumerate(parents) if parent != b}
    readers = Counter(waiting.values())
    free = [b for b in waiting if not readers[b]]
    order = []
    while waiting:
        if free:
            b = free.pop()
        else:
            b = next(iter(waiting))
            reader = next(row for row, parent in waiting.items() if parent == b)
            order.append((SPARE, b, reader))
            waiting[reader] = SPARE
        source = waiting.pop(b)
        order.append((b, source, b))
        readers[source] -= 1
        if not readers[source] and source in waiting:
            free.append(source)
    return order


def reorder_rows(buffers: Sequence[DeviceArray], parents: Sequence[int], slots: Mapping[int, slice]) -> int:
    """Carry out ``moves`` in place on each of some ``[B, K, S, D]``, and return the bytes copied.

    ``slots[b]`` are those of S in which row b and its parent differ, for each b that is not its own parent.
    """
    order, copied = moves(parents), 0
    counts = {row: max(part.stop - part.start, 0) for row, part in slots.items()}
    longest = max((counts[row] for to, _, row in order if to == SPARE), default=0)
    for buffer in buffers:
        _, K, _, D = buffer.shape
        spare = buffer.like((1, K, longest, D))
        for to, source, row in order:
            begin, count = slots[row].start, counts[row]
            if to == SPARE:
                copied += spare.copy_block(0, 0, buffer, source, begin, count)
            elif source == SPARE:
                copied += buffer.copy_block(to, begin, spare, 0, 0, count)
            else:
                copied += buffer.copy_block(to, begin, buffer, source, begin, count)
    return copied


def checked_parents(parents: Sequence[int] | np.ndarray[Any, Any], rows: int) -> np.ndarray[Any, Any]:
    """int64 ``[rows]``. Raises InputError for what does not name one of the rows for each."""
    checked = np.asarray(parents, np.int64)
    if checked.shape != (rows,) or checked.min() < 0 or checked.max() >= rows:
        raise InputError(f"parents = {checked.tolist()} must be {rows} rows in 0..{rows - 1}")
    return checked


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    shorter = min(len(a), len(b))
    for begin in range(0, shorter, BLOCK_TOKENS):
        block = slice(begin, min(begin + BLOCK_TOKENS, shorter))
        if a[block] != b[block]:
            return next(i for i in range(begin, shorter) if a[i] != b[i])
    return shorter
