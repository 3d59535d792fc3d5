"""Turns: who is timed when, and what ends them. The clock is a counter; no time passes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from pe_onnx.turns import SETTLING_S, Turns, in_turns, widest


class Machine:
    """A clock, and calls that take what they are told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, seconds: Callable[[int], float]) -> Callable[[], tuple[float, ...]]:
        def timed() -> tuple[float, ...]:
            took = seconds(self.called.count(name))
            self.called.append(name)
            self.now += took
            return (took,)

        return timed


def run(machine: Machine, calls: dict[str, Callable[[], tuple[float, ...]]], budget: float, **options: int) -> Turns:
    chosen = {"least": 6, "most": 1000, "warm_up": 1, **options}
    return in_turns(calls, machine.now + budget, 0.03, clock=machine.clock, **chosen)


def test_steady_times_end_by_precision() -> None:
    machine = Machine()
    turns = run(machine, {"a": machine.call("a", lambda i: 0.01)}, 100)
    assert turns.ended_by == "precision"
    assert turns.precision == 0
    assert len(turns.times["a"]) == 10  # the first look after the least number


def test_scattered_times_end_by_budget() -> None:
    machine = Machine()
    turns = run(machine, {"a": machine.call("a", lambda i: 0.01 if i % 2 else 0.03)}, 2)
    assert turns.ended_by == "budget"
    assert turns.precision > 0.03
    assert 95 <= len(turns.times["a"]) <= 105


def test_scattered_times_end_by_the_most_turns() -> None:
    machine = Machine()
    turns = run(machine, {"a": machine.call("a", lambda i: 0.01 if i % 2 else 0.03)}, 100, most=50)
    assert (turns.ended_by, len(turns.times["a"])) == ("turns", 50)


def test_everyone_is_timed_once_though_the_budget_is_nothing() -> None:
    machine = Machine()
    turns = run(machine, {name: machine.call(name, lambda i: 1.0) for name in "ab"}, 0)
    assert {name: len(times) for name, times in turns.times.items()} == {"a": 1, "b": 1}
    assert turns.ended_by == "budget"
    assert math.isinf(turns.precision)


def test_a_contestant_alone_does_not_settle_and_others_do() -> None:
    """Untimed calls for as long as the other's threads spin, and one at least."""
    alone = Machine()
    run(alone, {"a": alone.call("a", lambda i: 0.01)}, 100, warm_up=0)
    assert len(alone.called) == 10
    machine = Machine()
    seconds = {"quick": 1 / 128, "slow": 1.0}  # exact in binary
    turns = run(machine, {name: machine.call(name, lambda i, s=s: s) for name, s in seconds.items()}, 1000, warm_up=0)
    count = len(turns.times["quick"])
    assert machine.called.count("slow") == 2 * count
    assert machine.called.count("quick") == count * (1 + math.ceil(128 * SETTLING_S))


def test_the_order_rotates() -> None:
    machine = Machine()
    run(machine, {name: machine.call(name, lambda i: 1.0) for name in "abc"}, 1000, warm_up=0)
    firsts = machine.called[::6]
    assert firsts[:4] == ["a", "b", "c", "a"]


@pytest.mark.parametrize("ratio_scatters", [False, True])
def test_a_ratio_must_be_known_too(ratio_scatters: bool) -> None:
    a = [(1.0 + 0.02 * (i % 2),) for i in range(40)]
    b = [(1.0 + 0.02 * ((i + ratio_scatters) % 2),) for i in range(40)]
    assert (widest({"a": a, "b": b}) > 0.015) == ratio_scatters
