"""Lay a bundle out for another runtime, server or library."""

from __future__ import annotations

from pathlib import Path

import click

from pe_onnx import discovery
from pe_onnx.errors import ConfigError


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(), metavar="DIR...")
@click.option("--for", "consumer", required=True, metavar="NAME", help=f"{', '.join(discovery.names('packages'))}.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Package folder.")
@click.option("--copy", is_flag=True, help="Copies of graphs and weights in place of hard links.")
@click.option("--force", is_flag=True, help="Replace a package that is there.")
@click.option("--eos", metavar="ID,...", help="Token ids that end a text. [the bundle's]")
@click.option("--context", type=int, metavar="N", help="genai: tokens of prompt and answer. [the trained length]")
@click.option("--name", metavar="NAME", help="triton, kserve: of the model. [the bundle's folder]")
@click.option("--storage-uri", metavar="URI", help="kserve: where the cluster finds the folder `repository`.")
def command(
    bundles: tuple[str, ...],
    consumer: str,
    output: Path,
    copy: bool,
    force: bool,
    eos: str | None,
    context: int | None,
    name: str | None,
    storage_uri: str | None,
) -> None:
    """Lay a bundle out for another runtime, server or library.

    Graphs and weights are hard links to the bundle's, where they can be. What the consumer cannot run exactly is
    refused. transformersjs takes several bundles of one model, a variant each.
    """
    from pe_onnx.packager import package
    from pe_onnx.packages import Options

    options = Options(_ids(eos), context, name, storage_uri)
    made = package(bundles, consumer, output, options, copy, force)
    click.echo(f"{output}: for {consumer}", err=True)
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(made.loading(output))


def _ids(text: str | None) -> tuple[int, ...] | None:
    """``1,2`` to numbers. Raises ConfigError."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--eos = {text!r} must be token ids with commas between, as in 1,2") from None
