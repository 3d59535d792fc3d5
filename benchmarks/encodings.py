"""Cost of each encoding: decode ms/token and prefill tokens/s against context, preset small, as ratios to `none`.

In float32, with int4 weights, and with int4 weights and an int8 cache. Contestants are interleaved step by step, so
that a slow moment of the machine falls on all of them; sessions are made anew in each round, in another order, so that
no contestant keeps a lucky place in memory. Given is the median over rounds of the median over steps. Also measured: a
decode step at 512 tokens in an 8192-token buffer against a 1024-token buffer.

    python benchmarks/encodings.py [--contexts 128,1024,4096,8192,32768] [--rounds 5] [-o benchmarks/encodings.json]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import readme_tables
from steps import decode_times, fill, median_ms

ENCODINGS = ("none", "learned", "sinusoidal", "rope", "t5_bias", "alibi")
BASELINE = "none"

PRECISIONS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "int4": {"bits": 4},
    "int4, int8 cache": {"bits": 4, "cache": "int8"},
}
"""What ``pe_onnx.quantize`` is asked for."""

ONCE_FROM = 16_384
"""Prompts from so many tokens on are run once, without a warm-up."""


def measure_decode(models: dict[str, Any], context: int, repeats: int) -> dict[str, float]:
    """Median ms of one decode step at ``context`` cached tokens, contestants in turn."""
    return {name: median_ms(times) for name, times in decode_times(models, context, repeats).items()}


def measure_prefill(models: dict[str, Any], context: int, repeats: int) -> dict[str, float]:
    """Median tokens/s of a prompt of ``context`` tokens, contestants in turn."""
    prompt = np.random.default_rng(0).integers(0, 256, context).tolist()
    times: dict[str, list[float]] = {name: [] for name in models}
    once = context >= ONCE_FROM
    for repeat in range(1 if once else repeats + 1):
        for name, model in models.items():
            cache = model.cache(1, context)
            cache.reserve(context)
            begin = time.perf_counter()
            cache.prefill([prompt])
            if repeat or once:
                times[name].append(time.perf_counter() - begin)
    return {name: context / statistics.median(values) for name, values in times.items()}


def measure_buffers(model: Any, repeats: int) -> dict[str, float]:
    """Decode at 512 tokens in buffers of two sizes, in turn: a cost that followed the buffer would show."""
    rng = np.random.default_rng(0)
    caches = {}
    for size in (1024, 8192):
        caches[size] = model.cache(1, size)
        caches[size].reserve(size)
        fill(caches[size], 512, rng)
    times: dict[int, list[float]] = {size: [] for size in caches}
    for repeat in range(repeats + 5):
        for size, cache in caches.items():
            cache.lengths[:] = 512
            begin = time.perf_counter()
            cache.decode([7])
            if repeat >= 5:
                times[size].append(time.perf_counter() - begin)
    small, large = median_ms(times[1024]), median_ms(times[8192])
    return {"buffer_1024_ms": small, "buffer_8192_ms": large, "ratio": large / small}


def table(title: str, figures: dict[int, dict[str, float]], digits: int, inverse: bool) -> str:
    """Markdown: one row an encoding, its figure and in brackets its cost relative to the baseline."""
    contexts = list(figures)
    lines = [
        f"| {title} | " + " | ".join(f"{c:,}" for c in contexts) + " |",
        "|---|" + "---:|" * len(contexts),
    ]
    for name in ENCODINGS:
        cells = []
        for context in contexts:
            value, base = figures[context][name], figures[context][BASELINE]
            ratio = base / value if inverse else value / base
            cells.append(f"{value:,.{digits}f} ({ratio:.2f})")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--contexts", default="128,1024,4096,8192,32768", show_default=True, help="Tokens of context.")
@click.option("--preset", default="small", show_default=True)
@click.option("--precisions", default=";".join(PRECISIONS), show_default=True, help="With semicolons between.")
@click.option("--rounds", default=5, show_default=True, help="Times that all sessions are made anew.")
@click.option("--repeats", default=40, show_default=True, help="Decode steps of each contestant in a round.")
@click.option("--prefills", default=3, show_default=True, help="Prompts of each contestant.")
@click.option("--threads", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
@click.option("--readme", type=click.Path(path_type=Path, exists=True), help="Write the tables into this file too.")
def main(
    contexts: str,
    preset: str,
    precisions: str,
    rounds: int,
    repeats: int,
    prefills: int,
    threads: int,
    output: Path,
    readme: Path | None,
) -> None:
    """Measure the six encodings side by side."""
    import onnxruntime

    import pe_onnx

    sizes = [int(c) for c in contexts.split(",")]
    config = {"max_position_embeddings": max(sizes) + 16}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        floats = {name: Path(folder, name) for name in ENCODINGS}
        for name, path in floats.items():
            pe_onnx.export(encoding=name, preset=preset, config=config, output=path)
        for precision in precisions.split(";"):
            options, paths = PRECISIONS[precision], floats
            if options is not None:
                paths = {name: Path(folder, f"{name} {precision}") for name in ENCODINGS}
                for name, path in paths.items():
                    pe_onnx.quantize(floats[name], path, **options)
            figures[precision] = measure(precision, paths, sizes, rounds, repeats, prefills, threads)
        buffers = measure_buffers(pe_onnx.load(floats["rope"], threads=threads), 3 * repeats)
    result = {
        "preset": preset,
        "provider": "CPUExecutionProvider",
        "onnxruntime": onnxruntime.__version__,
        "cores": os.cpu_count(),
        "rounds": rounds,
        "machine": platform.machine(),
        "by_precision": figures,
        "decode_at_512_tokens_by_buffer": buffers,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    tables = "\n\n".join(
        table(f"{precision}: {title}", found[key], digits, inverse)
        for precision, found in figures.items()
        for title, key, digits, inverse in (
            ("decode, ms/token", "decode_ms_per_token", 2, False),
            ("prefill, tokens/s", "prefill_tokens_per_s", 0, True),
        )
    )
    click.echo(tables)
    click.echo(f"decode at 512 tokens, 8192-token buffer over 1024-token buffer: {buffers['ratio']:.3f}")
    if readme is not None:
        readme_tables.write(readme, "encodings", tables)


def measure(
    precision: str, paths: dict[str, Path], sizes: list[int], rounds: int, repeats: int, prefills: int, threads: int
) -> dict[str, dict[int, dict[str, float]]]:
    """Decode and prefill of every encoding at every context; the median over rounds."""
    import pe_onnx

    steps: dict[int, list[dict[str, float]]] = {context: [] for context in sizes}
    for number in range(rounds):
        order = ENCODINGS[number % len(ENCODINGS) :] + ENCODINGS[: number % len(ENCODINGS)]
        models = {name: pe_onnx.load(paths[name], threads=threads) for name in order}
        for context in sizes:
            click.echo(f"{precision}, round {number + 1} of {rounds}: decode at {context} tokens", err=True)
            steps[context].append(measure_decode(models, context, repeats))
    decode = {
        context: {name: statistics.median(figures[name] for figures in measured) for name in ENCODINGS}
        for context, measured in steps.items()
    }
    prefill = {}
    for context in sizes:
        click.echo(f"{precision}: prefill of {context} tokens", err=True)
        prefill[context] = measure_prefill(models, context, prefills)
    return {"decode_ms_per_token": decode, "prefill_tokens_per_s": prefill}


if __name__ == "__main__":
    main()
