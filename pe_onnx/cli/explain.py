"""Explain an encoding: formula, paper, cost, cache, limits, its nodes in the graph, and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pe_onnx.cli._options import json_option, parse_encoding, print_json, stages

if TYPE_CHECKING:
    from pe_onnx.encoding_cost import AddedNodes, Cost
    from pe_onnx.explanation import Explanation

LABELS = {"formula": "formula", "paper": "paper", "cost": "cost", "cache": "KV cache", "limits": "limits"}


@click.command(epilog="The encodings: pe-onnx list --encodings")
@click.argument("encoding", metavar="ENCODING[:KEY=VALUE,...]")
@click.option("--graph", is_flag=True, help="The nodes that it adds to the exported graph of a tiny decoder.")
@click.option("--count", is_flag=True, help="Its parameters, and the bytes that a decode step makes of it.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="What it does, as .svg or .png.")
@click.option("--preset", metavar="NAME", help="Sizes for --count and --plot. [small; a plot: trained weights]")
@click.option("--markdown", is_flag=True, help="Markdown in place of a table.")
@json_option
def command(
    encoding: str, graph: bool, count: bool, plot: Path | None, preset: str | None, markdown: bool, as_json: bool
) -> None:
    """Explain an encoding: what it does, formula, paper, cost, what it means for a KV cache, limits, its ONNX form.

    The words stand in the encoding's own file; nodes, figures and the picture are made from its code.
    """
    from pe_onnx.config import DecoderConfig
    from pe_onnx.explanation import explain

    if markdown and as_json:
        raise click.UsageError("give one of --markdown and --json")
    name, parameters = parse_encoding(encoding, option="")
    about = explain(name)
    sizes = "small" if preset is None else preset
    DecoderConfig.preset(sizes)  # refuses an unknown one
    if plot is not None:
        from pe_onnx.plots import check_plot
        from pe_onnx.report_files import check_writable

        check_plot(plot)
        check_writable(plot, "--plot")
    shown: dict[str, Any] = {}
    nodes, figures = None, None
    if parameters or count or plot or not about.hook:
        built = _built(name, parameters, sizes)
        about = replace(about, hook=built.hook)
        shown = built.parameters_used
        if count:
            from pe_onnx.encoding_cost import cost

            figures = cost(built)
        if plot is not None:
            trained = _trained(name) if preset is None and not parameters else None
            _picture(trained or built, plot, trained is not None)
    if graph:
        from pe_onnx.encoding_cost import added_nodes

        with stages(2, "export") as progress:
            nodes = added_nodes(name, parameters, progress)
    if as_json:
        document = {**about.to_dict(), "parameters": shown, "preset": sizes}
        document |= {"graph": nodes.to_dict()} if nodes else {}
        document |= {"count": figures.to_dict()} if figures else {}
        print_json(document)
    elif markdown:
        click.echo("\n".join(_markdown(about, _rows(about, shown, figures, sizes), nodes)))
    else:
        _show(about, _rows(about, shown, figures, sizes), nodes)
    if plot is not None:
        click.echo(f"picture: {plot}", err=True)


def _built(name: str, parameters: dict[str, str], preset: str) -> Any:
    """With random weights, those of an export."""
    from pe_onnx.config import DecoderConfig
    from pe_onnx.errors import needs

    config = DecoderConfig.preset(preset, encoding=name, encoding_parameters=parameters)
    with needs("an encoding's own code", "'pe-onnx[export]'"):
        import torch

        from pe_onnx.encoding import build_encoding
    encoding = build_encoding(config)
    encoding.draw_weights(torch.Generator().manual_seed(config.seed))
    return encoding


def _trained(name: str) -> Any:
    """With the weights that come with pe-onnx; None where it has none of its own among them."""
    from pe_onnx import trained_weights
    from pe_onnx.exporter import decoder_config
    from pe_onnx.models.decoder import Decoder

    if name not in trained_weights.names():
        return None
    encoding = Decoder(decoder_config(name)[0]).encoding
    return encoding if any(True for _ in encoding.parameters()) else None


def _picture(encoding: Any, path: Path, trained: bool) -> None:
    from pe_onnx.encoding_pictures import draw
    from pe_onnx.plots import rendered
    from pe_onnx.report_files import write_report

    random = any(True for _ in encoding.parameters())
    note = "trained weights, at 256 bytes" if trained else "weights are random, as before training" if random else ""
    write_report(path, rendered(path, lambda figure: draw(encoding, figure, note)))


def _form(about: Explanation) -> str:
    """Its ONNX form in a line."""
    from pe_onnx.explanation import HOOKS

    operators = ", ".join(about.operators) if about.operators else "no custom operator"
    hook = f"{about.hook}: {HOOKS[about.hook]}" if about.hook else "its file does not say which hook it has"
    return f"{hook}; {operators}"


def _rows(
    about: Explanation, parameters: dict[str, Any], figures: Cost | None, preset: str
) -> Iterator[tuple[str, str]]:
    if about.text:
        yield "what", about.text
    if parameters:
        yield "parameters", ", ".join(f"{name} = {value}" for name, value in parameters.items())
    for section, label in LABELS.items():
        if text := getattr(about, section):
            yield label, text if section == "formula" else _sentence(text)
    yield "in the graph", _form(about)
    if figures is not None:
        yield f"counted, {preset}", _counted(figures)
    if about.missing:
        yield "missing", f"sections of its docstring: {', '.join(section.capitalize() for section in about.missing)}"


def _sentence(text: str) -> str:
    """With a capital, unless it begins with a name."""
    return text if "_" in text.split()[0] else text[0].upper() + text[1:]


def _counted(figures: Cost) -> str:
    made = ", ".join(f"{n:,} at {depth:,} tokens" for depth, n in figures.step_bytes.items())
    step = f"bytes that a decode step makes in float32, of all layers: {made}" if made else "no length within the limit"
    return f"{figures.parameters:,} parameters; {step}"


def _summary(nodes: AddedNodes) -> str:
    less = f", {len(nodes.removed)} fewer" if nodes.removed else ""
    functions = f"; functions {', '.join(nodes.functions)}" if nodes.functions else ""
    return f"{len(nodes.added)} nodes more than `none` has{less}, in a decoder of 2 layers{functions}"


def _show(about: Explanation, rows: Iterable[tuple[str, str]], nodes: AddedNodes | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False)
    console.print(Text(f"{about.name}  ", style="bold").append(about.title, style="not bold"), soft_wrap=True)
    console.print()
    width = max(map(len, LABELS.values())) + 8
    for label, text in rows:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 1))
        table.add_column(style="dim", no_wrap=True, min_width=width)
        table.add_column()
        text = text.replace("``", "`")
        if label == "formula":  # whose lines are never broken
            code, _, text = text.partition("\n\n")
            console.print("".join(f"   {line}\n" for line in code.split("\n")), soft_wrap=True)
            label = ""
        if text:
            table.add_row(label, text)
            console.print(table)
            console.print()
    if nodes is not None:
        from pe_onnx.encoding_cost import operator

        console.print(f" {_summary(nodes)}")
        listed = Table("operator", "node", box=None, padding=(0, 2, 0, 1), header_style="dim")
        for node in nodes.added:
            listed.add_row(operator(node), node.name)
        console.print(listed)


def _markdown(about: Explanation, rows: Iterable[tuple[str, str]], nodes: AddedNodes | None) -> Iterator[str]:
    yield f"### `{about.name}`: {about.title}"
    for label, text in rows:
        yield ""
        if label == "formula":
            code, _, rest = text.partition("\n\n")
            yield f"```\n{code}\n```" + (f"\n\n{rest}" if rest else "")
        else:
            text = text.replace("``", "`")
            yield text if label == "what" else f"**{label[0].upper()}{label[1:]}:** {text}"
    if nodes is not None:
        from pe_onnx.encoding_cost import operator

        yield f"\n{_summary(nodes)}\n\n| operator | node |\n|---|---|"
        for node in nodes.added:
            yield f"| `{operator(node)}` | `{node.name}` |"
