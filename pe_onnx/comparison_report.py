"""A comparison as one HTML file: findings, figures, tables, and what each encoding does.

It asks nothing of any server: no script, no font, no image but what stands in it. Light or dark as the reader's system
is, and one column on a phone.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from time import strftime
from typing import Any

from pe_onnx.bench_tables import UNKNOWN, Table
from pe_onnx.comparison import encoding_of
from pe_onnx.comparison_figures import Comparison, Contestant
from pe_onnx.comparison_plots import picture, plots
from pe_onnx.comparison_tables import CANNOT, notes, tables
from pe_onnx.errors import ConfigError, needs
from pe_onnx.explanation import explain

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; --card: #f6f8fa;
  --best: #0a6b3d }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --faint: #9198a1; --line: #3d444d;
  --card: #151b23; --best: #4ac285 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem }
h3 { font-size: 1rem; margin: 0 0 .25rem }
p { margin: .25rem 0 .5rem; max-width: 46rem }
.faint, figcaption { color: var(--faint); font-size: .875rem }
.grid { display: grid; gap: 2rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; min-width: 0 }
svg { display: block; color: var(--faint); overflow: visible }
svg * { stroke-linejoin: round; stroke-linecap: butt }
.grid svg { width: 100%; height: auto; max-width: 36rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9375rem; margin-bottom: 1.5rem }
.card svg { width: 100%; height: auto; min-width: 36rem; max-width: var(--width) }
th, td { padding: .25rem 1rem .25rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { font-weight: 400; color: var(--faint); vertical-align: bottom; white-space: normal; min-width: 4.5rem }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page) }
td.none { color: var(--faint) }
td.best { color: var(--best); font-weight: 600 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 0 0 1rem }
code { font-size: .875em; overflow-wrap: anywhere }
li { margin: .25rem 0; max-width: 46rem }
"""
SCORED = "Bits"
"""How the title of a table begins whose least figure of each column stands out; a time's may be the machine's mood."""


def to_html(report: Comparison) -> str:
    """The page. Raises MissingDependencyError where matplotlib is missing."""
    with needs("an HTML report", "'pe-onnx[plot]'"):
        import matplotlib  # noqa: F401
    names = ", ".join(c.name for c in report.contestants)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(f'Positional encodings: {names}')}</title>",
            f"<style>{STYLE}</style></head><body>",
            *_head(report),
            "<h2>Figures</h2>",
            '<div class="grid">',
            *(
                f"<figure><h3>{_text(plot.title)}</h3>{plot.svg}<figcaption>{_text(plot.caption)}</figcaption></figure>"
                for plot in plots(report)
            ),
            "</div>",
            "<h2>Numbers</h2>",
            *(_table(table) for table in tables(report)),
            "<h2>The encodings</h2>",
            *_cards(report),
            "<h2>How it was measured</h2>",
            "<ul>",
            *(f"<li>{_text(note)}</li>" for note in notes(report)),
            f"<li>{_text(_machine(report))}</li>",
            "</ul>",
            "</body></html>",
            "",
        ]
    )


def _head(report: Comparison) -> Iterator[str]:
    yield "<h1>Positional encodings, compared in onnxruntime</h1>"
    yield f'<p class="faint">pe-onnx {_text(report.tools["pe-onnx"])}, {strftime("%d %B %Y")}</p>'
    findings = list(report.findings())
    if findings:
        yield "<ul>"
        yield from (f"<li>{_text(line)}</li>" for line in findings)
        yield "</ul>"


def _table(table: Table) -> str:
    best = _best(table)
    lines = [f'<h3>{_text(table.title)}</h3><div class="wide" tabindex="0"><table>', "<thead><tr>"]
    lines += [f'<th scope="col">{_text(name)}</th>' for name in table.columns]
    lines += ["</tr></thead><tbody>"]
    for i, row in enumerate(table.rows):
        cells = []
        for j, cell in enumerate(row):
            kind = "none" if cell in (CANNOT, UNKNOWN) else "best" if (i, j) in best else ""
            cells.append(f"<td{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{_text(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def _best(table: Table) -> set[tuple[int, int]]:
    """Row and column of each column's least figure, where there are several contestants."""
    if not table.title.startswith(SCORED) or len(table.rows) < 2:
        return set()
    found = set()
    for j in range(1, len(table.columns)):
        figures = {
            i: float(row[j].replace(",", "")) for i, row in enumerate(table.rows) if row[j] not in (CANNOT, UNKNOWN)
        }
        found |= {(i, j) for i, value in figures.items() if value == min(figures.values())}
    return found


def _cards(report: Comparison) -> Iterator[str]:
    """One for each encoding, whoever has it."""
    shown: dict[str, list[Contestant]] = {}
    for c in report.contestants:
        shown.setdefault(f"{c.encoding} {c.parameters} {c.config and c.config.get('weights')}", []).append(c)
    for i, of in enumerate(shown.values()):
        first, names = of[0], ", ".join(c.name for c in of)
        yield '<section class="card">'
        yield f"<h3>{_text(names)}</h3>"
        yield f'<p class="faint">{_text(_facts(first))}</p>'
        yield from _about(first)
        encoding = encoding_of(first.config)
        if encoding is not None:
            try:
                yield f'<div class="wide" tabindex="0">{picture(encoding, f"encoding{i}")}</div>'
            except Exception as error:  # of a user's own encoding, after minutes of measuring
                yield f'<p class="faint">{_text(f"It cannot be drawn: {type(error).__name__}: {error}")}</p>'
        yield "</section>"


def _about(c: Contestant) -> Iterator[str]:
    """What the encoding is, costs and cannot, in its own file's words."""
    try:
        about = explain(c.encoding)
    except ConfigError:
        yield f"<p>The encoding of {_text(c.bundle)}.</p>"
        return
    yield f"<p>{_text(about.title)}. {_text(about.text)}</p>"
    for name in ("cost", "limits"):
        words = getattr(about, name)
        if words:
            yield f"<p><strong>{name.capitalize()}:</strong> {_text(words)}</p>"
    if about.paper:
        yield f'<p class="faint">{_text(about.paper)}</p>'


def _facts(c: Contestant) -> str:
    weights = (
        "weights of its own unknown" if c.encoding_weights is None else f"{c.encoding_weights:,} weights of its own"
    )
    facts = [weights, "no limit" if c.max_length is None else f"{c.max_length:,} tokens at most"]
    if c.trained_length is not None:
        facts.append(f"trained at {c.trained_length:,} tokens")
    facts += [f"{key} = {value}" for key, value in c.parameters.items()]
    return "; ".join(facts)


def _machine(report: Comparison) -> str:
    machine = ", ".join(str(value) for value in report.machine.values() if value)
    tools = ", ".join(f"{name} {version}" for name, version in report.tools.items())
    return f"{machine}; {tools}"


def _text(value: Any) -> str:
    return escape(str(value))
