"""Compare a bundle with PyTorch, figures first, verdict second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from pe_onnx.cli._comparison import comparison_options
from pe_onnx.cli._options import bundle_argument, json_option, print_json


@click.command()
@bundle_argument
@comparison_options
@json_option
def command(bundle: str, as_json: bool, **asked: Any) -> None:
    """Compare a bundle with PyTorch on the same tokens: whole, in chunks, token by token, ragged, padded, greedy.

    The reference is eager PyTorch in float32: our own decoder again from its seed, or transformers' own model of the
    checkpoint. What is allowed follows from the dtype and the number of layers. Exit code 1 where that is exceeded, or
    where the two sides choose different tokens that are no near-tie.
    """
    from pe_onnx.cli._comparison import comparison
    from pe_onnx.cli._options import stages
    from pe_onnx.errors import ParityError
    from pe_onnx.parity import check_parity

    options = comparison(bundle, **asked)
    with stages(1, "parity") as progress:
        progress("PyTorch against onnxruntime")
        report = check_parity(bundle, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    if not report.passed:
        mode = next(mode.mode for mode in report.modes if not mode.passed)
        step = bisect_command(bundle, mode, **asked)
        raise ParityError(f"parity failed: {bundle} {_reason(report)}; find the operator with `{step}`")


def bisect_command(
    bundle: str, mode: str, *, prompts: Sequence[str], length: int | None, modes: object, **asked: Any
) -> str:
    """The same comparison of one mode, drilled into."""
    from pe_onnx.commands import command as command_line

    texts = [word for prompt in prompts for word in ("--prompt", prompt)]
    return command_line("bisect", bundle, "--mode", mode, *texts, tokens=length, **asked)


def _reason(report) -> str:  # type: ignore[no-untyped-def]
    """The worst error, or the first disagreement where no error is too great."""
    worst = max(report.modes, key=lambda mode: mode.relative_error)
    if worst.passed:
        mode = next(mode for mode in report.modes if not mode.passed)
        return f"and its reference disagree in mode {mode.mode}, first at {mode.first_disagreement.text}"
    return (
        f"is off by {worst.relative_error:.1e} of the spread in mode {worst.mode}, first at "
        f"{worst.first_difference or 'no single token'}; {report.tolerance.error:.1e} is allowed"
    )


def _print(report) -> None:  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pe_onnx.angles import summary

    console = Console()
    title = escape(f"{report.bundle} against {report.reference}")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("mode", "positions", "max abs", "of spread", "KL, nats", "top-1", "near-ties", "wrong"):
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
            f"[red]{m.disagreements}[/]" if m.disagreements else "0",
            *([] if report.passed else [m.first_difference or ""]),
        )
    console.print(table)
    for m in report.modes:
        if m.first_disagreement is not None:
            console.print(f"[red]wrong[/] {m.mode}: {escape(m.first_disagreement.text)}", soft_wrap=True)
    if report.angles:
        console.print(summary(report.angles), soft_wrap=True, highlight=False)
    console.print(f"allowed: {escape(report.tolerance.rule)}", soft_wrap=True, highlight=False)
    verdict = "[green]pass[/]" if report.passed else "[red]FAIL[/]"
    flips = sum(m.near_ties for m in report.modes), sum(m.disagreements for m in report.modes)
    console.print(
        f"{verdict}: worst error {report.relative_error:.1e} of the spread ({report.spread:.3g}), "
        f"{report.tolerance.error:.1e} allowed; {flips[0]} near-ties, {flips[1]} disagreements",
        soft_wrap=True,
    )
