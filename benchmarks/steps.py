"""Decode steps timed against each other: what the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

WARM_UP = 5


def median_ms(times: list[float]) -> float:
    return 1000 * statistics.median(times)


def fill(cache: Any, tokens: int, rng: np.random.Generator) -> Callable[[], None]:
    """Random keys and values in the first ``tokens`` slots: what a decode step costs does not depend on them. Returns a
    function that takes the cache back to them."""
    cache.reserve(tokens + 1)
    back: Callable[[], None] = cache.fill(tokens, rng)
    return back


def decode_times(
    models: dict[str, Any], context: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each decode step at ``context`` cached tokens, contestants in turn, each first in its turn."""
    rng = np.random.default_rng(0)
    caches, back = {}, {}
    for name, model in models.items():
        caches[name] = model.cache(1, context + 8)
        back[name] = fill(caches[name], context, rng)
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + WARM_UP):
        order = list(caches)
        order = order[repeat % len(order) :] + order[: repeat % len(order)]
        for name in order:
            cache = caches[name]
            back[name]()
            begin = clock()
            cache.decode([7])
            if repeat >= WARM_UP:
                times[name].append(clock() - begin)
    return times
