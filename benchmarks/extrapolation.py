"""The trained decoders past their trained length, RoPE's weights under three scalings among them: bits per byte.

What ``pe-onnx compare --extended`` measures, kept as JSON and as the README's table.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import readme_tables
from rich.console import Console

from pe_onnx.comparison import compare
from pe_onnx.comparison_tables import tables


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_suffix(".json"))
@click.option("--readme", type=click.Path(path_type=Path, exists=True), help="Write the table into this file too.")
def main(output: Path, readme: Path | None) -> None:
    """Compare all six, and RoPE at four times its length."""
    with Console(stderr=True).status("compare") as status:
        report = compare(extended=True, progress=status.update)
    bits = next(iter(tables(report)))
    lines = [f"| {' | '.join(bits.columns)} |", f"|---|{'---:|' * (len(bits.columns) - 1)}"]
    lines += [f"| `{name}` | {' | '.join(cells)} |" for name, *cells in bits.rows]
    output.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    click.echo("\n".join(lines))
    if readme is not None:
        readme_tables.write(readme, "extrapolation", "\n".join(lines))


if __name__ == "__main__":
    main()
