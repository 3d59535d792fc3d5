"""Check bundles for CI: parity, sessions, latency, budgets, regressions; one verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pe_onnx.cli._options import parse_share, stages
from pe_onnx.cli._reports import STDOUT, require_writable, write_reports

if TYPE_CHECKING:
    from pe_onnx.check_report import BundleCheck, CheckReport
    from pe_onnx.suite import Entry, Suite


def _print_schema(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from pe_onnx.check_report import SCHEMA

        click.echo(SCHEMA.read_text("utf-8"), nl=False)
        ctx.exit()


def _share(ctx: click.Context, option: click.Parameter, text: str | None) -> float | None:
    return None if text is None else parse_share(text, "--max-regression")


def _names(ctx: click.Context, option: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...] | None:
    """``a,b`` and an option given twice are the same. None where it is not given."""
    names = tuple(name.strip() for text in given for name in text.split(","))
    if not all(names):
        raise click.UsageError(f"{option.opts[0]} = {','.join(given)!r} must be names, with commas between them")
    return names or None


def _file(*names: str, **options: Any) -> Any:
    return click.option(*names, type=click.Path(path_type=Path), metavar="FILE", **options)


@click.command(epilog="Exit code 0: all passed; 1: something failed; 2: wrong usage.")
@click.argument("bundles", nargs=-1, metavar="[DIR]...")
@_file("--suite", help="What to check. [pe-onnx.toml, or pyproject.toml]")
@click.option("--reference", metavar="MODEL", help="PyTorch's side: a checkpoint, or package.module:attribute.")
@click.option(
    "--provider", "providers", multiple=True, callback=_names, metavar="NAME,...", help="cpu, cuda, auto. [cpu]"
)
@click.option("--modes", multiple=True, callback=_names, metavar="NAME,...", help="Only these modes of parity.")
@click.option("--tolerance", type=float, metavar="X", help="Of the error relative to the spread, for the dtype's.")
@click.option("--max-kl", type=float, metavar="X", help="Nats a token that rounding weights may cost, for the rule's.")
@_file("--text", help="For bits per byte of quantized bundles, in place of the built-in text.")
@_file("--baseline", help="Latency of an earlier state, relative to a yardstick of the machine.")
@click.option(
    "--max-regression", callback=_share, metavar="SHARE", help="Slower than the baseline by this at most. [10%]"
)
@click.option("--update-baseline", is_flag=True, help="Write what is measured into the baseline in place of comparing.")
@_file("--json", "json_file", help="Write the report as JSON; - is standard output.")
@_file("--junit", "junit_file", help="Write the report as JUnit XML.")
@_file("--markdown", "markdown_file", help="Write the report as Markdown, for a job's page.")
@click.option("--quality/--no-quality", default=None, help="Compare quantized bundles with PyTorch's weights. [on]")
@click.option("--matrix/--no-matrix", default=None, help="Compare sessions with each other. [on]")
@click.option("--latency/--no-latency", default=None, help="Measure latency. [on]")
@click.option("--budget", "budget_s", type=float, metavar="S", help="Seconds of measuring latency a bundle. [20]")
@click.option("--threads", type=int, metavar="N", help="Threads of one operator; 0 for one a core. [0]")
@click.option("--length", type=int, metavar="N", help="Tokens of each random row of parity. [160]")
@click.option("--seed", type=int, metavar="N", help="Of the random rows. [0]")
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON schema of --json and do nothing else.",
)
def command(
    bundles: tuple[str, ...],
    suite: Path | None,
    json_file: Path | None,
    junit_file: Path | None,
    markdown_file: Path | None,
    update_baseline: bool,
    **given: Any,
) -> None:
    """Check bundles against PyTorch, against themselves in other sessions, and against budgets and a baseline; of
    quantized ones what rounding their weights costs.

    DIR is a folder or a quoted pattern such as 'bundles/*'. Without one, pe-onnx.toml, or [tool.pe-onnx.check] of
    pyproject.toml, says what to check; options come before what it says. Where parity fails, the first node at which
    ONNX and PyTorch part is named. Every report is written whole, also when the check fails.
    """
    from pe_onnx.checking import PARTS, check
    from pe_onnx.errors import CheckError

    asked = _suite(suite, bundles)
    entries = _entries(bundles, asked, given)
    settings = _settings(asked, given)
    _require_consistent(settings, update_baseline)
    reports = {"--json": json_file, "--junit": junit_file, "--markdown": markdown_file}
    written_last = {"--baseline": settings["baseline"]} if update_baseline else {}
    require_writable({**reports, **written_last}.items())
    total = len(entries) * len(settings.get("providers", ("cpu",))) * len(PARTS)
    with stages(total, "check") as progress:
        report = check(
            entries,
            **settings,
            update_baseline=update_baseline,
            import_from=() if asked is None else (asked.file.parent,),
            progress=progress,
            finished=_say,
        )
    failed = _write(report, reports)
    _print(report, to_stderr=STDOUT in reports.values())
    if failed:
        raise CheckError("; ".join(failed))
    if not report.passed:
        raise CheckError(f"check failed: {report.verdict.removeprefix('FAIL: ')}")


def _suite(file: Path | None, bundles: Sequence[str]) -> Suite | None:
    from pe_onnx.suite import PYPROJECT, SUITE, find_suite, read_suite

    if file is None and bundles:
        return None
    file = file or find_suite(Path())
    if file is None:
        raise click.UsageError(f"give DIR, or list bundles in {SUITE} or under [tool.pe-onnx.check] in {PYPROJECT}")
    return read_suite(file)


def _entries(bundles: Sequence[str], suite: Suite | None, given: dict[str, Any]) -> list[Entry]:
    """The bundles that are named, each with what the suite says of it, unless an option says otherwise."""
    from pe_onnx.suite import Entry, expand

    listed = [] if suite is None else expand(suite.bundles, suite.file.parent, may_be_empty=bool(bundles))
    if bundles:
        own = {Path(entry.path).resolve(): entry for entry in listed}
        named = expand([Entry(text) for text in bundles])
        listed = [dataclasses.replace(own.get(Path(entry.path).resolve(), entry), path=entry.path) for entry in named]
    overridden: dict[str, Any] = {
        name: None for name in ("reference", "modes", "tolerance", "max_kl") if given[name] is not None
    }
    return [dataclasses.replace(entry, **overridden) for entry in listed]


def _settings(suite: Suite | None, given: dict[str, Any]) -> dict[str, Any]:
    """``check``'s options: those of the command line before the suite's."""
    own = {} if suite is None else vars(suite)
    settings = {**own, **{name: value for name, value in given.items() if value is not None}}
    settings["tokens"] = settings.pop("length", None)
    return {name: x for name, x in settings.items() if x is not None and name not in ("file", "bundles")}


def _require_consistent(settings: dict[str, Any], update_baseline: bool) -> None:
    if update_baseline and "baseline" not in settings:
        raise click.UsageError("--update-baseline needs --baseline FILE, the file to write")
    if update_baseline and not settings.get("latency", True):
        raise click.UsageError("--update-baseline measures latency; give it without --no-latency")
    if "max_regression" in settings and "baseline" not in settings:
        raise click.UsageError("--max-regression needs --baseline FILE, what to compare with")


def _write(report: CheckReport, files: dict[str, Path | None]) -> list[str]:
    """All reports; what could not be written."""
    import json

    from pe_onnx.check_junit import to_junit
    from pe_onnx.check_markdown import to_markdown

    forms: dict[str, Callable[[], str]] = {
        "--json": lambda: json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "--junit": lambda: to_junit(report),
        "--markdown": lambda: to_markdown(report),
    }
    return write_reports((path, forms[option]) for option, path in files.items())


def _say(check: BundleCheck) -> None:
    """A line as each bundle is done, where no bar is shown."""
    from rich.console import Console

    from pe_onnx.check_report import printable

    if not Console(stderr=True).is_terminal:
        click.echo(f"{printable(check.label)}: {'pass' if check.passed else 'FAIL'}, {check.seconds:.1f} s", err=True)


def _print(report: CheckReport, to_stderr: bool) -> None:
    """The table, what failed with its next step, sessions that part or fell back, and the verdict."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pe_onnx.check_report import COLUMNS, baseline_line, printable, row, skipped, tolerance_rules
    from pe_onnx.cli._matrix import print_matrix

    console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 240  # a log has no edge, and names are copied from it

    def say(line: str) -> None:
        console.print(printable(line))

    rows = [row(check) for check in report.checks]
    shown = [i for i in range(len(COLUMNS)) if any(cells[i] != "-" for cells in rows)]
    if len({check.provider for check in report.checks}) == 1:
        shown.remove(COLUMNS.index("provider"))
    table = Table(box=None, padding=(0, 2 if console.width > 100 else 1, 0, 0), header_style="dim")
    for i in shown:
        table.add_column(
            COLUMNS[i],
            justify="left" if COLUMNS[i] in ("bundle", "provider", "verdict") else "right",
            overflow="fold",
            min_width=min(12 if i == 0 else 99, max(len(cells[i]) for cells in rows)),
        )
    for check, cells in zip(report.checks, rows, strict=True):
        *figures, verdict = (escape(printable(cells[i])) for i in shown)
        table.add_row(*figures, f"[{'green' if check.passed else 'bold red'}]{verdict}[/]")
    console.print(table)
    for check in report.checks:
        for title, finding in check.explained:
            console.print()
            say(f"[bold red]{escape(check.label)}, {escape(title)}[/]: {escape(finding.message)}")
            if finding.part == "parity" and finding.details:
                say(f"  {escape(finding.details)}")
            if finding.next_step:
                say(f"  next: {escape(finding.next_step)}")
    for check in report.checks:
        if check.sessions is not None and (not check.sessions["passed"] or check.sessions["fallbacks"]):
            console.print()
            print_matrix(check.sessions, check.label, console)
    for (title, why), labels in skipped(report).items():
        of = "all" if len(labels) == len(report.checks) else ", ".join(labels)
        say(f"[dim]skipped: {escape(f'{title}: {why} ({of})')}[/]")
    for rule in tolerance_rules(report):
        say(f"[dim]allowed: {escape(rule)}[/]")
    if report.baseline_written:
        say(escape(baseline_line(report)))
    word, colon, rest = report.verdict.partition(":")
    console.print()
    say(f"[{'green' if report.passed else 'bold red'}]{word}[/]{colon}{escape(rest)}")
