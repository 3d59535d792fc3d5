"""Measure load, first token, prefill, decode, memory, and what the encoding costs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pe_onnx.cli._options import bundle_argument, json_option, print_json, provider_option, threads_option
from pe_onnx.cli._reports import STDOUT, require_writable, write_reports
from pe_onnx.cli._tables import print_tables

if TYPE_CHECKING:
    from pe_onnx.bench_report import BenchReport


def _file(*names: str, **options: Any) -> Any:
    return click.option(*names, type=click.Path(path_type=Path), metavar="FILE", **options)


@click.command()
@bundle_argument
@click.option("--depths", default="128,1024", metavar="N,N,...", show_default=True, help="Tokens in the cache.")
@click.option("--prompt-tokens", default=128, metavar="N", show_default=True, help="Of prefill and first token.")
@click.option("--source-tokens", type=int, metavar="N", help="Of an encoder-decoder's source. [--prompt-tokens]")
@click.option("--budget", default=30.0, metavar="S", show_default=True, help="Seconds for all that is timed.")
@click.option("--precision", default="3%", metavar="P", show_default=True, help="Half width of intervals to reach.")
@click.option("--profile", is_flag=True, help="Share of time by operator, and of the encoding.")
@click.option("--compare", multiple=True, metavar="torch|DIR", help="In turns with it; may be given again.")
@click.option("--reference", metavar="MODEL", help="Of --compare torch: a checkpoint, or package.module:attribute.")
@_file("--csv", "csv_file", help="Every figure in a row; - is standard output.")
@_file("--markdown", "markdown_file", help="The tables in Markdown.")
@_file("--plot", "plots", multiple=True, help="A figure, .png or .svg; may be given again.")
@provider_option
@threads_option
@json_option
def command(
    bundle: str,
    depths: str,
    prompt_tokens: int,
    source_tokens: int | None,
    budget: float,
    precision: str,
    profile: bool,
    compare: tuple[str, ...],
    reference: str | None,
    csv_file: Path | None,
    markdown_file: Path | None,
    plots: tuple[Path, ...],
    provider: str,
    threads: int,
    as_json: bool,
) -> None:
    """Measure a bundle, and others in turns with it.

    Each measurement ends when the 95 % interval of its median is within --precision, or when its share of --budget is
    out; the table says which. Peak memory and load time are those of processes of their own. Where one file cannot be
    written the others are, and the table is shown.
    """
    from pe_onnx.cli._comparison import named
    from pe_onnx.cli._options import parse_counts, parse_share, stages
    from pe_onnx.errors import ExportError

    counts = parse_counts(depths, "--depths")
    share = parse_share(precision, "--precision")
    for path in plots:
        from pe_onnx.plots import check_plot

        check_plot(path)
    files = [("--csv", csv_file), ("--markdown", markdown_file), *(("--plot", path) for path in plots)]
    require_writable([("--json", STDOUT if as_json else None), *files])
    from pe_onnx.bench_tables import markdown
    from pe_onnx.latency import bench

    total = 3 + 2 * (1 + len(compare)) + len(counts)
    with stages(total, "bench") as progress:
        report = bench(
            bundle,
            provider=provider,
            threads=threads,
            depths=counts,
            prompt_tokens=prompt_tokens,
            source_tokens=source_tokens,
            budget_s=budget,
            precision=share,
            profile=profile,
            compare=compare,
            reference=named(reference),
            progress=progress,
        )
    failed = write_reports(
        [
            (csv_file, report.to_csv),
            (markdown_file, lambda: markdown(report)),
            *((path, partial(_figure, report, path)) for path in plots),
        ]
    )
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report, to_stderr=STDOUT in (csv_file, markdown_file))
    if failed:
        raise ExportError("; ".join(failed))


def _figure(report: BenchReport, path: Path) -> bytes:
    from pe_onnx.plots import draw

    return draw(report, path)


def _print(report: BenchReport, to_stderr: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    from pe_onnx.bench_tables import summary, tables

    console = Console(stderr=to_stderr)
    print_tables(console, tables(report))
    console.print(escape(summary(report)), style="dim", highlight=False)
