"""Latency of a bundle: load, first token, prefill, decode at several depths, memory, and where the time goes.

Everything is measured until the interval of the median is tight or the time is up. Load time and peak memory are those
of processes of their own, which import neither PyTorch nor what is compared. A time holds for a machine and its
load; the ratios of a run hold further, since contestants are timed in turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pe_onnx.bench_report import BenchReport, Decode, Figures, Ratio
from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.contestants import (
    BundleContestant,
    Contestant,
    check_memory,
    random_tokens,
)
from pe_onnx.errors import ConfigError
from pe_onnx.fresh_process import call_fresh, status_bytes
from pe_onnx.intervals import Estimate, median_interval, percentile, ratio_interval
from pe_onnx.machine import RUNTIME_PACKAGES, describe_machine, versions
from pe_onnx.operator_times import profile as profile_bundle
from pe_onnx.providers import device_of, resolve_provider
from pe_onnx.session import MAX_THREADS
from pe_onnx.turns import Seconds, Turns, in_turns

DEPTHS = (128, 1024)
TORCH = "torch"
LOADS = 3
"""Fresh processes that load the bundle; the last one runs it too."""
LOAD_SHARE = 0.3
"""Of the budget, after which no further process is started to load in."""
LEAST_STEPS, MOST_STEPS = 30, 5000
LEAST_PROMPTS, MOST_PROMPTS = 6, 200


def bench(
    folder: str | Path,
    *,
    provider: str = "cpu",
    threads: int = 0,
    depths: Sequence[int] = DEPTHS,
    prompt_tokens: int = 128,
    budget_s: float = 30.0,
    precision: float = 0.03,
    profile: bool = False,
    compare: Sequence[str | Path] = (),
    reference: Any = None,
    source_tokens: int | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> BenchReport:
    """Measure a bundle at batch 1, and others beside it.

    provider, threads: of all bundles; 0 threads for one a core. depths: tokens in the cache before a decode step,
    clipped to what the encoding takes. prompt_tokens: of the prompt behind prefill and first token, clipped too; of an
    encoder-decoder these are ``source_tokens`` (default prompt_tokens) of a source, over which its decoder is measured.
    budget_s: for all that is timed once everything is loaded, in s, and half as much again for the profile; it is
    shared among the measurements, each of which is made once at least.
    precision: half the width of the 95 % interval of the median, relative to it, at which a measurement ends early.
    compare: folders of other bundles, or ``torch`` for the bundle's own reference in PyTorch, eager, with its cache;
    a folder of this name is ``./torch``, or a Path.
    reference: the checkpoint's path, a module, or whatever ``check_parity`` takes, where that is not where it was.

    Raises ConfigError for what is out of range, InputError for a cache that does not fit into memory, BundleError for
    a bundle that is broken, CheckpointError where PyTorch's side cannot be had.
    """
    _check(threads, depths, prompt_tokens, budget_s, precision, source_tokens)
    folder = Path(folder)
    bundle = read_bundle(folder)
    others = [(TORCH if other == TORCH else Path(other)) for other in compare]
    if reference is not None and TORCH not in others:
        raise ConfigError("reference is what --compare torch runs; give that too")
    read = [bundle, *(read_bundle(other) for other in others if isinstance(other, Path))]
    if len({b.crossing is None for b in read}) > 1:
        raise ConfigError("a decoder and an encoder-decoder cannot be compared: their prompts differ")
    resolved = resolve_provider(provider)
    if profile and resolved != "CPUExecutionProvider":
        raise ConfigError("profile is for provider 'cpu': on another onnxruntime sees kernels start, not end")
    limit = min((b.max_length for b in read if b.max_length is not None), default=math.inf)
    clipped = sorted({int(min(depth, limit - 1)) for depth in depths})
    prompt_tokens = int(min(prompt_tokens, limit))
    crossed = bundle.crossing is not None
    prompt = random_tokens(source_tokens or prompt_tokens if crossed else prompt_tokens, _vocabulary(read))
    for one in read:
        check_memory(one, clipped[-1] + 1)

    begin = time.perf_counter()
    names = _names([folder, *others])
    figures = []
    for name, each in zip(names, [folder, *others], strict=True):
        if each == TORCH:
            figures.append(Figures(name))
            continue
        progress(f"load {name}")
        until = begin + LOAD_SHARE * budget_s
        figures.append(_load(name, Path(each), provider, threads, clipped[-1], prompt, until))
    source = prompt if crossed else None
    contestants: dict[str, Contestant] = {}
    for name, each in zip(names, [folder, *others], strict=True):
        progress(f"open {name}")
        if each == TORCH:
            contestants[name] = _eager(bundle, reference, name, threads, source)
        else:
            contestants[name] = BundleContestant(each, provider, threads, source, name)

    deadline = time.perf_counter() + budget_s
    stages = len(clipped) + 1
    report = BenchReport(
        bundle=str(folder),
        provider=resolved,
        threads=threads,
        depths=clipped,
        clipped=clipped != sorted(set(depths)),
        prompt_tokens=len(prompt),
        encoder_decoder=crossed,
        budget_s=budget_s,
        precision=precision,
        contestants=figures,
        machine=describe_machine(),
        tools=versions((*RUNTIME_PACKAGES, *(("torch", "transformers") if TORCH in others else ()))),
    )
    progress("prefill")
    calls = {name: _prompt_call(contestant, prompt) for name, contestant in contestants.items()}
    turns = in_turns(calls, _share(deadline, stages), precision, LEAST_PROMPTS, MOST_PROMPTS)
    _note_prompts(report, turns, len(prompt))
    for i, depth in enumerate(clipped):
        progress(f"decode at {depth} tokens")
        for contestant in contestants.values():
            contestant.begin(depth)
        calls = {name: _step_call(contestant) for name, contestant in contestants.items()}
        turns = in_turns(calls, _share(deadline, stages - 1 - i), precision, LEAST_STEPS, MOST_STEPS, warm_up=3)
        _note_steps(report, turns, depth, read)
    report.elapsed_s = time.perf_counter() - begin
    if profile:
        progress("profile")
        contestants.clear()
        report.profile = profile_bundle(folder, provider, threads, clipped, prompt, source, budget_s / 2)
    return report


def load_and_peak(
    folder: str, provider: str, threads: int, depth_tokens: int, prompt: list[int], source: list[int] | None, run: bool
) -> dict[str, Any]:
    """In a process of its own: seconds to load the bundle, and the most bytes it took to run a prompt and a step."""
    contestant = BundleContestant(folder, provider, threads, source)
    if run:
        contestant.first_token(prompt)
        contestant.begin(depth_tokens)
        contestant.step()
    return {"load_s": contestant.load_s, "peak_memory_bytes": status_bytes("VmHWM") if run else None}


def _load(name: str, folder: Path, provider: str, threads: int, depth: int, prompt: list[int], until: float) -> Figures:
    source = prompt if read_bundle(folder, verify=False).crossing is not None else None
    loads, peak = [], None
    for i in reversed(range(LOADS)):
        if time.perf_counter() > until and i:
            continue  # the last one, which runs too, is made in any case
        result = call_fresh(
            "pe_onnx.latency:load_and_peak",
            folder=str(folder),
            provider=provider,
            threads=threads,
            depth_tokens=depth,
            prompt=prompt,
            source=source,
            run=i == 0,
        )
        loads.append(result["load_s"])
        peak = result["peak_memory_bytes"]
    return Figures(name, load_s=median_interval(loads).median, loads=len(loads), peak_memory_bytes=peak)


def _eager(bundle: Bundle, reference: Any, name: str, threads: int, source: list[int] | None) -> Contestant:
    from pe_onnx.eager import eager  # PyTorch

    return eager(bundle, reference, name, threads, source)


def _share(deadline: float, stages: int) -> float:
    now = time.perf_counter()
    return now + max(deadline - now, 0) / stages


def _prompt_call(contestant: Contestant, prompt: list[int]) -> Callable[[], Seconds]:
    return lambda: tuple(contestant.first_token(prompt))


def _step_call(contestant: Contestant) -> Callable[[], Seconds]:
    def call() -> Seconds:
        begin = time.perf_counter()
        contestant.step()
        return (time.perf_counter() - begin,)

    return call


def _note_prompts(report: BenchReport, turns: Turns, tokens: int) -> None:
    for figures in report.contestants:
        totals, prefills = zip(*turns.times[figures.name], strict=True)
        first = median_interval(totals).scaled(1000)
        figures.first_token_ms, figures.first_token_interval_ms = first.median, first.interval
        prefill = median_interval(prefills)
        figures.prefill_tokens_per_s = tokens / prefill.median
        if prefill.interval is not None:
            figures.prefill_interval_tokens_per_s = (tokens / prefill.high, tokens / prefill.low)
        figures.prompts = first.samples
    report.prompts_ended_by, report.prompts_precision = turns.ended_by, turns.precision
    _note_ratios(report, turns, "first_token", None)


def _note_steps(report: BenchReport, turns: Turns, depth: int, read: Sequence[Bundle]) -> None:
    bundles = {figures.name: b for figures, b in zip(_of_bundles(report), read, strict=True)}
    for figures in report.contestants:
        times_ms = [1000 * seconds for (seconds,) in turns.times[figures.name]]
        estimate = median_interval(times_ms)
        figures.decode.append(
            Decode(
                depth_tokens=depth,
                median_ms=estimate.median,
                interval_ms=estimate.interval,
                p50_ms=percentile(times_ms, 50),
                p90_ms=percentile(times_ms, 90),
                p99_ms=percentile(times_ms, 99),
                steps=len(times_ms),
                precision=None if math.isinf(estimate.relative) else estimate.relative,
                ended_by=turns.ended_by,
            )
        )
        if figures.name in bundles:
            figures.cache_bytes_per_token = bundles[figures.name].cache_bytes_on(device_of(report.provider).kind)
            figures.cache_bytes[depth] = figures.cache_bytes_per_token * depth
    _note_ratios(report, turns, "decode", depth)


def _of_bundles(report: BenchReport) -> list[Figures]:
    return [figures for figures in report.contestants if figures.loads]


def _note_ratios(report: BenchReport, turns: Turns, measure: str, depth: int | None) -> None:
    first, *others = ([seconds[0] for seconds in turns.times[f.name]] for f in report.contestants)
    for figures, series in zip(report.contestants[1:], others, strict=True):
        ratio: Estimate = ratio_interval(series, first)
        report.ratios.append(
            Ratio(figures.name, report.contestants[0].name, measure, depth, ratio.median, ratio.interval, ratio.samples)
        )


def _vocabulary(read: Sequence[Bundle]) -> int:
    return min(b.shape["vocab_size"] for b in read)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """A short name for each contestant: the folder's own, or the path where two have the same."""
    short = [TORCH if each == TORCH else Path(each).resolve().name for each in folders]
    paths = [f"./{each}" if each != TORCH and str(each) == TORCH else str(each) for each in folders]
    long = [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]
    return [name if long.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(long)]


def _check(
    threads: int,
    depths: Sequence[int],
    prompt_tokens: int,
    budget_s: float,
    precision: float,
    source_tokens: int | None,
) -> None:
    """Raises ConfigError for what is out of range."""
    if not 0 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads = {threads} must be in 0..{MAX_THREADS}; 0 is one for each core")
    if not depths:
        raise ConfigError("depths = () must name at least one number of tokens")
    counts: Mapping[str, int | None] = {
        **{"depths": min(depths)},
        "prompt_tokens": prompt_tokens,
        "source_tokens": source_tokens,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1 token")
    if not 0 < budget_s < math.inf:
        raise ConfigError(f"budget = {budget_s} must be more than 0 s")
    if not 0 < precision < 1:
        raise ConfigError(f"precision = {precision} must be between 0 and 1; 0.03 is 3 %")
