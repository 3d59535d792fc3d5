"""Prints how far the sessions of a bundle are from each other, and what fell back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pe_onnx.check_report import printable

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_NODES = 6
"""Names of one kind of node that fell back; the rest are counted."""


def print_matrix(matrix: Mapping[str, Any], label: str, console: Console) -> None:
    """The lower half of a SessionMatrix.to_dict(), the pairs over the tolerance, and the nodes that fell back."""
    from rich.markup import escape
    from rich.table import Table

    def say(word: str, line: str) -> None:
        console.print(f"{word} {escape(printable(line))}", soft_wrap=True)

    names, allowed = matrix["names"], matrix["tolerance"]["error"]
    title = f"{label}: greatest difference of two sessions, of the logits' spread"
    console.print(escape(printable(title)), soft_wrap=True)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", justify="right")
    table.add_column("session", no_wrap=True)
    for i in range(len(names) - 1):
        table.add_column(str(i + 1), justify="right", no_wrap=True)
    for i, name in enumerate(names):
        cells = [_cell(x, allowed) for x in matrix["differences"][i][:i]]
        table.add_row(str(i + 1), escape(name), *cells)
    console.print(table)
    for apart in matrix["failures"]:
        found = "not finite" if apart["difference"] is None else f"{apart['difference']:.1e}"
        say("[red]apart[/]", f"{apart['a']} | {apart['b']}: {found}")
    for line in fallback_lines(matrix["fallbacks"]):
        say("[yellow]fell back[/]", line)
    spread = "not finite" if matrix["spread"] is None else f"{matrix['spread']:.3g}"
    verdict = "[green]pass[/]:" if matrix["passed"] else "[red]FAIL[/]:"
    say(verdict, f"{allowed:.1e} of the spread ({spread}) is allowed; {matrix['positions']} positions")


def _cell(difference: float | None, allowed: float) -> str:
    """None is not finite."""
    text = "inf" if difference is None else "0" if difference == 0 else f"{difference:.0e}"
    return text if difference is not None and difference <= allowed else f"[red]{text}[/]"


def fallback_lines(fallbacks: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each provider asked for and operator one line: how many nodes fell back, where to, and their names."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for f in fallbacks:
        asked = f["session"].partition(",")[0]
        operator = f["operator"] if f["body"] is None else f"{f['operator']} ({f['body']})"
        kinds.setdefault((asked, operator, f["provider"]), []).append(f["node"])
    lines = []
    for (asked, operator, provider), nodes in kinds.items():
        distinct = list(Counter(nodes))
        more = f" and {len(distinct) - SHOWN_NODES} more" if len(distinct) > SHOWN_NODES else ""
        lines.append(f"from {asked} to {provider}: {operator}: {', '.join(distinct[:SHOWN_NODES])}{more}")
    return lines
