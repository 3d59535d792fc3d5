"""A check as Markdown for a CI job's page: the verdict, a table, what failed folded up, and the tools' versions."""

from __future__ import annotations

import re
from typing import Any

from pe_onnx.check_report import (
    COLUMNS,
    TOOLS,
    BundleCheck,
    CheckReport,
    baseline_line,
    printable,
    row,
    skipped,
    tolerance_rules,
)
from pe_onnx.machine import versions

LONGEST_DETAILS = 4000
"""Characters of one finding's details: GitHub drops a summary of more than 1 MiB."""


def to_markdown(report: CheckReport) -> str:
    """GitHub's Markdown, a line break at its end."""
    word, _, rest = report.verdict.partition(": ")
    lines = [f"## pe-onnx check: {word}", "", text(rest), ""]
    lines += [_line(COLUMNS), _line(["---", "---", *["---:"] * (len(COLUMNS) - 3), "---"])]
    for check in report.checks:
        cells = [text(cell) for cell in row(check)]
        lines.append(_line([*cells[:-1], cells[-1] if check.passed else f"**{cells[-1]}**"]))
    for check in report.checks:
        lines += _failures(check)
    for check in report.checks:
        for finding in check.fallbacks:
            summary = f"{check.label}, {finding.name}: {finding.figures['fallbacks']} nodes fell back"
            lines += ["", f"<details><summary>{text(summary)}</summary>", ""]
            lines += [*fence(finding.details[:LONGEST_DETAILS]), "", "</details>"]
    lines += [line for rule in tolerance_rules(report) for line in ("", f"Allowed: {text(rule)}")]
    if report.baseline_written:
        lines += ["", text(baseline_line(report))]
    left_out = skipped(report)
    if left_out:
        lines += ["", "<details><summary>Skipped</summary>", ""]
        lines += [f"- {text(name)}: {text(why)} ({text(', '.join(of))})" for (name, why), of in left_out.items()]
        lines += ["", "</details>"]
    tools = ", ".join(f"{name} {version}" for name, version in versions(TOOLS).items())
    lines += ["", f"<sub>{text(tools)}; {report.started}, {report.seconds:.0f} s</sub>"]
    return "\n".join(lines) + "\n"


def _failures(check: BundleCheck) -> list[str]:
    lines = []
    for title, finding in check.explained:
        heading = f"<details><summary>{text(check.label)}, {text(title)}</summary>"
        lines += ["", heading, "", text(finding.message), ""]
        if "\n" in finding.details:
            lines += [*fence(finding.details[:LONGEST_DETAILS]), ""]
        elif finding.details:
            lines += [f"**{text(finding.details[:LONGEST_DETAILS])}**", ""]
        if finding.part == "parity" and check.parity is not None:
            lines += [*_modes(check.parity["modes"]), ""]
        if finding.next_step:
            lines += ["Next:", "", *fence(finding.next_step), ""]
        lines.append("</details>")
    return lines


def _modes(modes: list[dict[str, Any]]) -> list[str]:
    """Parity's figures mode by mode."""
    lines = [_line(["mode", "positions", "of spread", "top-1", "first over"]), _line(["---", *["---:"] * 3, "---"])]
    for mode in modes:
        error = mode["relative_error"]
        figures = ["not finite" if error is None else f"{error:.1e}", f"{mode['top1_agreement']:.1%}"]
        lines.append(
            _line([text(mode["mode"]), str(mode["positions"]), *figures, text(mode["first_difference"] or "")])
        )
    return lines


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def text(value: str) -> str:
    """Plain text in one line, whatever characters it holds."""
    shown = printable(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_~|\[\]#])", r"\\\1", shown)


def fence(value: str) -> list[str]:
    """A block of code, fenced by more backticks than it holds in a row."""
    longest = max((len(run) for run in re.findall(r"`+", value)), default=0)
    ticks = "`" * max(3, longest + 1)
    return [f"{ticks}text", *map(printable, value.split("\n")), ticks]
