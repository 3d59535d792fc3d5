"""The check of bundles for CI: parity, quality, sessions, latency, budgets and regressions, one verdict."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pe_onnx import check_parts
from pe_onnx.baselines import OtherFormatError
from pe_onnx.bundle import read_bundle
from pe_onnx.check_parts import Subject, caught
from pe_onnx.check_report import BundleCheck, CheckReport, Finding
from pe_onnx.errors import ConfigError, PeOnnxError, ProviderError, did_you_mean
from pe_onnx.named_reference import load_reference
from pe_onnx.suite import NO_BUDGETS, Budgets, Entry

PARTS = ("parity", "quality", "sessions", "latency", "regression")
"""What takes time on a bundle, in order."""
LEFT_OUT = "left out, as asked"
LATENCY_S = 20.0
MAX_REGRESSION = 0.1


def check(
    bundles: Sequence[str | Path | Entry],
    *,
    providers: Sequence[str] = ("cpu",),
    reference: Any = None,
    modes: Sequence[str] | None = None,
    tolerance: float | None = None,
    tokens: int | None = None,
    seed: int = 0,
    threads: int = 0,
    text: Path | None = None,
    max_kl: float | None = None,
    quality: bool = True,
    matrix: bool = True,
    latency: bool = True,
    budget_s: float = LATENCY_S,
    budgets: Budgets = NO_BUDGETS,
    baseline: str | Path | None = None,
    max_regression: float = MAX_REGRESSION,
    update_baseline: bool = False,
    import_from: Iterable[Path] = (),
    progress: Callable[[str], None] = lambda stage: None,
    finished: Callable[[BundleCheck], None] = lambda check: None,
) -> CheckReport:
    """Check each bundle on each provider; what fails on one does not keep the others from being checked.

    bundles: folders, or Entries, whose own settings come before those given here. reference, modes, tolerance, tokens,
    seed and threads are ``check_parity``'s, and a reference may be ``module:attribute`` too, importable from the
    working directory or a folder of ``import_from``. text and max_kl are ``measure_quality``'s, of quantized bundles.
    quality, matrix and latency: False leaves a part out, and the report says so. budget_s: seconds of measuring
    latency a bundle; what the baseline is about has a time of its own. baseline: a file of ``write_baselines``; a
    bundle fails that is slower by more than ``max_regression``, a share, relative to it.
    update_baseline: measure and write that file instead, other entries kept unless they are of another format, but none
    of a bundle whose parity fails. progress is called as a part of a bundle begins, PARTS times a bundle and provider;
    finished as a bundle is done on a provider.

    Raises ConfigError for what is asked wrongly, before anything is measured; CheckpointError for a reference that
    does not exist; MissingDependencyError where a package is missing. A bundle that is none, a provider that cannot be
    had and a part that breaks are failures in the report.
    """
    entries = [entry if isinstance(entry, Entry) else Entry(entry) for entry in bundles]
    names = _resolved(providers)
    _require(entries, modes, tolerance, tokens, seed, threads, budget_s, max_regression, max_kl, text)
    references = _references([reference, *(entry.reference for entry in entries)], tuple(import_from))
    known: dict[str, Any] = {}
    replaced = None
    if update_baseline and (baseline is None or not latency):
        raise ConfigError("update_baseline needs a baseline, the file to write, and latency measured")
    if baseline is not None:
        known, replaced = _read_baseline(Path(baseline), entries, update_baseline)
    report = CheckReport(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        options={
            "providers": names,
            "reference": _named(reference),
            "modes": None if modes is None else list(modes),
            "tolerance": tolerance,
            "tokens": tokens,
            "seed": seed,
            "threads": threads,
            "text": None if text is None else str(text),
            "max_kl": max_kl,
            "quality": quality,
            "matrix": matrix,
            "latency": latency,
            "budget_s": budget_s,
            "baseline": None if baseline is None else str(baseline),
            "max_regression": max_regression,
        },
    )
    begin = time.perf_counter()
    gate = _Regression(known, baseline is not None, max_regression, update_baseline, {})
    for entry in entries:
        for provider in names:
            wanted = reference if entry.reference is None else entry.reference
            result = _check_one(
                BundleCheck(str(entry.path), Path(entry.path).resolve().name, provider),
                partial(
                    Subject,
                    provider=provider,
                    threads=threads,
                    reference=references.get(wanted, wanted) if isinstance(wanted, str) else wanted,
                    named=str(wanted) if isinstance(wanted, str | Path) else None,
                    modes=entry.modes or (None if modes is None else tuple(modes)),
                    tolerance=tolerance if entry.tolerance is None else entry.tolerance,
                    tokens=check_parts.default_tokens() if tokens is None else tokens,
                    seed=seed,
                    budgets=entry.budgets.over(budgets),
                    text=text,
                    max_kl=max_kl if entry.max_kl is None else entry.max_kl,
                ),
                quality=None if quality else LEFT_OUT,
                matrix=None if matrix else LEFT_OUT,
                latency=None if latency else LEFT_OUT,
                regression=gate,
                budget_s=budget_s,
                progress=progress,
            )
            report.checks.append(result)
            finished(result)
    if gate.measured:
        _write_baseline(report, Path(str(baseline)), {**known, **gate.measured}, replaced)
    report.seconds = time.perf_counter() - begin
    return report


@dataclass
class _Regression:
    """The regression part of one run over all bundles: compares with a baseline, or collects a new one."""

    known: dict[str, Any]
    given: bool
    """Whether there is a baseline at all."""
    limit: float
    update: bool
    measured: dict[str, Any]

    def why_not(self, check: BundleCheck) -> str | None:
        if not self.given:
            return "no baseline given"
        if self.update:
            broken = any(finding.bad for finding in check.of("parity"))
            return "parity failed: the baseline keeps what it holds" if broken else None
        if check.key not in self.known:
            return f"the baseline has no {check.key}; add it with --update-baseline"
        return None

    def run(self, check: BundleCheck, subject: Subject) -> None:
        if self.update:
            self.measured[check.key] = check_parts.new_baseline(check, subject)
        else:
            check_parts.regression(check, subject, self.known[check.key], self.limit)


def _check_one(
    check: BundleCheck,
    asked: Callable[..., Subject],
    *,
    quality: str | None,
    matrix: str | None,
    latency: str | None,
    regression: _Regression,
    budget_s: float,
    progress: Callable[[str], None],
) -> BundleCheck:
    """One bundle on one provider. quality, matrix, latency: why they are left out, None where they are not."""
    begin = time.perf_counter()
    subject = None
    with caught(check, "bundle"):
        subject = asked(read_bundle(check.bundle))
        manifest = subject.bundle.manifest
        check.encoding, check.target = manifest["encoding"]["name"], manifest["target"]
        check.dtype = manifest["dtype"]
        _require_provider(check.provider)
    failed = bool(check.findings)
    for part in PARTS:
        progress(f"{check.label}: {part}")
        if subject is None or failed:
            continue
        if part == "quality" and subject.bundle.quantization is None:
            continue
        why_not = {"parity": None, "quality": quality, "sessions": matrix}.get(part, latency)
        if part == "regression" and why_not is None:
            why_not = regression.why_not(check)
        if why_not is not None:
            check.findings.append(Finding(part, part, "skipped", why_not))
            continue
        with caught(check, part):
            if part == "parity":
                check_parts.parity(check, subject)
            elif part == "quality":
                check_parts.quality(check, subject)
            elif part == "sessions":
                check_parts.sessions(check, subject)
            elif part == "latency":
                check_parts.latency(check, subject, budget_s)
            else:
                regression.run(check, subject)
    if subject is not None and not failed:
        check_parts.budgets(check, subject, "latency was not measured" if check.latency is None else "")
    check.seconds = time.perf_counter() - begin
    return check


def _write_baseline(report: CheckReport, file: Path, entries: dict[str, Any], replaced: str | None) -> None:
    """What goes wrong here is an error in the report, which must not be lost for it."""
    from pe_onnx.regression import write_baselines

    try:
        write_baselines(file, entries)
        report.baseline_written, report.baseline_replaced = str(file), replaced
    except PeOnnxError as error:
        for check in report.checks:
            for finding in check.of("regression"):
                if finding.name == check_parts.BASELINE:
                    finding.status, finding.message = "error", check_parts.one_line(str(error))


def _require_provider(name: str) -> None:
    """Raises ProviderError where a provider that was asked for cannot be had."""
    from pe_onnx.providers import resolve_provider

    resolve_provider(name)


def _resolved(providers: Sequence[str]) -> list[str]:
    """Each once, ``auto`` by the name of what it stands for. Raises ConfigError for unknown names."""
    from pe_onnx.providers import SHORT, resolve_provider

    found = []
    for name in providers:
        try:
            found.append(SHORT.get(full := resolve_provider(name), full))
        except ProviderError:
            found.append(name)  # a failure of each bundle, not of the question
    if not found:
        raise ConfigError("no provider given; accepted: cpu, cuda, auto")
    return list(dict.fromkeys(found))


def _require(
    entries: Sequence[Entry],
    modes: Sequence[str] | None,
    tolerance: float | None,
    tokens: int | None,
    seed: int,
    threads: int,
    budget_s: float,
    max_regression: float,
    max_kl: float | None,
    text: Path | None,
) -> None:
    """Raises ConfigError for what no bundle could be checked with."""
    from pe_onnx.parity import ALL_MODES
    from pe_onnx.session import MAX_THREADS

    if not entries:
        raise ConfigError("no bundle given")
    for mode in [*(modes or ()), *(mode for entry in entries for mode in entry.modes or ())]:
        if mode not in ALL_MODES:
            hint = did_you_mean(mode, ALL_MODES)
            raise ConfigError(f"unknown mode {mode!r}{hint} (known: {', '.join(ALL_MODES)})")
    if modes is not None and not modes:
        raise ConfigError(f"no mode given (known: {', '.join(ALL_MODES)})")
    for name, value, good, accepted in (
        ("tolerance", tolerance, tolerance is None or 0 <= tolerance < float("inf"), "a finite number, at least 0"),
        ("max_kl", max_kl, max_kl is None or 0 <= max_kl < float("inf"), "a finite number of nats, at least 0"),
        ("text", text, text is None or text.is_file(), "a file"),
        ("length", tokens, tokens is None or tokens >= 2, "at least 2 tokens"),
        ("seed", seed, seed >= 0, "at least 0"),
        ("threads", threads, 0 <= threads <= MAX_THREADS, f"in 0..{MAX_THREADS}; 0 is one for each core"),
        ("budget", budget_s, 0 < budget_s < float("inf"), "seconds above 0"),
        ("max_regression", max_regression, 0 < max_regression <= 1, "a share above 0 and up to 1"),
    ):
        if not good:
            raise ConfigError(f"{name} = {value} must be {accepted}")


def _references(wanted: Iterable[Any], folders: tuple[Path, ...]) -> dict[str, Any]:
    """What the references given by name stand for, each loaded once."""
    return {text: load_reference(text, folders) for text in dict.fromkeys(x for x in wanted if isinstance(x, str))}


def _named(reference: Any) -> str | None:
    """A reference in words: what names it, or the type of an object."""
    if reference is None:
        return None
    return str(reference) if isinstance(reference, str | Path) else type(reference).__qualname__


def _read_baseline(file: Path, entries: Sequence[Entry], update: bool) -> tuple[dict[str, Any], str | None]:
    """The baseline's entries, and why there are none of a file that is made anew.

    Raises ConfigError where it is not there, or cannot tell two bundles apart.
    """
    from pe_onnx.regression import read_baselines

    names = Counter(Path(entry.path).resolve().name for entry in entries)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"{count} bundles are named {name}, by which the baseline would know them; rename all but one"
        )
    if update and not file.exists():
        return {}, None
    if not file.is_file():
        raise ConfigError(f"baseline {file} does not exist; make it with --update-baseline")
    try:
        return dict(read_baselines(file)), None
    except OtherFormatError as error:
        if not update:
            raise
        return {}, f"nothing is kept of the file's format {error.format!r}, which this pe-onnx does not read"
