"""Tables of figures on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from pe_onnx.bench_tables import Table


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    """Where a table is too wide the titles of figures are broken, not names."""
    from rich import table as rich_table
    from rich.markup import escape

    for figures in tables:
        title = escape(figures.title)
        shown = rich_table.Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="dim")
        for name in figures.columns:
            words = name in figures.left
            shown.add_column(name, justify="left" if words else "right", no_wrap=words, overflow="fold")
        for row in figures.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
        console.print()
