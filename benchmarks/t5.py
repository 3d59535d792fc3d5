"""T5: a decode step, a prompt and the encoder, against the same with RoPE, transformers and the stock export.

t5-small's sizes with random weights, a source of 128 tokens. Decode steps are timed in turns, in which each contestant
makes some steps that are not timed and then one that is: what it finds is neither the cache lines nor the spinning
threads of the one before. Sessions are made anew in each round, in another order. Given are medians over the steps of
a round, then over rounds; ratios are those of neighbouring steps. Memory is the peak of a process of its own.

    python benchmarks/t5.py [--contexts 512,2048,8192] [--rounds 5] [-o benchmarks/t5.json] [--readme README.md]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import readme_tables
from steps import median_ms
from t5_prompts import EAGER, OURS, ROTATED, STOCK_GRAPH, Clock

LABELS = {
    OURS: "pe-onnx, T5 bias",
    ROTATED: "pe-onnx, RoPE in its place",
    EAGER: "transformers, PyTorch",
    STOCK_GRAPH: "stock export, onnxruntime",
}
RATIOS = ((OURS, ROTATED), (EAGER, OURS), (STOCK_GRAPH, OURS))
ENCODER = "encoder"
SOURCE_TOKENS = 128
TURN_WARM_UP = 3
SETTLING_STEPS = 6
"""Not timed: the threads of the contestant before spin for some tens of ms, and would take a core from this one."""

Times = dict[str, list[float]]


def in_turns(
    steps: Mapping[str, Callable[[], Any]], repeats: int, scarce: dict[str, int], clock: Clock = time.perf_counter
) -> Times:
    """Seconds of each contestant's calls. scarce: those who are called fewer times than ``repeats``."""
    times: Times = {name: [] for name in steps}
    for repeat in range(-TURN_WARM_UP, repeats):
        order = list(steps)
        order = order[repeat % len(order) :] + order[: repeat % len(order)]
        for name in order:
            if repeat >= scarce.get(name, repeats) or -repeat > scarce.get(name, repeats):
                continue
            for _ in range(SETTLING_STEPS):
                steps[name]()
            begin = clock()
            steps[name]()
            if repeat >= 0:
                times[name].append(clock() - begin)
    return times


def measure_decode(
    folder: Path, contexts: Sequence[int], rounds: int, repeats: int, slow_repeats: int, threads: int, clock: Clock
) -> dict[int, list[Times]]:
    """By context and round: seconds of each contestant's decode steps."""
    from t5_contestants import Contestant, Eager, Ours, Stock
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(folder / "checkpoint").eval()
    makers: dict[str, Callable[[], Contestant]] = {
        OURS: lambda: Ours(folder / OURS, threads),
        ROTATED: lambda: Ours(folder / ROTATED, threads),
        EAGER: lambda: Eager(model),
        STOCK_GRAPH: lambda: Stock(folder / STOCK_GRAPH, threads),
    }
    rng = np.random.default_rng(0)
    source = rng.integers(2, model.config.vocab_size, SOURCE_TOKENS).tolist()
    first = Eager(model).past_of(source, [0])
    result: dict[int, list[Times]] = {context: [] for context in contexts}
    names = list(makers)
    for number in range(rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        made = {name: makers[name]() for name in order}
        for context in contexts:
            click.echo(f"round {number + 1} of {rounds}: decode at {context} tokens", err=True)
            past = first.random(context, rng)
            for contestant in made.values():
                contestant.begin(past)
            steps = {name: partial(contestant.step, 7) for name, contestant in made.items()}
            scarce = {EAGER: slow_repeats, STOCK_GRAPH: slow_repeats}
            result[context].append(in_turns(steps, repeats, scarce, clock))
    return result


def ratio(rounds: list[Times], above: str, below: str) -> float:
    """Of neighbouring steps, so that a slow moment of the machine falls on both."""
    return statistics.median(
        statistics.median(a / b for a, b in zip(times[above], times[below], strict=False)) for times in rounds
    )


def medians(rounds: list[Times]) -> dict[str, float]:
    """ms."""
    return {name: statistics.median(median_ms(times[name]) for times in rounds) for name in rounds[0]}


def table(decode: dict[int, list[Times]], other: dict[str, Any]) -> str:
    """Markdown: decode steps with their ratios, then the prompt and the encoder."""
    contexts = list(decode)
    head = " | ".join(f"{context:,}" for context in contexts)
    lines = [f"| decode, ms/token | {head} |", "|---|" + "---:|" * len(contexts)]
    for name, label in LABELS.items():
        lines.append(f"| {label} | " + " | ".join(f"{medians(decode[c])[name]:.2f}" for c in contexts) + " |")
    for above, below in RATIOS:
        cells = " | ".join(f"{ratio(decode[c], above, below):.2f}" for c in contexts)
        lines.append(f"| *{LABELS[above]} / {LABELS[below]}* | {cells} |")
    prompt, encoder = other["prefill"], other["encoder"]
    lines += ["", f"| prompt of {prompt['tokens']:,} tokens | tokens/s | peak MB |", "|---|---:|---:|"]
    for name, speed in prompt["tokens_per_s"].items():
        lines.append(f"| {LABELS[name]} | {speed:,.0f} | {prompt['peak_bytes'][name] / 1e6:,.0f} |")
    lines += ["", "| encoder, source tokens | ours, ms | transformers, ms | ours, peak MB | transformers, peak MB |"]
    lines += ["|---:|---:|---:|---:|---:|"]
    for tokens, figures in encoder.items():
        values = [figures["ms"][name] for name in (OURS, EAGER)]
        values += [figures["peak_bytes"][name] / 1e6 for name in (OURS, EAGER)]
        lines.append(f"| {tokens:,} | " + " | ".join(f"{value:,.0f}" for value in values) + " |")
    return "\n".join(lines)


def draw(decode: dict[int, dict[str, float]], path: Path, clock: str) -> None:
    """ms/token against context, both logarithmic; an SVG of the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "pe-onnx"
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    styles = {
        OURS: ("C0", "o", "-"),
        ROTATED: ("C1", "x", "--"),
        EAGER: ("C2", "s", "-"),
        STOCK_GRAPH: ("C3", "^", "-"),
    }
    contexts = list(decode)
    for name, (color, marker, line) in styles.items():
        values = [decode[context][name] for context in contexts]
        axes.plot(contexts, values, line, color=color, marker=marker, label=LABELS[name])
        above = name != ROTATED
        axes.annotate(
            f"{values[-1]:.1f}",
            (contexts[-1], values[-1]),
            xytext=(8, 5 if above else -9),
            textcoords="offset points",
            color=color,
            va="center",
        )
    axes.set(xscale="log", yscale="log", xlabel="decoder tokens in the cache", ylabel="ms per token")
    axes.set_xlim(contexts[0] / 1.15, contexts[-1] * 1.35)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(f"A decode step of t5-small, {clock}", fontsize=11)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    pyplot.close(figure)


def export_all(folder: Path) -> None:
    """The checkpoint, and what the contestants run."""
    import t5_contestants as contestants

    import pe_onnx

    model = contestants.small_model()
    model.save_pretrained(folder / "checkpoint")
    click.echo("export: T5 bias, RoPE, stock", err=True)
    pe_onnx.export(model=folder / "checkpoint", output=folder / OURS)
    contestants.export_rotated(folder / "checkpoint", folder / ROTATED)
    contestants.export_stock(model, folder / STOCK_GRAPH)


@click.command()
@click.option("--contexts", default="512,2048,8192", show_default=True, help="Tokens of the decoder's own context.")
@click.option("--sources", default="512,2048,8192", show_default=True, help="Tokens of a source for the encoder.")
@click.option("--prompt", default=8192, show_default=True, help="Decoder tokens of a prompt.")
@click.option("--rounds", default=5, show_default=True, help="Times that all sessions are made anew.")
@click.option("--repeats", default=40, show_default=True, help="Decode steps of our contestants in a round.")
@click.option("--slow-repeats", default=10, show_default=True, help="The same of the two others.")
@click.option("--prefills", default=3, show_default=True, help="Prompts, and sources, of each contestant.")
@click.option("--threads", default=0, show_default=True)
@click.option(
    "--cpu-time", is_flag=True, help="On a busy machine: processor time of one thread, what waits not counted."
)
@click.option("--bundles", type=click.Path(path_type=Path), help="Keep checkpoint and exports here; use those found.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
@click.option("--readme", type=click.Path(path_type=Path, exists=True), help="Write the tables into this file too.")
def main(
    contexts: str,
    sources: str,
    prompt: int,
    rounds: int,
    repeats: int,
    slow_repeats: int,
    prefills: int,
    threads: int,
    cpu_time: bool,
    bundles: Path | None,
    output: Path,
    readme: Path | None,
) -> None:
    """Measure T5; the plot lands beside the JSON."""
    import onnxruntime
    import t5_prompts
    import torch
    import transformers

    sizes, lengths = ([int(x) for x in given.split(",")] for given in (contexts, sources))
    threads, clock = (1, time.thread_time) if cpu_time else (threads, time.perf_counter)
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = bundles or Path(temporary)
        if not (folder / STOCK_GRAPH).exists():
            export_all(folder)
        other = t5_prompts.measure(folder, prompt, lengths, prefills, threads, clock)
        steps = measure_decode(folder, sizes, rounds, repeats, slow_repeats, threads, clock)
    measured = "processor time of one thread" if cpu_time else f"wall time, {os.cpu_count()} cores"
    decode = {context: medians(figures) for context, figures in steps.items()}
    result = {
        "model": "t5-small, random weights",
        "source_tokens": SOURCE_TOKENS,
        "provider": "CPUExecutionProvider",
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "clock": measured,
        "rounds": rounds,
        "decode_ms_per_token": decode,
        "decode_ms_per_token_by_round": {c: [medians([times]) for times in steps[c]] for c in sizes},
        "decode_ratio": {
            f"{above} / {below}": {c: ratio(steps[c], above, below) for c in sizes} for above, below in RATIOS
        },
        **other,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    draw(decode, output.with_suffix(".svg"), measured)
    tables = f"{table(steps, other)}\n\nMeasured: {measured}."
    click.echo(tables)
    click.echo(t5_prompts.summary(other))
    if readme is not None:
        readme_tables.write(readme, "t5", tables)


if __name__ == "__main__":
    main()
