"""Find the first layer and operator in which a bundle and PyTorch part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pe_onnx.cli._comparison import comparison_options
from pe_onnx.cli._options import bundle_argument, json_option, print_json

if TYPE_CHECKING:
    from pe_onnx.divergence import Divergence

WIDTH = 160
"""Columns where there is no terminal."""


@click.command()
@bundle_argument
@comparison_options
@json_option
def command(bundle: str, as_json: bool, **asked: Any) -> None:
    """Find the first layer and operator in which a bundle and PyTorch part, and show what the operator was given.

    Parity modes are run in their order up to the first that exceeds its tolerance. Its runs are replayed with the
    values inside the graph exposed, beside the module that the bundle was traced from. Exit code 1 where they part.
    """
    from pe_onnx.bisection import bisect
    from pe_onnx.cli._comparison import comparison
    from pe_onnx.cli._options import stages
    from pe_onnx.errors import ParityError

    options = comparison(bundle, **asked)
    with stages(1, "bisect") as progress:
        progress("PyTorch against onnxruntime")
        found = bisect(bundle, **options)
    if as_json:
        print_json({"bundle": bundle, "divergence": found and found.to_dict()})
    elif found is None:
        click.echo(f"{bundle}: no mode that was run exceeds its tolerance")
    else:
        _print(found)
    if found is not None:
        raise ParityError(found.text)


def _print(found: Divergence) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(f"{found.bundle}: row {found.row} exceeds its tolerance at position {found.position}")
    table = Table(title=f"inputs of {found.reader}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("input", "shape", "min", "max", "mean", "std", "off PyTorch's"):
        table.add_column(name, justify="left" if name in ("input", "shape") else "right", overflow="fold")
    for s in found.inputs:
        made = f" = {' <- '.join(s.made_by)}" if s.made_by else ""
        off = "no counterpart" if s.difference is None else f"{s.difference.max_abs:.1e}"
        shape = f"{s.dtype} [{', '.join(map(str, s.shape))}]"
        table.add_row(s.name + made, shape, *(f"{x:.4g}" for x in (s.minimum, s.maximum, s.mean, s.std)), off)
    console.print(table)
