"""Speed of the contestants of ``peers.py``: fresh starts one by one, then decode steps and prompts in turns.

Only one worker computes at any moment. In each turn every contestant makes some steps that are not timed and then a
block that is, in an order that rotates; figures of one turn are neighbours, so that a slow moment of the machine falls
on both sides of a ratio. In each round all processes are made anew: pages fall elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import click
from peer_processes import WorkerError, WorkerProcess

PROMPT_TOKENS, GENERATED_TOKENS = 128, 64
"""Of the process that peak memory is read from."""
RESERVE_TOKENS = 16
WARM_PROMPT = 32
SPARE_SHARE = 0.8
"""Of the free memory that workers may take together."""

Start = Callable[[], WorkerProcess]


@dataclass
class Times:
    """Seconds of one contestant, by size; blocks of steps in order of the turns."""

    decode: dict[int, list[list[float]]] = field(default_factory=dict)
    prefill: dict[int, list[float]] = field(default_factory=dict)
    idle_shares: list[float] = field(default_factory=list)
    error: str | None = None

    def decode_ms(self, context: int) -> float | None:
        """The median over turns of the medians of their steps."""
        blocks = self.decode.get(context)
        return 1000 * statistics.median(map(statistics.median, blocks)) if blocks else None

    def prefill_tokens_per_s(self, tokens: int) -> float | None:
        times = self.prefill.get(tokens)
        return tokens / statistics.median(times) if times else None


def fresh_starts(start: Start, starts: int) -> dict[str, Any]:
    """Medians over processes of their own, after one that brings the files into memory; the last one generates.

    Raises WorkerError.
    """
    capacity = PROMPT_TOKENS + GENERATED_TOKENS + RESERVE_TOKENS
    loads, generated = [], {}
    for number in range(starts + 1):
        with start() as worker:
            loads.append(worker.load(capacity))
            if number == starts:
                generated = worker.ask("generate", prompt=PROMPT_TOKENS, steps=GENERATED_TOKENS)
    medians = {key: statistics.median(load[key] for load in loads[1:]) for key in ("import_s", "load_s")}
    return {**medians, **generated}


def measure(
    starts: dict[str, Start],
    contexts: Sequence[int],
    prompts: Sequence[int],
    rounds: int,
    turns: int,
    steps: int,
) -> dict[str, Times]:
    """Of each contestant; one that fails is left out of what follows, with its reason."""
    times = {name: Times() for name in starts}
    for number in range(rounds):
        with ExitStack() as stack:
            workers = {}
            for name in rotated(list(starts), number):
                if times[name].error is None:
                    workers[name] = stack.enter_context(starts[name]())
            attempt = _Round(workers, times)
            label = f"round {number + 1} of {rounds}"
            click.echo(f"{label}: load", err=True)
            attempt.each(number, lambda name, worker: worker.load(max(*contexts, *prompts, WARM_PROMPT)))
            for tokens in sorted(prompts):
                for turn in range(turns):
                    click.echo(f"{label}: prompt of {tokens} tokens, turn {turn + 1}", err=True)
                    attempt.prefill(turn, tokens)
            for context in sorted(contexts):
                click.echo(f"{label}: fill to {context} tokens", err=True)
                attempt.each(0, lambda name, worker, context=context: worker.ask("fill", tokens=context - 1))
                for turn in range(turns):
                    click.echo(f"{label}: decode at {context} tokens, turn {turn + 1}", err=True)
                    attempt.decode(turn, context, steps)
            for name, worker in workers.items():
                times[name].idle_shares += worker.idle_shares
    return times


class _Round:
    """The workers of one round that have not failed."""

    def __init__(self, workers: dict[str, WorkerProcess], times: dict[str, Times]) -> None:
        self.workers, self.times = workers, times

    def each(self, turn: int, call: Callable[..., Any]) -> None:
        for name in rotated(list(self.workers), turn):
            try:
                call(name, self.workers[name])
            except WorkerError as error:
                click.echo(f"{name}: {error}", err=True)
                self.times[name].error = str(error)
                self.workers.pop(name).close()

    def prefill(self, turn: int, tokens: int) -> None:
        def call(name: str, worker: WorkerProcess) -> None:
            worker.ask("prefill", tokens=WARM_PROMPT)
            took = worker.ask("prefill", tokens=tokens)["seconds"]
            self.times[name].prefill.setdefault(tokens, []).append(took)

        self.each(turn, call)

    def decode(self, turn: int, context: int, steps: int) -> None:
        def call(name: str, worker: WorkerProcess) -> None:
            took = worker.ask("decode", context=context, steps=steps)["seconds"]
            self.times[name].decode.setdefault(context, []).append(took)

        self.each(turn, call)


def ratio(above: Times, below: Times, context: int) -> float | None:
    """Of decode steps: the median over turns of the ratio of neighbouring blocks."""
    blocks = zip(above.decode.get(context, []), below.decode.get(context, []), strict=False)
    ratios = [statistics.median(a) / statistics.median(b) for a, b in blocks]
    return statistics.median(ratios) if ratios else None


def groups(needed_bytes: dict[str, int], free_bytes: int | None) -> list[list[str]]:
    """Contestants that fit into memory together, in order; all where nobody says how much there is."""
    result: list[list[str]] = [[]]
    left = limit = SPARE_SHARE * free_bytes if free_bytes is not None else float("inf")
    for name, needed in needed_bytes.items():
        if needed > left and result[-1]:
            result.append([])
            left = limit
        result[-1].append(name)
        left -= needed
    return [group for group in result if group]


def rotated(names: Iterable[str], by: int) -> list[str]:
    given = list(names)
    return given[by % len(given) :] + given[: by % len(given)] if given else given
