"""What a check found: findings, bundle by bundle and provider by provider, and one verdict.

``to_dict`` is the document of ``pe-onnx check --json``; its schema is ``check.schema.json`` beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pe_onnx.machine import RUNTIME_PACKAGES, describe_machine, versions
from pe_onnx.plain_values import plain
from pe_onnx.tolerance import KL_RULE

Status = Literal["passed", "failed", "error", "skipped"]
"""``failed``: measured and not good enough. ``error``: could not be measured, and that is no pass either."""
Figure = float | int | str | bool | None

FORMAT = 1
SCHEMA = Path(__file__).with_name("check.schema.json")
TOOLS = (*RUNTIME_PACKAGES, "onnx", "torch", "transformers")


@dataclass
class Finding:
    """One thing that was checked, or was not and why."""

    part: str
    """bundle, parity, quality, sessions, latency, budget or regression."""
    name: str
    """Within the part: a parity mode, a session, a budget."""
    status: Status
    message: str = ""
    """One line: what is wrong, why it was skipped, or the figure that passed."""
    next_step: str | None = None
    """A command that leads on from a failure."""
    details: str = ""
    """Several lines for whoever opens them."""
    seconds: float = 0.0
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """``parity: steps``."""
        return self.part if self.name == self.part else f"{self.part}: {self.name}"

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "error")


@dataclass
class BundleCheck:
    """A bundle on a provider."""

    bundle: str
    """The folder as it was named."""
    name: str
    """The folder's own name."""
    provider: str
    encoding: str | None = None
    target: str | None = None
    dtype: str | None = None
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    parity: dict[str, Any] | None = None
    """ParityReport.to_dict()."""
    divergence: dict[str, Any] | None = None
    """Divergence.to_dict(): where ONNX and PyTorch part, of a bundle whose parity failed."""
    quality: dict[str, Any] | None = None
    """QualityReport.to_dict(), of a quantized bundle."""
    sessions: dict[str, Any] | None = None
    """SessionMatrix.to_dict()."""
    latency: dict[str, Any] | None = None
    """BenchReport.to_dict()."""
    regression: dict[str, Any] | None = None
    """Regression.to_dict()."""

    @property
    def label(self) -> str:
        return f"{self.bundle}@{self.provider}"

    @property
    def key(self) -> str:
        """By which a baseline knows it."""
        return f"{self.name}@{self.provider}"

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.bad]

    @property
    def passed(self) -> bool:
        return bool(self.findings) and not self.failures

    @property
    def explained(self) -> list[tuple[str, Finding]]:
        """What to tell of the failures, each with a heading: all modes of parity that failed are one matter."""
        modes = [finding for finding in self.of("parity") if finding.status == "failed"]
        others = [finding for finding in self.failures if finding not in modes]
        told = [(finding.title, finding) for finding in others]
        if modes:
            told.insert(0, (f"parity: {', '.join(mode.name for mode in modes)}", modes[0]))
        return told

    @property
    def fallbacks(self) -> list[Finding]:
        """Sessions with nodes that another provider runs: exact, but slow."""
        return [finding for finding in self.of("sessions") if finding.figures.get("fallbacks")]

    def of(self, part: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.part == part]


@dataclass
class CheckReport:
    """All bundles on all providers, and the verdict."""

    started: str
    """UTC, ISO 8601."""
    options: dict[str, Any] = field(default_factory=dict)
    checks: list[BundleCheck] = field(default_factory=list)
    seconds: float = 0.0
    baseline_written: str | None = None
    """The file that now holds what was measured."""
    baseline_replaced: str | None = None
    """Why nothing is kept of what that file held before."""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """One line."""
        bad = [check for check in self.checks if not check.passed]
        if bad or not self.checks:
            what = "; ".join(f"{check.label}: {_parts(check)}" for check in bad[:5])
            more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
            return printable(f"FAIL: {len(bad)} of {len(self.checks)}: {what}{more}")
        statuses = [finding.status for check in self.checks for finding in check.findings]
        skipped = f", {statuses.count('skipped')} skipped" if "skipped" in statuses else ""
        count = len({check.bundle for check in self.checks})
        providers = ", ".join(dict.fromkeys(check.provider for check in self.checks))
        return f"pass: {count} bundle{'s' * (count != 1)} on {providers}, {statuses.count('passed')} findings{skipped}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, as check.schema.json describes it; a figure that is not finite is None."""
        from pe_onnx import __version__

        return plain(
            {
                "format": FORMAT,
                "version": __version__,
                "passed": self.passed,
                "verdict": self.verdict,
                "started": self.started,
                "seconds": self.seconds,
                "machine": describe_machine(),
                "tools": versions(TOOLS),
                "options": self.options,
                "baseline_written": self.baseline_written,
                "baseline_replaced": self.baseline_replaced,
                "checks": [_check_dict(check) for check in self.checks],
            }
        )


def _check_dict(check: BundleCheck) -> dict[str, Any]:
    findings = [{**vars(finding), "figures": dict(finding.figures)} for finding in check.findings]
    return {**vars(check), "passed": check.passed, "findings": findings}


def _parts(check: BundleCheck) -> str:
    """What failed: ``parity (whole, steps), latency``."""
    found: dict[str, list[str]] = {}
    for finding in check.failures:
        found.setdefault(finding.part, []).append(finding.name)
    return ", ".join(part if names == [part] else f"{part} ({', '.join(names)})" for part, names in found.items())


def printable(line: str) -> str:
    """With an escape such as ``\\x1b`` in place of what cannot be shown: a folder's name may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def skipped(report: CheckReport) -> dict[tuple[str, str], list[str]]:
    """What was left out, by title and reason, to the labels of the bundles."""
    found: dict[tuple[str, str], list[str]] = {}
    for check in report.checks:
        for finding in check.findings:
            if finding.status == "skipped":
                found.setdefault((finding.title, finding.message), []).append(check.label)
    return found


def tolerance_rules(report: CheckReport) -> list[str]:
    """How each tolerance and limit came about, each once."""
    tolerances = [check.parity["tolerance"] for check in report.checks if check.parity is not None]
    rules = [tolerance["rule"] for tolerance in tolerances if tolerance.get("rule")]
    limits = [check.quality["limit"]["rule"] for check in report.checks if check.quality is not None]
    rules += [KL_RULE if rule.startswith("quantized") else rule for rule in limits]
    return list(dict.fromkeys(rules))


def baseline_line(report: CheckReport) -> str:
    """What became of the baseline's file; empty where it was not written."""
    if report.baseline_written is None:
        return ""
    return "; ".join(filter(None, (f"baseline written: {report.baseline_written}", report.baseline_replaced)))


COLUMNS = (
    *("bundle", "provider", "parity", "top-1", "KL, nats", "bits", "sessions", "decode, ms", "prefill, tok/s"),
    *("change", "verdict"),
)
"""Of the table, on the terminal and in Markdown. Parity is the worst error and what is allowed; KL that of quantized
weights from PyTorch's and what is allowed, bits what a byte takes (or a token) with PyTorch's weights and with the
bundle's; change that of the latency since the baseline."""


def row(check: BundleCheck) -> tuple[str, ...]:
    """A bundle's line in the table; ``-`` for what was not measured."""
    parity = top1 = kl = bits = sessions = decode = prefill = regression = "-"
    if check.parity is not None:
        modes = check.parity["modes"]
        errors = [mode["relative_error"] for mode in modes]  # None is not finite
        worst = "not finite" if None in errors else f"{max(errors):.1e}"
        parity = f"{worst}/{check.parity['tolerance']['error']:.1e}"
        top1 = f"{100 * min(mode['top1_agreement'] for mode in modes):.4g}%"
    if check.quality is not None:
        q = check.quality
        kl = f"{_number(q['kl'], '.2g')}/{_number(q['limit']['kl'], '.2g')}"
        bits = f"{_number(q['reference_bits'], '.4g')} to {_number(q['bits'], '.4g')} a {q['unit']}"
    if check.sessions is not None:
        bad = sum(finding.bad for finding in check.of("sessions"))
        sessions = f"{bad} differ" if bad else f"{len(check.sessions['names'])} agree"
    if check.latency is not None:
        own = check.latency["contestants"][0]
        decode = "/".join(_number(depth["median_ms"], ".3g") for depth in own["decode"]) or "-"
        prefill = _number(own["prefill_tokens_per_s"], ",.0f")
    if check.regression is not None:
        regression = _number(check.regression["change"], "+.1%")
    if any(finding.status == "error" for finding in check.of("parity")):
        parity = "error"
    verdict = "pass" if check.passed else "FAIL"
    return (check.bundle, check.provider, parity, top1, kl, bits, sessions, decode, prefill, regression, verdict)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
