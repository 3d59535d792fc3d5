"""Round a bundle's weights to 8 or 4 bits."""

from __future__ import annotations

import time
from pathlib import Path

import click

from pe_onnx.cli._options import bundle_argument, human_bytes, stages


@click.command()
@bundle_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Bundle folder.")
@click.option("--bits", default=4, metavar="4|8", show_default=True, help="Of a weight; 0 leaves weights as they are.")
@click.option(
    "--block", type=int, metavar="N", help="Weights that share a scale: 16 to 256. [32, or 16 where it does not divide]"
)
@click.option("--symmetric/--asymmetric", default=True, help="Without or with a zero point a block. [symmetric]")
@click.option("--head-bits", type=int, metavar="4|8", help="Of the token embedding and the head. [8]")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Weights that keep their precision: '*.lm_head.*'.")
@click.option("--accuracy-level", type=int, metavar="1|4", help="Activations in float32 or int8. [4]")
@click.option("--cache", metavar="int8", help="Keys and values in int8, a scale for each channel.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("--no-verify", is_flag=True, help="Skip the proof of the finished bundle; the manifest says so.")
def command(
    bundle: str,
    output: Path,
    bits: int,
    block: int | None,
    symmetric: bool,
    head_bits: int | None,
    exclude: tuple[str, ...],
    accuracy_level: int | None,
    cache: str | None,
    force: bool,
    no_verify: bool,
) -> None:
    """Round a bundle's weights to 8 or 4 bits, in blocks.

    Products and the token embedding are rounded; a head that is tied to the embedding stands in the file once. Nothing
    is written unless all of it is.
    """
    from pe_onnx.quantization import quantize

    begin = time.perf_counter()
    with stages(3, "quantize") as progress:
        made = quantize(
            bundle,
            output,
            bits=bits or None,
            block=block,
            symmetric=symmetric,
            head_bits=head_bits,
            exclude=exclude,
            accuracy_level=accuracy_level,
            cache=cache,
            force=force,
            verify=not no_verify,
            progress=progress,
        )
    size = sum(entry["bytes"] for entry in made.manifest["files"].values())
    held = made.manifest["quantization"]
    weights = f"{held['weights']} weights at {held['bits_per_weight']:g} bits, " if held["bits"] else ""
    click.echo(
        f"{output}: {weights}{'int8 cache, ' if held.get('cache') else ''}{human_bytes(size)} "
        f"in {time.perf_counter() - begin:.1f} s",
        err=True,
    )
