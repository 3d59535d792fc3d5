"""Compare encodings: bits per byte past the trained length, speed, memory; as a table, JSON or an HTML report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pe_onnx.cli._options import json_option, parse_counts, parse_encoding, print_json, provider_option, threads_option
from pe_onnx.cli._reports import STDOUT, require_writable, write_reports
from pe_onnx.cli._tables import print_tables

if TYPE_CHECKING:
    from pe_onnx.comparison_figures import Comparison


@click.command()
@click.argument("bundles", nargs=-1, type=click.Path(), metavar="[DIR]...")
@click.option("--encoding", "specs", multiple=True, metavar="NAME[:KEY=VALUE,...]", help="Only these trained decoders.")
@click.option("--extended", is_flag=True, help="RoPE's weights at 4 times their length too: linear, NTK, YaRN.")
@click.option("--length", metavar="N,N,...", help="Tokens. [0.5, 1, 2, 4 and 8 times the trained length]")
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="UTF-8, for the held-out text.")
@click.option("--tokens", type=int, metavar="N", help="Of the text that count. [16384]")
@click.option("--budget", type=float, metavar="S", help="Seconds for all that is timed. [60]")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="An HTML report, one file.")
@click.option(
    "--markdown", "markdown_file", type=click.Path(path_type=Path), metavar="FILE", help="Tables; - is stdout."
)
@provider_option
@threads_option
@json_option
def command(
    bundles: tuple[str, ...],
    specs: tuple[str, ...],
    extended: bool,
    length: str | None,
    text: Path | None,
    tokens: int | None,
    budget: float | None,
    output: Path | None,
    markdown_file: Path | None,
    provider: str,
    threads: int,
    as_json: bool,
) -> None:
    """Compare bundles; without any, the trained byte-level decoders that come with pe-onnx, one for each encoding.

    Bits per byte of held-out text up to 8 times the trained length, decode and prefill against length, memory, and the
    encoding's own weights, all measured in onnxruntime.
    """
    counts = parse_counts(length, "--length") if length is not None else None
    files = [("-o", output), ("--markdown", markdown_file)]
    if output == STDOUT:
        raise click.UsageError("-o - must be a file; --markdown - and --json write to standard output")
    require_writable([("--json", STDOUT if as_json else None), *files])
    if output is not None:
        from pe_onnx.errors import needs

        with needs("an HTML report", "'pe-onnx[plot]'"):
            import matplotlib  # noqa: F401
    from pe_onnx.cli._options import stages
    from pe_onnx.comparison import BUDGET_S, MULTIPLES, TOKENS, compare, stage_count
    from pe_onnx.comparison_tables import markdown
    from pe_onnx.errors import ExportError
    from pe_onnx.trained_contestants import Spec, extended_rope, shipped

    chosen = [Spec(*parse_encoding(spec)) for spec in specs] or None
    exports = [*(chosen or (() if bundles else shipped())), *(extended_rope() if extended else ())]
    total = stage_count(len(bundles), len(exports), len(counts or MULTIPLES))
    with stages(total, "compare") as progress:
        report = compare(
            bundles,
            encodings=chosen,
            extended=extended,
            lengths=counts,
            text=text,
            tokens=TOKENS if tokens is None else tokens,
            provider=provider,
            threads=threads,
            budget_s=BUDGET_S if budget is None else budget,
            progress=progress,
        )
    if as_json:  # before the files: a picture of a user's own encoding may fail
        print_json(report.to_dict())
    else:
        _print(report, to_stderr=markdown_file == STDOUT)
    failed = write_reports([(output, lambda: _page(report)), (markdown_file, lambda: markdown(report))])
    if failed:
        raise ExportError("; ".join(failed))


def _page(report: Comparison) -> str:
    from pe_onnx.comparison_report import to_html

    return to_html(report)


def _print(report: Comparison, to_stderr: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    from pe_onnx.comparison_tables import notes, tables

    console = Console(stderr=to_stderr)
    print_tables(console, tables(report))
    for line in report.findings():
        console.print(escape(line), highlight=False)
    for note in notes(report):
        console.print(escape(note), style="dim", highlight=False)
