"""Prints how far the sessions of a bundle are from each other, and what fell back."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from pe_onnx.session_matrix import SessionMatrix

SHOWN_NODES = 6
"""Names of one kind of node that fell back; the rest are counted."""


def print_matrix(matrix: SessionMatrix, console: Console | None = None) -> None:
    """The lower half of the matrix, the pairs over the tolerance, and the nodes that fell back.

    console: rich's; default one on stdout.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    title = f"{matrix.bundle}: greatest difference of two sessions, of the logits' spread"
    console.print(escape(title), soft_wrap=True)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", justify="right")
    table.add_column("session", no_wrap=True)
    for i in range(len(matrix.names) - 1):
        table.add_column(str(i + 1), justify="right", no_wrap=True)
    for i, name in enumerate(matrix.names):
        cells = [_cell(matrix.differences[i][j], matrix.tolerance.error) for j in range(i)]
        table.add_row(str(i + 1), escape(name), *cells)
    console.print(table)
    for apart in matrix.failures:
        console.print(f"[red]apart[/] {escape(apart.a)} | {escape(apart.b)}: {apart.difference:.1e}", soft_wrap=True)
    for line in fallback_lines(matrix):
        console.print(f"[yellow]fell back[/] {escape(line)}", soft_wrap=True)
    verdict = "[green]pass[/]" if matrix.passed else "[red]FAIL[/]"
    allowed = escape(f"{matrix.tolerance.error:.1e} of the spread ({matrix.spread:.3g}) is allowed")
    console.print(f"{verdict}: {allowed}; {matrix.positions} positions", soft_wrap=True)


def _cell(difference: float, allowed: float) -> str:
    text = "0" if difference == 0 else f"{difference:.0e}"
    return text if difference <= allowed else f"[red]{text}[/]"


def fallback_lines(matrix: SessionMatrix) -> list[str]:
    """For each provider asked for and operator one line: how many nodes fell back, where to, and their names."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for f in matrix.fallbacks:
        asked = f.session.partition(",")[0]
        operator = f.operator if f.body is None else f"{f.operator} ({f.body})"
        kinds.setdefault((asked, operator, f.provider), []).append(f.node)
    lines = []
    for (asked, operator, provider), nodes in kinds.items():
        distinct = list(Counter(nodes))
        more = f" and {len(distinct) - SHOWN_NODES} more" if len(distinct) > SHOWN_NODES else ""
        lines.append(f"from {asked} to {provider}: {operator}: {', '.join(distinct[:SHOWN_NODES])}{more}")
    return lines
