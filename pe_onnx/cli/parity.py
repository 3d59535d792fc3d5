"""Compare a bundle with PyTorch, figures first, verdict second."""

from __future__ import annotations

import click

from pe_onnx.cli._options import bundle_argument, json_option, print_json, provider_option, threads_option


@click.command()
@bundle_argument
@click.option("--reference", metavar="PATH", help="The checkpoint to compare with, where it is not where it was.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Compare on this text; several make rows.")
@click.option("--length", type=int, metavar="N", help="Tokens of each random row. [160]")
@click.option("--mode", "modes", multiple=True, metavar="NAME", help="Only this mode; may be given again.")
@click.option("--tolerance", type=float, metavar="X", help="Of the error relative to the spread, for the dtype's.")
@click.option("--seed", default=0, metavar="N", help="Of the random rows.")
@provider_option
@threads_option
@json_option
def command(
    bundle: str,
    reference: str | None,
    prompts: tuple[str, ...],
    length: int | None,
    modes: tuple[str, ...],
    tolerance: float | None,
    seed: int,
    provider: str,
    threads: int,
    as_json: bool,
) -> None:
    """Compare a bundle with PyTorch on the same tokens: whole, in chunks, token by token, ragged, padded, greedy.

    The reference is eager PyTorch in float32: our own decoder again from its seed, or transformers' own model of the
    checkpoint. Exit code 1 where the dtype's tolerance is exceeded.
    """
    from pe_onnx.cli._options import prompt_rows, stages
    from pe_onnx.errors import ParityError
    from pe_onnx.parity import DEFAULT_TOKENS, check_parity

    rows = prompt_rows(bundle, prompts)
    with stages(1, "parity") as progress:
        progress("PyTorch against onnxruntime")
        report = check_parity(
            bundle,
            reference,
            rows=rows,
            tokens=DEFAULT_TOKENS if length is None else length,
            modes=modes or None,
            provider=provider,
            tolerance=tolerance,
            seed=seed,
            threads=threads,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    if not report.passed:
        worst = max(report.modes, key=lambda mode: mode.relative_error)
        raise ParityError(
            f"parity failed: {bundle} is off by {worst.relative_error:.1e} of the spread in mode {worst.mode}, first "
            f"at {worst.first_difference or 'no single token'}; {report.dtype} allows {report.tolerance.error:.0e}; find "
            f"the operator with `pe-onnx bisect {bundle} --mode {worst.mode}`"
        )


def _print(report) -> None:  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    title = escape(f"{report.bundle} against {report.reference}")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("mode", "positions", "max abs", "of spread", "KL, nats", "top-1", "near-ties"):
        table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    if not report.passed:
        table.add_column("first over")
    for m in report.modes:
        table.add_row(
            m.mode,
            str(m.positions),
            f"{m.max_abs_error:.1e}",
            f"[{'green' if m.passed else 'red'}]{m.relative_error:.1e}[/]",
            f"{m.kl:.1e}",
            f"{m.top1_agreement:.1%}",
            str(m.near_ties),
            *([] if report.passed else [m.first_difference or ""]),
        )
    console.print(table)
    allowed = report.tolerance
    verdict = "[green]pass[/]" if report.passed else "[red]FAIL[/]"
    console.print(
        f"{verdict}: {report.dtype} allows an error of {allowed.error:.0e} "
        f"of the spread ({report.spread:.3g}) and wants top-1 agreement of {allowed.top1:.0%}; "
        f"worst error {report.relative_error:.1e}"
    )
