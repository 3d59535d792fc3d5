"""Contestants timed in turns, until the medians are known well enough or the time is up.

In each turn every contestant makes some calls that are not timed and then one that is: what it finds is neither the
cache lines nor the spinning threads of the one before. The order rotates, and figures of one turn are neighbours, so
that a slow moment of the machine falls on both sides of a ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pe_onnx.intervals import median_interval, ratio_interval

SETTLING_S = 0.03
"""Threads of onnxruntime's and PyTorch's pools spin for some tens of ms after a run, and would take a core from the
next contestant."""
CHECK_EVERY = 5
"""Turns between two looks at the intervals."""

Seconds = tuple[float, ...]
"""Of one timed call: the whole, and parts of it where the call tells them."""


class Turns(NamedTuple):
    """What was timed."""

    times: dict[str, list[Seconds]]
    """Of each contestant, in order of the turns."""
    precision: float
    """The widest interval's half width, of a median or of a ratio to the first contestant, relative to it."""
    ended_by: str
    """``precision``, ``budget``, or ``turns`` where there were as many as allowed."""


def in_turns(
    calls: Mapping[str, Callable[[], Seconds]],
    deadline: float,
    precision: float,
    least: int,
    most: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Time each of the calls, which return what they took, at least once, and further until ``deadline``.

    Ends before it after ``least`` turns or more where all intervals are within ``precision``, or after ``most`` turns.
    deadline: of ``clock``, s. warm_up: turns that are not counted, no more of them once the deadline has passed.
    """
    names = list(calls)
    times: dict[str, list[Seconds]] = {name: [] for name in names}
    turn = -warm_up
    while True:
        if turn < 0 and clock() >= deadline:
            turn = 0
        rotation = turn % len(names)
        for name in names[rotation:] + names[:rotation]:
            if len(names) > 1:
                _settle(calls[name], clock)
            took = calls[name]()
            if turn >= 0:
                times[name].append(took)
        turn += 1
        late = clock() >= deadline
        if turn >= 1 and (late or turn >= most or (turn >= least and turn % CHECK_EVERY == 0)):
            reached = widest(times)
            if reached <= precision and turn >= least:
                return Turns(times, reached, "precision")
            if late or turn >= most:
                return Turns(times, reached, "budget" if late else "turns")


def widest(times: Mapping[str, list[Seconds]]) -> float:
    """The relative half width of the widest interval: of each median, and of each ratio to the first contestant."""
    totals = {name: [seconds[0] for seconds in series] for name, series in times.items()}
    first, *others = totals
    intervals = [median_interval(series) for series in totals.values()]
    intervals += [ratio_interval(totals[name], totals[first]) for name in others]
    return max(interval.relative for interval in intervals)


def _settle(call: Callable[[], Seconds], clock: Callable[[], float]) -> None:
    """Calls that are not timed: at least one."""
    until = clock() + SETTLING_S
    while True:
        call()
        if clock() >= until:
            return
