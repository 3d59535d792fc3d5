"""Export a decoder to an ONNX bundle."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pe_onnx.cli._options import human_bytes, parse_assignments, parse_encoding, stages


@click.command(
    epilog="Encodings, presets, families and targets: pe-onnx list",
)
@click.option("--encoding", metavar="NAME[:KEY=VALUE,...]", help="Our own decoder with this positional encoding.")
@click.option("--model", metavar="PATH", help="A checkpoint: a Hugging Face folder or a GGUF file.")
@click.option("--rope-scaling", metavar="TYPE:KEY=VALUE,...", help="A longer context for a checkpoint: yarn:factor=4.")
@click.option("--follow-transformers", is_flag=True, help="Let keys of config.json through that transformers ignores.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bundle"),
    metavar="DIR",
    show_default=True,
    help="Bundle folder.",
)
@click.option(
    "--weights", metavar="NAME", help="Trained ones of our own decoder. [those of the encoding, if it has any]"
)
@click.option("--preset", default=None, metavar="NAME", help="Random weights: tiny, small or base.")
@click.option("--set", "fields", multiple=True, metavar="KEY=VALUE", help="A field of our own decoder's configuration.")
@click.option("--target", default="ort", metavar="ort|portable", show_default=True, help="Who runs it.")
@click.option("--dtype", default="fp32", metavar="fp32|fp16|bf16", show_default=True, help="Of weights and cache.")
@click.option("--bits", type=int, metavar="4|8", help="Round the weights at once, as pe-onnx quantize does.")
@click.option("--block", type=int, metavar="N", help="With --bits: weights that share a scale.")
@click.option("--cache", metavar="int8", help="Keys and values in int8, as pe-onnx quantize has them.")
@click.option("--logits", metavar="last|all", help="Of each row's last token or of all. [last for ort, else all]")
@click.option("--window-cache", is_flag=True, help="Layers with a sliding window keep the window, not all tokens.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("--no-verify", is_flag=True, help="Skip the proof of the finished bundle; the manifest says so.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the PyTorch exporter says.")
def command(
    encoding: str | None,
    model: str | None,
    rope_scaling: str | None,
    follow_transformers: bool,
    output: Path,
    weights: str | None,
    preset: str | None,
    fields: tuple[str, ...],
    target: str,
    dtype: str,
    bits: int | None,
    block: int | None,
    cache: str | None,
    logits: str | None,
    window_cache: bool,
    force: bool,
    no_verify: bool,
    verbose: bool,
) -> None:
    """Export a decoder to an ONNX bundle.

    Our own decoder with --encoding, or a checkpoint with --model. Nothing is written unless all of it is.
    """
    from pe_onnx.bundle import check_output

    if (encoding is None) == (model is None):
        raise click.UsageError("give one of --encoding and --model")
    if model is not None and (weights or preset or fields):
        raise click.UsageError("--weights, --preset and --set are for --encoding; a checkpoint brings its own")
    if encoding is not None and (rope_scaling or follow_transformers):
        raise click.UsageError("--rope-scaling and --follow-transformers are for --model")
    check_output(output, force)
    from pe_onnx.exporter import export

    options: dict[str, Any] = {
        "model": model,
        "rope_scaling": rope_scaling,
        "follow_transformers": follow_transformers or None,
    }
    if encoding is not None:
        name, parameters = parse_encoding(encoding)
        config = {key: _value(text) for key, text in parse_assignments(fields, "--set").items()}
        options = {
            "encoding": name,
            "encoding_parameters": parameters,
            "config": config,
            "preset": preset,
            "weights": weights,
        }
    begin = time.perf_counter()
    rounded = bits is not None or cache is not None
    if block is not None and bits is None:
        raise click.UsageError("--block is for --bits")
    with stages(9 if rounded else 6, "export") as progress, _place(output, rounded) as place:
        bundle = export(
            output=place,
            target=target,
            dtype=dtype,
            logits=logits,
            window_cache=window_cache,
            force=force,
            verify=not no_verify,
            verbose=verbose,
            progress=progress,
            **options,
        )
        if rounded:
            from pe_onnx.quantization import quantize

            asked: dict[str, Any] = {"bits": bits, "block": block, "cache": cache}
            bundle = quantize(bundle, output, **asked, force=force, verify=not no_verify, progress=progress)
    for key, value in bundle.manifest["encoding"]["ignored"].items():
        click.echo(
            f"pe-onnx: warning: transformers ignores {key} = {json.dumps(value)}, and so does {output}", err=True
        )
    own = bundle.manifest["source"].get("config")
    kind = "" if own is None else "trained weights, " if own.get("weights") else "random weights, "
    size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    kinds = [dtype, *([f"int{bits}"] if bits else []), *(["int8 cache"] if cache else [])]
    click.echo(
        f"{output}: {bundle.manifest['encoding']['name']}, {kind}{target}, {', '.join(kinds)}, {human_bytes(size)} "
        f"in {time.perf_counter() - begin:.1f} s",
        err=True,
    )


@contextmanager
def _place(output: Path, rounded: bool) -> Iterator[Path]:
    """Where the bundle is written that is rounded afterwards: beside its place, for as long as that takes."""
    if not rounded:
        yield output
        return
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.float-", dir=output.absolute().parent) as folder:
        yield Path(folder, "bundle")


def _value(text: str) -> Any:
    """A number, true, false, null or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
