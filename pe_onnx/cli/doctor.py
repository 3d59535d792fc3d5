"""Say what is installed, which providers work, and what CUDA lacks."""

from __future__ import annotations

import sys
from typing import Any

import click

from pe_onnx.cli._options import human_bytes, json_option, print_json


@click.command()
@click.option("--provider", metavar="cpu|cuda", help="Exit with 1 where this one does not work.")
@json_option
def command(provider: str | None, as_json: bool) -> None:
    """Say what is installed, which providers work, and what CUDA lacks: driver, cuDNN or wheel.

    Each provider is tried with a small product. Nothing is changed, and no GPU is needed.
    """
    from pe_onnx.doctor import examine
    from pe_onnx.errors import ConfigError, did_you_mean

    found = examine()
    tried = {entry["name"]: entry for entry in found["providers"]}
    if provider is not None and provider not in tried:
        hint = did_you_mean(provider, tried)
        raise ConfigError(f"provider = {provider!r} must be one of {', '.join(tried)}{hint}")
    if as_json:
        print_json(found)
    else:
        _show(found)
    if provider is not None and not tried[provider]["works"]:
        click.echo(f"pe-onnx: provider {provider!r} does not work: {tried[provider]['problem']}", err=True)
        sys.exit(1)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    table = Table("", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    machine = found["machine"]
    table.add_row(
        "machine", f"{machine['system']} {machine['machine']}, {machine['processor']}, {machine['cores']} cores"
    )
    table.add_row("installed", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    lacking = found["missing_for_export"]
    export = f"not possible without {', '.join(lacking)}: pip install 'pe-onnx[export]'" if lacking else "possible"
    table.add_row("export", export)
    for entry in found["providers"]:
        table.add_row(f"provider {entry['name']}", "works" if entry["works"] else f"does not work: {entry['problem']}")
    if found["other_providers"]:
        table.add_row("also built in", ", ".join(found["other_providers"]))
    cuda = found["cuda"]
    table.add_row("NVIDIA driver", cuda["driver_version"] or "none")
    for purpose, library in cuda["libraries"].items():
        table.add_row(f"CUDA {purpose}", library or "cannot be loaded")
    for device in cuda["devices"]:
        table.add_row(f"device cuda:{device['number']}", f"{device['name']}, {human_bytes(device['memory_bytes'])}")
    if not cuda["devices"]:
        table.add_row("CUDA devices", "none")
    for problem in found["problems"]:
        table.add_row("problem", problem)
    console.print(table)
