"""A latency gate that does not cry wolf: a bundle's times relative to work of known size, against a baseline's.

Both are measured in the same run, in turns, in several fresh processes (``yardstick.py`` says why, and what else was
tried). What exceeds the allowance is measured once more, and both measurements together decide. On the CPU what counts
is the processor time of one thread, which neither other processes nor the number of cores change much; a change in
how work is spread over threads does not show. With ``threads`` above 1, and on CUDA, it is wall time: that needs
a machine without other work.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pe_onnx.baselines import read_baselines, write_baselines
from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.contestants import BundleContestant, random_tokens
from pe_onnx.errors import ConfigError
from pe_onnx.fresh_process import call_fresh
from pe_onnx.intervals import LEAST_SAMPLES
from pe_onnx.machine import describe_machine, versions
from pe_onnx.providers import PROVIDERS, SHORT, resolve_provider
from pe_onnx.relative import MEASURES, Relative
from pe_onnx.session import MAX_THREADS
from pe_onnx.yardstick import Sizes, Yardstick

__all__ = [
    "Regression",
    "Relative",
    "compare",
    "decide",
    "measure",
    "read_baselines",
    "sizes_of",
    "write_baselines",
]

DEPTH_TOKENS, PROMPT_TOKENS = 256, 32
LEAST_PROCESSES, MOST_PROCESSES = LEAST_SAMPLES, 8
"""The least are started though the budget is out: on a busy machine a verdict takes longer and is no less sure.
Of fewer there is no interval of 95 %."""
BASELINE_PROCESSES = 16
"""A baseline's own error is in every verdict: it is worth more processes."""
BASELINE_S, MEASUREMENT_S = 60.0, 5.0
"""Of a baseline, and of each measurement that is compared with one: after which no further process is started."""
SAMPLE_S = 0.004
"""A shorter call is repeated within one sample: a clock's steps and a call's overhead are small beside this."""
ROUNDS = {"decode": 15, "prefill": 5}
LEAST_ROUNDS = 3
PROCESS_S = 2.0
"""Of samples in one process, after which it ends with fewer rounds."""
CALM = {"session.intra_op.allow_spinning": "0"}
"""Threads that wait without spinning: what spins takes a core from the neighbour."""


@dataclass
class Regression:
    """The verdict on a bundle against its baseline."""

    bundle: str
    passed: bool
    change: float
    """Of the measure that changed for the worse the most: 0.03 is 3 % slower."""
    interval: tuple[float, float] | None
    """95 %, of this change; the baseline's own uncertainty is not in it. None of fewer than 6 processes."""
    measure: str
    changes: dict[str, float]
    """By measure."""
    max_regression: float
    first_changes: dict[str, float] | None
    """Where it took a second measurement, what the first one said."""
    text: str
    """One line."""
    measured: Relative

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **dataclasses.asdict(self),
            "interval": self.interval and list(self.interval),
            "measured": self.measured.to_dict(),
        }


def measure(
    folder: str | Path,
    *,
    provider: str = "cpu",
    threads: int = 0,
    yardstick: Sizes | None = None,
    budget_s: float = BASELINE_S,
    processes: int = BASELINE_PROCESSES,
) -> Relative:
    """Measure a bundle's decode step and prompt as multiples of a yardstick's: by default for a baseline.

    threads: 0 for one thread and its processor time on the CPU; more are measured in wall time. yardstick: the sizes
    of an earlier measurement; by default those of the bundle. budget_s: after which no further process is started;
    there are 6 at least and ``processes`` at most. In memory there are about four times the bundle's weights: its own
    and the yardstick's, both packed too.

    Raises ConfigError, ProviderError and BundleError.
    """
    bundle = read_bundle(folder)
    resolved, threads = _checked(provider, threads, budget_s)
    sizes = yardstick or sizes_of(bundle)
    if bundle.max_length is not None and max(sizes.depth_tokens + 1, sizes.prompt_tokens) > bundle.max_length:
        raise ConfigError(
            f"the yardstick's {sizes.depth_tokens} tokens are more than the {bundle.max_length} positions of "
            f"{folder}: make a baseline of its own"
        )
    until = time.monotonic() + budget_s
    samples: list[dict[str, float]] = []
    while len(samples) < LEAST_PROCESSES or (len(samples) < processes and time.monotonic() < until):
        samples.append(
            call_fresh(
                "pe_onnx.regression:sample",
                folder=str(folder),
                provider=resolved,
                threads=threads,
                sizes=sizes._asdict(),
            )
        )
    ratios = {name: [one[name] for one in samples] for name in MEASURES}
    clock = "processor" if _by_processor(resolved, threads) else "wall"
    return Relative(resolved, threads, clock, sizes, ratios, versions(), describe_machine())


def sizes_of(bundle: Bundle) -> Sizes:
    """A yardstick like the bundle: as many bytes of weights and of cache, at lengths that the encoding takes."""
    limit = bundle.max_length or DEPTH_TOKENS + 1
    depth, prompt = max(min(DEPTH_TOKENS, limit - 1), 1), min(PROMPT_TOKENS, limit)
    weights = int(bundle.manifest["graph"]["weight_bytes"])
    return Sizes(weights, bundle.cache_bytes_per_token * depth, depth, prompt)


def sample(folder: str, provider: str, threads: int, sizes: dict[str, int]) -> dict[str, float]:
    """In a process of its own: by measure, the median of the ratios of neighbours."""
    work = Sizes(**sizes)
    tokens = random_tokens(work.prompt_tokens, read_bundle(folder, verify=False).shape["vocab_size"])
    crossed = read_bundle(folder, verify=False).crossing is not None
    bundle = BundleContestant(folder, provider, threads, tokens if crossed else None, options=CALM)
    plain = Yardstick(work, provider, threads)
    clock = time.thread_time if _by_processor(provider, threads) else time.perf_counter
    bundle.begin(work.depth_tokens)
    begin = time.monotonic()
    decode = neighbours(bundle.step, plain.step(), clock, ROUNDS["decode"], begin + PROCESS_S / 2)
    until = begin + PROCESS_S
    prefill = neighbours(lambda: bundle.first_token(tokens), plain.prompt(), clock, ROUNDS["prefill"], until)
    return {"decode": statistics.median(decode), "prefill": statistics.median(prefill)}


def neighbours(
    above: Callable[[], Any], below: Callable[[], Any], clock: Callable[[], float], rounds: int, until: float
) -> list[float]:
    """Ratios of the time of ``above`` to that of ``below``, in turns; each is first in every other round.

    until: of ``time.monotonic``, after which there are no more rounds than LEAST_ROUNDS.
    """
    calls = [(call, _calls_in_a_sample(call, clock)) for call in (above, below)]
    ratios: list[float] = []
    while len(ratios) < LEAST_ROUNDS or (len(ratios) < rounds and time.monotonic() < until):
        took = [0.0, 0.0]
        for i in (0, 1) if len(ratios) % 2 else (1, 0):
            call, count = calls[i]
            begin = clock()
            for _ in range(count):
                call()
            took[i] = (clock() - begin) / count
        ratios.append(took[0] / took[1])
    return ratios


def _calls_in_a_sample(call: Callable[[], Any], clock: Callable[[], float]) -> int:
    """So many calls that they take SAMPLE_S; the first of them warms up."""
    call()
    begin = clock()
    call()
    return max(round(SAMPLE_S / max(clock() - begin, 1e-6)), 1)


def compare(
    folder: str | Path,
    baseline: Relative,
    max_regression: float,
    *,
    provider: str = "cpu",
    threads: int = 0,
    budget_s: float = MEASUREMENT_S,
) -> Regression:
    """Whether a bundle is slower than its baseline by more than ``max_regression`` (0.1 is 10 %), in steps or prompts.

    Measured against the baseline's yardstick. What exceeds is measured again in further processes, and the two
    measurements together decide. budget_s: of each measurement. Raises what ``measure`` raises, and ConfigError for a
    baseline of another provider or number of threads.
    """
    if not max_regression > 0:
        raise ConfigError(f"max_regression = {max_regression} must be more than 0; 0.1 is 10 %")
    resolved, threads = _checked(provider, threads, budget_s)
    if (baseline.provider, baseline.threads) != (resolved, threads):
        raise ConfigError(
            f"the baseline is of provider {baseline.provider!r} with threads = {baseline.threads}, this run of "
            f"{resolved!r} with {threads}: make a baseline of its own"
        )

    def again() -> Relative:
        return measure(
            folder,
            provider=provider,
            threads=threads,
            yardstick=baseline.yardstick,
            budget_s=budget_s,
            processes=MOST_PROCESSES,
        )

    return decide(str(folder), baseline, max_regression, again)


def decide(bundle: str, baseline: Relative, max_regression: float, take: Callable[[], Relative]) -> Regression:
    """The verdict; ``take`` makes a measurement, and is asked for a second one only where the first exceeds."""
    measured, first = take(), None
    changes = _changes(measured, baseline)
    if max(changes.values()) > max_regression:
        first = changes
        measured = measured.joined(take())
        changes = _changes(measured, baseline)
    worst = max(changes, key=lambda name: changes[name])
    base = baseline.estimate(worst).median
    estimate = measured.estimate(worst)
    interval = None if estimate.interval is None else (estimate.low / base - 1, estimate.high / base - 1)
    passed = changes[worst] <= max_regression
    text = f"{bundle}: {_words(changes)}, {max_regression:.0%} allowed"
    if first is not None:
        text += f"; a first measurement said {_words(first)}" if passed else ", confirmed by a second measurement"
    for name in ("onnxruntime", "onnxruntime-gpu"):
        then, now = baseline.tools.get(name), measured.tools.get(name)
        if then and now and then != now:
            text += f"; the baseline is of {name} {then}, this is {now}"
    if baseline.machine.get("processor") != measured.machine.get("processor"):
        text += "; the baseline is of another machine"
    return Regression(bundle, passed, changes[worst], interval, worst, changes, max_regression, first, text, measured)


def _changes(measured: Relative, baseline: Relative) -> dict[str, float]:
    return {name: measured.estimate(name).median / baseline.estimate(name).median - 1 for name in MEASURES}


def _words(changes: dict[str, float]) -> str:
    """``decode 1.8 % slower, prefill 0.3 % faster``."""
    return ", ".join(f"{name} {abs(x):.1%} {'slower' if x >= 0 else 'faster'}" for name, x in changes.items())


def _checked(provider: str, threads: int, budget_s: float) -> tuple[str, int]:
    """Provider by our short name, and threads. Raises ConfigError."""
    if not 0 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads = {threads} must be in 0..{MAX_THREADS}; 0 measures the processor time of one")
    if not 0 < budget_s < float("inf"):
        raise ConfigError(f"budget = {budget_s} must be more than 0 s")
    resolved = resolve_provider(provider)
    short = SHORT.get(resolved)
    if short is None:
        raise ConfigError(f"provider = {provider!r}: the gate is for {' and '.join(PROVIDERS)}")
    return short, threads or 1


def _by_processor(provider: str, threads: int) -> bool:
    return provider == "cpu" and threads == 1
