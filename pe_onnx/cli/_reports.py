"""The files of reports that a command writes: all are tried before it measures, and one that fails loses no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click

STDOUT = Path("-")
"""Standard output in place of a file."""

Files = Iterable[tuple[str, Path | None]]
"""Options and what they name; None for what was not asked for."""


def require_writable(files: Files) -> None:
    """Now, and not after minutes of measuring.

    Raises UsageError where two options name one file, ConfigError for a place that cannot be written.
    """
    from pe_onnx.report_files import check_writable

    named = [(option, path) for option, path in files if path is not None]
    places = [path if path == STDOUT else path.resolve() for _, path in named]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise click.UsageError(f"{named[i][0]} and {named[places.index(place)][0]} name one file, {named[i][1]}")
    for option, path in named:
        if path != STDOUT:
            check_writable(path, option)


def write_reports(reports: Iterable[tuple[Path | None, Callable[[], str | bytes]]]) -> list[str]:
    """All of them, each made when its turn comes; what could not be written, a line each."""
    from pe_onnx.errors import ExportError
    from pe_onnx.report_files import as_bytes, write_report

    failed = []
    for path, make in reports:
        if path is None:
            continue
        content = make()
        if path == STDOUT:
            click.echo(as_bytes(content), nl=False)
            continue
        try:
            write_report(path, content)
        except ExportError as error:
            failed.append(str(error))
    return failed
