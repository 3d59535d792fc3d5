"""Decoders on a CUDA device: decode ms/token and prefill tokens/s against context, in half precision.

Six encodings of preset ``base``, and a decoder of 1.1 billion parameters with RoPE, ALiBi and none, batch 1: ours in
onnxruntime, steps recorded as CUDA graphs, ALiBi in channels of the heads and as a bias. Beside the large one, on the
same device and in turns with it: transformers' Llama of the same sizes, eager with SDPA, and compiled
(``torch.compile``, ``reduce-overhead``) with a static cache. Weights and caches are random; what a step costs does not
depend on them. A step is timed from the token on the host to the logits on the host. The bound of a step is (bytes of
weights + bytes of cache in use) / the rate at which the device copies within its own memory, bytes read and written
counted, measured in the same run.

    python benchmarks/cuda.py [--contexts 1024,8192,32768] [--cache DIR] [--prepare] [-o benchmarks/cuda.json]
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import readme_tables
from cuda_torch import PROMPT_REPEATS, against_torch
from steps import WARM_UP, decode_times, median_ms

import pe_onnx
from pe_onnx.bundle import CUDA
from pe_onnx.doctor import cuda as cuda_facts
from pe_onnx.machine import describe_machine, versions

ENCODINGS = ("none", "learned", "sinusoidal", "rope", "t5_bias", "alibi")
LARGE_ENCODINGS = ("none", "rope", "alibi")
BIASED = ", as a bias"
"""Behind ``alibi``: without the file that has it in channels of the heads."""
LONGEST = 32_768 + 64
BASE: dict[str, Any] = {"max_position_embeddings": LONGEST}
LARGE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": LONGEST,
}
"""The sizes of Llama 3.2 1B but for the vocabulary; 1.10 billion parameters."""
PACKAGES = ("onnxruntime-gpu", "torch", "transformers", "numpy")


def bundle(cache: Path, name: str, encoding: str, dtype: str, sizes: dict[str, Any], preset: str) -> Path:
    """The folder of a bundle of target ``ort``, exported where it is missing."""
    folder = cache / name
    if not (folder / "manifest.json").exists():
        click.echo(f"export {name}", err=True)
        pe_onnx.export(encoding=encoding, output=folder, preset=preset, config=sizes, dtype=dtype, verify=False)
    return folder


SIZES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "base": ("base", BASE, ENCODINGS),
    "large": ("tiny", LARGE, LARGE_ENCODINGS),
}
"""Preset, configuration and encodings of each size."""
TORCH, KERNELS = "torch", "kernels"
"""The parts that are against PyTorch, and of kernel times."""


def folders(cache: Path, size: str, dtype: str) -> dict[str, Path]:
    """The bundles of a size, by encoding."""
    preset, sizes, encodings = SIZES[size]
    made = {e: bundle(cache, f"{size}_{e}_{dtype}", e, dtype, sizes, preset) for e in encodings}
    plain = made["alibi"].with_name(f"{made['alibi'].name}_as_a_bias")
    if not plain.exists():
        shutil.copytree(made["alibi"], plain, copy_function=os.link, ignore=shutil.ignore_patterns(CUDA))
    return {**made, f"alibi{BIASED}": plain}


def copy_rate() -> float:
    """Bytes a second that are read and written by a copy on the device, the best of several."""
    import torch

    source = torch.ones(1 << 30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(8):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best


def prefill_rate(model: Any, tokens: int) -> float:
    """Median tokens/s of a prompt."""
    ids = np.random.default_rng(0).integers(0, 256, tokens).tolist()
    times = []
    for repeat in range(PROMPT_REPEATS + 1):
        cache = model.cache(1, tokens)
        cache.reserve(tokens)
        begin = time.perf_counter()
        cache.prefill([ids])
        if repeat:
            times.append(time.perf_counter() - begin)
    return tokens / statistics.median(times)


def step_bytes(model: Any, context: int) -> int:
    """Weights but for the token embedding, of which a step reads a row, and the cache in use."""
    manifest = model.bundle.manifest
    config = manifest["source"]["config"]
    itemsize = 2
    embedding = config["vocab_size"] * config["hidden_size"] * itemsize
    position = LONGEST * config["hidden_size"] * itemsize if config["encoding"] == "learned" else 0
    weights: int = manifest["graph"]["weight_bytes"]
    return weights - embedding - position + context * model.session.cache_bytes_per_token


def measure(models: dict[str, Any], contexts: list[int], repeats: int, rate: float) -> dict[str, Any]:
    """Of each model: decode by context, prefill by tokens, and whether its steps were recorded."""
    figures: dict[str, Any] = {
        name: {"recorded": model.session.not_captured is None, "decode": {}, "prefill": {}}
        for name, model in models.items()
    }
    for context in contexts:
        for name, times in decode_times(models, context, repeats).items():
            bound = step_bytes(models[name], context) / rate
            ms = median_ms(times)
            figures[name]["decode"][str(context)] = {"ms": ms, "bound_share": 1000 * bound / ms}
            click.echo(f"{name} at {context}: {ms:.3f} ms, {1000 * bound / ms:.0%} of the bound", err=True)
        for name, model in models.items():
            figures[name]["prefill"][str(context)] = prefill_rate(model, context)
            click.echo(f"{name}: {figures[name]['prefill'][str(context)]:.0f} prompt tokens/s", err=True)
    return figures


def copies(folder: Path) -> list[dict[str, Any]]:
    """Of a profile of some decode steps every copy between host and device, with its bytes: none is of the cache."""
    from pe_onnx.bundle import read_bundle
    from pe_onnx.kv_cache import make_cache
    from pe_onnx.session import Session

    read = read_bundle(folder, verify=False)
    session = Session(read, "cuda", graph=read.graph_on("cuda"), profile=folder / "profile")
    cache = make_cache(session, 1, 512)
    cache.prefill([list(range(256))])
    for _ in range(4):
        cache.decode([7])
    path = session.end_profile()
    events = json.loads(path.read_text("utf-8"))
    path.unlink()
    return [
        {"node": event["name"], "bytes": int(event["args"].get("output_size", 0))}
        for event in events
        if event.get("cat") == "Node" and event["args"].get("op_name", "").startswith("Memcpy")
    ]


def kernels(model: Any, context: int, steps: int = 10) -> dict[str, Any]:
    """Microseconds of a recorded decode step by kernel, as CUPTI has them, and of the step by the clock."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")
    cache = model.cache(1, context + 64)
    cache.reserve(context + 64)
    cache.fill(context, np.random.default_rng(0))
    for _ in range(WARM_UP):
        cache.decode([7])
    begin = time.perf_counter()
    for _ in range(2 * steps):
        cache.decode([7])
    step_us = 1e6 * (time.perf_counter() - begin) / (2 * steps)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            cache.decode([7])
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / steps for event in profiled.key_averages()}
    return {"context": context, "step_us": step_us, "kernels_us": dict(sorted(found.items(), key=lambda x: -x[1]))}


def table(title: str, contexts: list[str], rows: dict[str, dict[str, float]], digits: int, inverse: bool) -> str:
    """Markdown: in brackets the cost relative to ``none`` of the same size, the row before that begins so."""
    lines = [f"| {title} | " + " | ".join(f"{int(c):,}" for c in contexts) + " |", "|---|" + "---:|" * len(contexts)]
    base: dict[str, float] = {}
    for name, figures in rows.items():
        base = figures if name.endswith("`none`") else base
        cells = []
        for context in contexts:
            if context not in figures:
                cells.append("not measured")
                continue
            value = figures[context]
            ratio = base[context] / value if inverse else value / base[context]
            cells.append(f"{value:,.{digits}f} ({ratio:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> str:
    """Decode and prefill of both sizes and of PyTorch, for the README."""
    contexts = [str(c) for c in result["contexts"]]
    decode, prefill = {}, {}
    for size, label in (("base", "85M"), ("large", "1.1B")):
        measured = result.get(size, {})
        for name in (*SIZES[size][2], f"alibi{BIASED}") if measured else ():
            figures = measured.get(name, {"decode": {}, "prefill": {}})
            encoding, comma, form = name.partition(",")
            shown = f"{label}, `{encoding}`{comma}{form}"
            decode[shown] = {c: x["ms"] for c, x in figures["decode"].items()}
            prefill[shown] = figures["prefill"]
    for name in ("pe-onnx", "PyTorch eager", "PyTorch compiled"):
        against = result.get("against PyTorch", {})
        decode[f"1.1B, RoPE, in turns: {name}"] = {
            c: x[name]["ms"] for c, x in against.items() if "ms" in x.get(name, {})
        }
        rates = {c: x[name]["prefill"] for c, x in against.items() if "prefill" in x.get(name, {})}
        if rates:
            prefill[f"1.1B, RoPE, in turns: {name}"] = rates
    device, made = result["cuda"]["devices"][0]["name"], result["versions"]
    return (
        f"{table('decode, ms/token', contexts, decode, 2, False)}\n\n"
        f"{table('prefill, tokens/s', contexts, prefill, 0, True)}\n\n"
        f"{device}, driver {result['cuda']['driver_version']}, onnxruntime-gpu {made['onnxruntime-gpu']}, "
        f"torch {made['torch']}, transformers {made['transformers']}, {result['dtype']}."
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


@click.command()
@click.option("--contexts", default="1024,8192,32768", show_default=True)
@click.option("--compiled", default="1024,8192", show_default=True, help="Contexts at which PyTorch is compiled too.")
@click.option("--parts", default=",".join((*SIZES, TORCH, KERNELS)), show_default=True)
@click.option("--repeats", default=60, show_default=True)
@click.option("--dtype", default="fp16", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(__file__).parent / ".cuda", help="Bundles.")
@click.option("--prepare", is_flag=True, help="Export the bundles only; no device is needed.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
@click.option("--readme", type=click.Path(path_type=Path, exists=True), help="Write the tables into this file too.")
@click.option("--show", is_flag=True, help="Only the tables of an earlier run; no device is needed.")
def main(
    contexts: str,
    compiled: str,
    parts: str,
    repeats: int,
    dtype: str,
    cache: Path,
    prepare: bool,
    output: Path,
    readme: Path | None,
    show: bool,
) -> None:
    """Measure decoders on a CUDA device, beside PyTorch."""
    if show:
        _report(json.loads(output.read_text("utf-8")), readme)
        return
    cache.mkdir(parents=True, exist_ok=True)
    wanted = parts.split(",")
    if prepare:
        for size in SIZES:
            folders(cache, size, dtype)
        return
    lengths = _numbers(contexts)
    result: dict[str, Any] = {
        **describe_machine(),
        "cuda": cuda_facts(),
        "versions": versions(PACKAGES),
        "dtype": dtype,
        "batch": 1,
        "contexts": lengths,
    }
    rate = result["copy_bytes_per_s"] = copy_rate()
    for size in (size for size in SIZES if size in wanted):
        made = folders(cache, size, dtype)
        result.setdefault("copies", {})[size] = {name: copies(folder) for name, folder in made.items()}
        models = {name: pe_onnx.load(folder, provider="cuda", verify=False) for name, folder in made.items()}
        result[size] = measure(models, lengths, repeats, rate)
        output.write_text(json.dumps(result, indent=2) + "\n")
        del models
    if TORCH in wanted:
        rope = pe_onnx.load(folders(cache, "large", dtype)["rope"], provider="cuda", verify=False)
        result["against PyTorch"] = against_torch(rope, dtype, LARGE, lengths, _numbers(compiled), repeats)
    if KERNELS in wanted:
        rope = pe_onnx.load(folders(cache, "large", dtype)["rope"], provider="cuda", verify=False)
        result["kernels"] = kernels(rope, lengths[0])
    output.write_text(json.dumps(result, indent=2) + "\n")
    _report(result, readme)


def _report(result: dict[str, Any], readme: Path | None) -> None:
    shown = tables(result)
    click.echo(shown)
    if readme is not None:
        readme_tables.write(readme, "cuda", shown)


if __name__ == "__main__":
    main()
