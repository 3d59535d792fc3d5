"""The parts of a check, each on one bundle and one provider: parity, quality, sessions, latency, budgets, regression.

A part adds its findings and its own report to a BundleCheck. What it needs is imported when it runs.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from pe_onnx.bundle import Bundle
from pe_onnx.check_report import BundleCheck, Figure, Finding
from pe_onnx.commands import command
from pe_onnx.errors import BundleError, CheckpointError, MissingDependencyError, PeOnnxError
from pe_onnx.intervals import LEAST_SAMPLES
from pe_onnx.suite import Budgets

BASELINE = "baseline"
"""The name of what was measured for a new baseline."""
FIGURES = (
    *("positions", "max_abs_error", "relative_error", "kl", "top1_agreement", "near_ties", "disagreements"),
    "first_difference",
)
"""Of a mode of parity."""


@dataclass(frozen=True)
class Subject:
    """A bundle, and what is asked of it."""

    bundle: Bundle
    provider: str
    threads: int
    reference: Any
    named: str | None
    """The reference as a command line names it; None where the manifest does, or no word can."""
    modes: tuple[str, ...] | None
    tolerance: float | None
    tokens: int
    seed: int
    budgets: Budgets
    text: Path | None = None
    """On which a quantized bundle is compared with PyTorch's own weights; None for the built-in one."""
    max_kl: float | None = None

    @property
    def folder(self) -> Path:
        return self.bundle.folder

    def command(self, name: str, *options: str) -> str:
        """``pe-onnx NAME DIR`` with what this check was told of parity."""
        return command(
            name,
            self.folder,
            *options,
            reference=self.named,
            tokens=self.tokens,
            tolerance=self.tolerance,
            seed=self.seed,
            provider=self.provider,
            threads=self.threads,
        )

    @property
    def bench(self) -> str:
        """The command that shows where the time goes."""
        profile = ["--profile"] if self.provider == "cpu" else []  # elsewhere onnxruntime sees kernels start, not end
        return command("bench", self.folder, *profile, provider=self.provider, threads=self.threads)


def default_tokens() -> int:
    """Of a row of parity."""
    from pe_onnx.parity import DEFAULT_TOKENS

    return DEFAULT_TOKENS


@contextmanager
def caught(check: BundleCheck, part: str) -> Iterator[None]:
    """What goes wrong within becomes an error of this bundle, so that the others are still checked.

    A package that is missing is no matter of one bundle: MissingDependencyError passes.
    """
    begin = time.perf_counter()
    try:
        yield
    except MissingDependencyError:
        raise
    except PeOnnxError as error:
        check.findings.append(Finding(part, part, "error", one_line(str(error)), seconds=time.perf_counter() - begin))
    except Exception as error:
        message = one_line(f"{type(error).__name__}: {error}")
        check.findings.append(
            Finding(
                *(part, part, "error", message),
                details=traceback.format_exc(),
                seconds=time.perf_counter() - begin,
            )
        )


def parity(check: BundleCheck, subject: Subject) -> None:
    """Every mode against PyTorch; where one fails, where the two sides part first."""
    from pe_onnx.parity import check_parity, modes_of

    legal = modes_of(subject.bundle)
    wanted = [mode for mode in subject.modes or legal if mode in legal]
    for left_out in (mode for mode in subject.modes or () if mode not in legal):
        why = f"not for this bundle, which takes {', '.join(legal)}"
        check.findings.append(Finding("parity", left_out, "skipped", why))
    if not wanted:
        check.findings.append(Finding("parity", "parity", "error", "none of the modes asked for is for this bundle"))
        return
    asked: dict[str, Any] = {
        "tokens": subject.tokens,
        "provider": subject.provider,
        "tolerance": subject.tolerance,
        "seed": subject.seed,
        "threads": subject.threads,
    }
    try:
        report = check_parity(subject.folder, subject.reference, modes=wanted, **asked)
    except BundleError as refusal:  # onnxruntime may load it and refuse a run
        where, check.divergence = drill_down(subject.folder, subject.reference, modes=wanted, **asked)
        if check.divergence is None:
            raise
        finding = Finding("parity", "parity", "error", one_line(str(refusal)), details=where)
        finding.next_step = subject.command("bisect")
        check.findings.append(finding)
        return
    check.parity = report.to_dict()
    bad = [mode.mode for mode in report.modes if not mode.passed]
    where = ""
    if bad:
        where, check.divergence = drill_down(subject.folder, subject.reference, modes=bad, **asked)
    allowed = f"{report.tolerance.error:.1e} is allowed"
    for mode, values in zip(report.modes, check.parity["modes"], strict=True):
        finding = Finding("parity", mode.mode, "passed" if mode.passed else "failed", seconds=mode.seconds)
        finding.figures = {name: values[name] for name in values if name in FIGURES}
        finding.message = f"off by {mode.relative_error:.1e} of the logits' spread, {allowed}"
        if not mode.passed:
            first = mode.first_difference or f"no single token; top-1 agreement {mode.top1_agreement:.4g}"
            finding.message += f"; first at {first}"
            finding.next_step = subject.command("bisect", "--mode", mode.mode)
            finding.details = where
        check.findings.append(finding)


def drill_down(folder: Path, reference: Any, **options: Any) -> tuple[str, dict[str, Any] | None]:
    """One line that says where ONNX and PyTorch part, and Divergence.to_dict(). options: of ``bisect``.

    Whatever goes wrong here is told in the line: parity has failed already, and its figures must not be lost.
    """
    try:
        from pe_onnx.bisection import bisect

        found = bisect(folder, reference, **options)
    except Exception as error:
        return one_line(f"no drill-down: {error}"), None
    if found is None:
        return "no drill-down: no intermediate value of the two sides differs", None
    return one_line(found.text), found.to_dict()


def quality(check: BundleCheck, subject: Subject) -> None:
    """What the rounding of a quantized bundle costs."""
    from pe_onnx.quality import measure_quality

    asked: dict[str, Any] = {"text": subject.text, "max_kl": subject.max_kl, "seed": subject.seed}
    try:
        report = measure_quality(
            subject.folder, subject.reference, provider=subject.provider, threads=subject.threads, **asked
        )
    except CheckpointError as gone:
        check.findings.append(Finding("quality", "quality", "skipped", one_line(str(gone))))
        return
    check.quality = report.to_dict()
    if report.worst is not None:
        name, error, expected = report.worst
        finding = Finding("quality", "weights", "passed" if report.weights_passed else "failed")
        finding.message = (
            f"rounded by {report.weight_error:.2g} of their size (root mean square); worst {name}: {error:.2g}, where "
            f"even steps explain {expected:.2g}"
        )
        finding.figures = {"weight_error": report.weight_error, "worst_error": error, "worst_expected": expected}
        check.findings.append(finding)
    finding = Finding("quality", "kl", "passed" if report.kl_passed else "failed", seconds=report.seconds)
    finding.message = (
        f"KL {report.kl:.2g} nats a token from PyTorch's own weights, {report.limit.kl:.2g} is allowed; "
        f"{report.bits:.4g} bits a {report.unit} for {report.reference_bits:.4g} on {report.on}"
    )
    finding.figures = {"kl": report.kl, "max_kl": report.limit.kl}
    finding.figures |= {
        f"bits_per_{report.unit}": report.bits,
        f"reference_bits_per_{report.unit}": report.reference_bits,
    }
    if not report.kl_passed:
        finding.message += "; quantize with --bits 8, a smaller --block, or --exclude what is most sensitive"
    check.findings.append(finding)


def sessions(check: BundleCheck, subject: Subject) -> None:
    """The bundle against itself: optimisations off and on, one thread and several, CPU and another provider.

    Two sessions that differ do not tell which is wrong: one fails that differs from more than half of the others.
    """
    from pe_onnx.session_matrix import compare_sessions

    begin = time.perf_counter()
    providers = tuple(dict.fromkeys(("cpu", subject.provider)))
    threads = tuple(dict.fromkeys((subject.threads, 0, 1)))
    matrix = compare_sessions(
        subject.folder, providers, threads=threads, tolerance=subject.tolerance, seed=subject.seed
    )
    seconds = time.perf_counter() - begin
    values = check.sessions = matrix.to_dict()
    names = values["names"]
    apart = Counter(name for pair in values["failures"] for name in (pair["a"], pair["b"]))
    odd = [name for name in names if 2 * apart[name] > len(names) - 1] or list(apart)
    fell_back: dict[str, list[str]] = {}
    for node in values["fallbacks"]:
        fell_back.setdefault(node["session"], []).append(f"{node['operator']} {node['node']} on {node['provider']}")
    for i, name in enumerate(names):
        row = [inf if x is None else float(x) for x in values["differences"][i]]
        far = max(range(len(row)), key=row.__getitem__)
        message = f"differs by {row[far]:.1e} of the logits' spread from {names[far]}" if row[far] else "no difference"
        nodes = fell_back.get(name, [])
        if nodes:
            more = f", {len(nodes) - 3} more" if nodes[3:] else ""
            message += f"; fell back: {', '.join(nodes[:3])}{more}"
        finding = Finding("sessions", name, "passed", message, details="\n".join(nodes), seconds=seconds / len(names))
        finding.figures = {"difference": row[far], "fallbacks": len(nodes)}
        if not matrix.passed and name in odd:
            finding.status = "failed"
            finding.next_step = subject.command("parity")
        check.findings.append(finding)


def latency(check: BundleCheck, subject: Subject, budget_s: float) -> None:
    """Load, prefill and decode within ``budget_s`` seconds, and the budgets on them."""
    from pe_onnx.latency import bench

    begin = time.perf_counter()
    report = bench(subject.folder, provider=subject.provider, threads=subject.threads, budget_s=budget_s)
    check.latency = report.to_dict()
    own = check.latency["contestants"][0]
    figures: dict[str, Figure] = {
        name: own.get(name) for name in ("load_s", "prefill_tokens_per_s", "first_token_ms", "peak_memory_bytes")
    }
    steps = []
    for depth in own["decode"]:
        figures[f"decode_ms_at_{depth['depth_tokens']}"] = depth["median_ms"]
        interval = "" if depth["interval_ms"] is None else " ({:.3g} to {:.3g})".format(*depth["interval_ms"])
        steps.append(f"{depth['median_ms']:.3g} ms{interval} at {depth['depth_tokens']} tokens")
    finding = Finding("latency", "latency", "passed", f"decode {', '.join(steps)}", figures=figures)
    finding.seconds = time.perf_counter() - begin
    check.findings.append(finding)


def budgets(check: BundleCheck, subject: Subject, why_not: str) -> None:
    """Each limit against its figure. why_not: the reason where latency was not measured."""
    own = None if check.latency is None else check.latency["contestants"][0]
    for name, limit in subject.budgets.given().items():
        if name == "cache_bytes_per_token":
            from pe_onnx.providers import device_of

            bytes_per_token = float(subject.bundle.cache_bytes_on(device_of(subject.provider).kind))
            measured = [_Measured(bytes_per_token, bytes_per_token)]
        else:
            measured = [] if own is None else _measured(own, name)
        if not measured:
            check.findings.append(Finding("budget", name, "skipped", why_not or "the bench gave no such figure"))
            continue
        check.findings.append(_held(name, limit, measured, subject.bench if own is not None else None))


def _held(name: str, limit: float, measured: Sequence[_Measured], next_step: str | None) -> Finding:
    """Of a budget. A median over it of too few samples is an error: the measurement is to be mended."""
    minimum = name == "prefill_tokens_per_s"
    beyond = (lambda x: x < limit) if minimum else (lambda x: x > limit)
    words = f"{'below' if minimum else 'over'} the budget of {limit:g}"
    broken = [m for m in measured if m.best is not None and beyond(m.best)]
    unsure = [m for m in measured if m.best is None and beyond(m.value)]
    worst = (min if minimum else max)(broken or unsure or measured, key=lambda m: m.value)
    finding = Finding("budget", name, "passed", f"{worst.value:.4g}{worst.where} keeps the budget of {limit:g}")
    if broken:
        finding.status, finding.message = "failed", f"{worst.value:.4g}{worst.where} is {words}"
    elif unsure:
        few = f"but of fewer than {LEAST_SAMPLES} samples; give a longer --budget to be sure"
        finding.status, finding.message = "error", f"{worst.value:.4g}{worst.where} is {words}, {few}"
    finding.figures = {"value": worst.value, "budget": limit}
    finding.next_step = next_step if broken or unsure else None
    return finding


@dataclass(frozen=True)
class _Measured:
    value: float
    best: float | None
    """What it is at best, given how it scattered: a budget is broken where even this breaks it. None where there are
    too few samples to tell."""
    where: str = ""


def _measured(own: Mapping[str, Any], name: str) -> list[_Measured]:
    """A budget's figures among those of the bench, at each depth where there are several.

    Load time and peak memory count as they are: the one is a median of up to three fresh processes, and loading them
    oftener would cost more than it tells; the other does not scatter.
    """
    if name == "decode_ms":
        return [
            _Measured(
                each["median_ms"],
                _best(each["interval_ms"], 0),
                f" at {each['depth_tokens']} tokens",
            )
            for each in own["decode"]
        ]
    value = own.get("peak_memory_bytes" if name == "peak_memory_mb" else name)
    if value is None:
        return []
    if name == "first_token_ms":
        return [_Measured(value, _best(own["first_token_interval_ms"], 0))]
    if name == "prefill_tokens_per_s":
        return [_Measured(value, _best(own["prefill_interval_tokens_per_s"], 1))]
    value *= 1e-6 if name == "peak_memory_mb" else 1
    return [_Measured(value, value)]


def _best(interval: Sequence[float] | None, end: int) -> float | None:
    """The better end of an interval; None where there is none."""
    return None if interval is None else interval[end]


def regression(check: BundleCheck, subject: Subject, baseline: Any, max_regression: float) -> None:
    """Latency relative to a yardstick of this machine, against the same of the baseline."""
    from pe_onnx.regression import compare

    begin = time.perf_counter()
    result = compare(subject.folder, baseline, max_regression, provider=subject.provider, threads=subject.threads)
    check.regression = result.to_dict()
    finding = Finding("regression", "regression", "passed" if result.passed else "failed", one_line(result.text))
    finding.figures = {"change": float(result.change), "max_regression": max_regression}
    finding.seconds = time.perf_counter() - begin
    if not result.passed:
        finding.next_step = subject.bench
    check.findings.append(finding)


def new_baseline(check: BundleCheck, subject: Subject) -> Any:
    """The bundle's latency relative to a yardstick, for later checks."""
    from pe_onnx.regression import measure

    begin = time.perf_counter()
    measured = measure(subject.folder, provider=subject.provider, threads=subject.threads)
    seconds = time.perf_counter() - begin
    check.findings.append(Finding("regression", BASELINE, "passed", "measured for the baseline", seconds=seconds))
    return measured


def one_line(text: str) -> str:
    return " ".join(text.split())
