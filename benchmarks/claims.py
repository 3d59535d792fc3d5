"""The known claim, measured: sinusoidal, rotary, T5 bias and ALiBi at 512, 1,024 and 3,072 tokens, in PyTorch and here.

Press et al. 2022 (ALiBi, figure 2) gave the speed of training and of inference in words per second at these lengths:
ALiBi about as fast as sinusoidal, rotary slower, T5 bias slowest, the more so the longer the sequence. Measured here:

- PyTorch, eager: our decoder by its plain formula, whole sequences, batch 1: forward alone, and forward and backward
- the same decoder as our bundle: a prompt of that length, and a decode step with that many tokens in the cache

Contestants are interleaved, in another order in each round; given are medians, and in brackets the median of the ratios
to ``sinusoidal`` of the same round, by time.

    python benchmarks/claims.py [--layers 4] [--rounds 5] [--threads 2] [-o benchmarks/claims.json] [--readme README.md]
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import readme_tables

ENCODINGS = ("sinusoidal", "rope", "t5_bias", "alibi")
BASELINE = ENCODINGS[0]
MEASURES = {
    "torch_training": "PyTorch, training, tokens/s",
    "torch_inference": "PyTorch, inference, tokens/s",
    "bundle_prefill": "bundle, prompt, tokens/s",
    "bundle_decode": "bundle, decode, ms/token",
}
STEPS_A_ROUND = 12
"""Decode steps of each contestant in a round; their median is the round's time."""
UNCOUNTED = 2
"""Of them, the first."""

Calls = Mapping[str, Callable[[], float]]
Series = dict[str, list[float]]


def in_rounds(calls: Calls, rounds: int) -> Series:
    """Seconds of each call in each round, after one call that is not counted."""
    from pe_onnx.turns import in_turns

    timed = {name: lambda call=call: (call(),) for name, call in calls.items()}
    turns = in_turns(timed, deadline=math.inf, precision=0.0, least=rounds, most=rounds)
    return {name: [seconds for (seconds,) in series] for name, series in turns.times.items()}


def torch_calls(decoders: Mapping[str, Any], tokens: int, training: bool) -> Calls:
    """One pass over ``tokens`` tokens: logits of all of them, and in training the gradient of the loss too."""
    import torch

    from pe_onnx.models.attention import PlainStep

    text = torch.randint(0, 256, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens)[None]

    def run(decoder: Any) -> float:
        begin = time.perf_counter()
        with torch.set_grad_enabled(training):
            step = PlainStep(torch.ones(1, tokens, dtype=torch.int64))
            logits = decoder(text[:, :-1], positions, step)
            if training:
                torch.nn.functional.cross_entropy(logits[0], text[0, 1:]).backward()
        took = time.perf_counter() - begin
        decoder.zero_grad(set_to_none=True)
        return took

    return {name: lambda decoder=decoder: run(decoder) for name, decoder in decoders.items()}  # type: ignore[misc]


def prompt_calls(bundles: Mapping[str, Any], tokens: int) -> Calls:
    from pe_onnx.contestants import random_tokens

    prompt = random_tokens(tokens, 256)
    return {name: lambda one=one: one.first_token(prompt).prefill_s for name, one in bundles.items()}  # type: ignore[misc]


def decode_calls(bundles: Mapping[str, Any], tokens: int) -> Calls:
    """Each call is the median of some steps one after the other."""
    for one in bundles.values():
        one.begin(tokens)

    def run(one: Any) -> float:
        times = []
        for _ in range(STEPS_A_ROUND):
            begin = time.perf_counter()
            one.step()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[UNCOUNTED:])

    return {name: lambda one=one: run(one) for name, one in bundles.items()}  # type: ignore[misc]


def summary(times: Series, tokens: int, measure: str) -> dict[str, dict[str, Any]]:
    """Of each encoding the figure in the measure's unit, and the ratio of times to the baseline with its interval."""
    from pe_onnx.intervals import median_interval, ratio_interval

    found: dict[str, dict[str, Any]] = {}
    for name, series in times.items():
        seconds = median_interval(series).median
        ratio = ratio_interval(series, times[BASELINE])
        value = 1000 * seconds if measure == "bundle_decode" else tokens / seconds
        unit = "ms_per_token" if measure == "bundle_decode" else "tokens_per_s"
        found[name] = {unit: value, "time_ratio": ratio.median, "interval": ratio.interval, "rounds": len(series)}
    return found


def table(figures: Mapping[int, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> str:
    """Markdown: one row for each length and encoding."""
    lines = [f"| tokens | encoding | {' | '.join(MEASURES.values())} |", "|---:|---|" + "---:|" * len(MEASURES)]
    for tokens, by_measure in figures.items():
        for name in ENCODINGS:
            cells = []
            for measure in MEASURES:
                one = by_measure[measure][name]
                shown = f"{one['ms_per_token']:.2f}" if "ms_per_token" in one else f"{one['tokens_per_s']:,.0f}"
                cells.append(f"{shown} ({one['time_ratio']:.2f})")
            lines.append(f"| {tokens:,} | `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--lengths", default="512,1024,3072", show_default=True, help="Tokens.")
@click.option("--preset", default="small", show_default=True)
@click.option("--layers", default=4, show_default=True, help="Of the preset's.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--decode-rounds", default=20, show_default=True, help=f"Of {STEPS_A_ROUND} decode steps each.")
@click.option("--threads", default=0, show_default=True, help="0 for as many as PyTorch and onnxruntime take.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
@click.option("--readme", type=click.Path(path_type=Path, exists=True), help="Write the table into this file too.")
def main(
    lengths: str,
    preset: str,
    layers: int,
    rounds: int,
    decode_rounds: int,
    threads: int,
    output: Path,
    readme: Path | None,
) -> None:
    """Measure the four encodings of the claim side by side."""
    import torch

    import pe_onnx
    from pe_onnx.config import DecoderConfig
    from pe_onnx.contestants import BundleContestant
    from pe_onnx.machine import RUNTIME_PACKAGES, describe_machine, versions
    from pe_onnx.models.decoder import Decoder

    sizes = [int(length) for length in lengths.split(",")]
    if threads:
        torch.set_num_threads(threads)
    fields = {"num_hidden_layers": layers, "max_position_embeddings": max(sizes) + 16}
    figures: dict[int, dict[str, Any]] = {tokens: {} for tokens in sizes}
    load = os.getloadavg()[0]

    def measure(name: str, tokens: int, calls: Calls, count: int) -> None:
        click.echo(f"{MEASURES[name].partition(', tok')[0].partition(', ms')[0]}: {tokens} tokens", err=True)
        figures[tokens][name] = summary(in_rounds(calls, count), tokens, name)

    decoders = {name: Decoder(DecoderConfig.preset(preset, encoding=name, **fields)) for name in ENCODINGS}
    for tokens in sizes:
        measure("torch_inference", tokens, torch_calls(decoders, tokens, training=False), rounds)
        measure("torch_training", tokens, torch_calls(decoders, tokens, training=True), rounds)
    del decoders
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        for name in ENCODINGS:
            pe_onnx.export(encoding=name, preset=preset, config=fields, output=Path(folder, name))
            bundles[name] = BundleContestant(Path(folder, name), threads=threads)
        for tokens in sizes:
            measure("bundle_prefill", tokens, prompt_calls(bundles, tokens), rounds)
            measure("bundle_decode", tokens, decode_calls(bundles, tokens), decode_rounds)
    result = {
        "preset": preset,
        "layers": layers,
        "dtype": "fp32",
        "rounds": rounds,
        "decode_rounds": decode_rounds,
        "threads": threads or torch.get_num_threads(),
        "machine": describe_machine(),
        "tools": versions([*RUNTIME_PACKAGES, "torch"]),
        "load_average_before": load,
        "by_tokens": figures,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(table(figures))
    if readme is not None:
        readme_tables.write(readme, "claims", table(figures))


if __name__ == "__main__":
    main()
