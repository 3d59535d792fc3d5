"""What a cache on a device is put through, and one on the CPU beside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pe_onnx.cached_rows import KVCache

Array = np.ndarray[Any, Any]


def script(cache: KVCache, steps: int) -> list[Array]:
    """The logits of prompts, steps past a growing buffer and the length of a recording, a reordering, a row that rests,
    a step back, and more rows; of an empty cache of three rows."""
    rng = np.random.default_rng(0)
    made = [np.array(cache.prefill([rng.integers(0, 256, n).tolist() for n in (5, 240, 31)]))]
    for _ in range(steps):
        made.append(cache.decode(rng.integers(0, 256, 3)).copy())
    cache.reorder([2, 0, 2])
    made.append(cache.decode([1, 2, 3]).copy())
    made.append(cache.decode([1, 2, 3], np.array([True, False, True])).copy()[[0, 2]])
    cache.truncate(cache.lengths - [3, 7, 1])
    made.append(cache.decode([4, 5, 6]).copy())
    cache.expand(2)
    made.append(cache.decode(range(6)).copy())
    return made
