"""List encodings, checkpoint families, presets and targets."""

from __future__ import annotations

import click

from pe_onnx.cli._options import json_option, print_json


@click.command()
@json_option
def command(as_json: bool) -> None:
    """List encodings, checkpoint families, presets and targets."""
    from pe_onnx import contract, discovery
    from pe_onnx.config import PRESETS, DecoderConfig
    from pe_onnx.families import FAMILIES

    encodings = {name: discovery.summary("encodings", name) for name in discovery.names("encodings")}
    presets = {name: DecoderConfig.preset(name) for name in PRESETS}
    sizes = {
        name: f"{c.hidden_size} wide, {c.num_hidden_layers} layers, {c.num_attention_heads} heads"
        for name, c in presets.items()
    }
    if as_json:
        print_json({"encodings": encodings, "families": FAMILIES, "presets": sizes, "targets": contract.TARGETS})
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    families = {name: f"{encoding}, through the bridge to transformers" for name, encoding in FAMILIES.items()}
    for title, rows in (
        ("--encoding", encodings),
        ("--model, by model_type", families),
        ("--preset", sizes),
        ("--target", contract.TARGETS),
    ):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 1))
        table.add_column(style="bold", no_wrap=True, min_width=12)
        table.add_column()
        for name, text in rows.items():
            table.add_row(name, text)
        console.print(table)
        console.print()
