"""pytest: the parity of a bundle in two lines of a test suite. Loaded by pytest where pe-onnx is installed.

::

    @pytest.mark.pe_onnx_bundle("bundles/rope")
    def test_parity(pe_onnx_parity):
        assert pe_onnx_parity.passed

The fixture is the ParityReport of the marked bundle, computed once a session for equal arguments. A test that carries
the mark and does not ask for the fixture fails by itself where parity fails, before its body runs. Paths are relative
to pytest's rootdir. ``-p no:pe_onnx`` leaves the plugin out.

Importing this file imports nothing that pytest has not imported: the rest waits for a marked test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pe_onnx.parity_report import ParityReport

MARK = "pe_onnx_bundle"
FIXTURE = "pe_onnx_parity"


def pe_onnx_bundle(
    folder: str | Path,
    reference: Any = None,
    modes: Sequence[str] | None = None,
    tolerance: float | None = None,
    provider: str = "cpu",
    tokens: int = 160,
    seed: int = 0,
    threads: int = 0,
) -> dict[str, Any]:
    """What the mark takes: ``check_parity``'s arguments, and a reference may be ``package.module:attribute``."""
    return dict(locals())


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARK}(folder, reference=None, modes=None, tolerance=None, provider='cpu', tokens=160, seed=0, threads=0): "
        "the test asks that this pe-onnx bundle computes what PyTorch computes",
    )
    config.stash[_CHECKED] = {}


@pytest.fixture
def pe_onnx_parity(request: pytest.FixtureRequest) -> ParityReport:
    """The ParityReport of the bundle that ``@pytest.mark.pe_onnx_bundle`` names."""
    marker = request.node.get_closest_marker(MARK)
    if marker is None:
        pytest.fail(f'{FIXTURE} needs @pytest.mark.{MARK}("DIR") on the test', pytrace=False)
    return _checked(request.config, marker).report()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Where a marked test has no use for the report, parity itself is what it asserts."""
    if FIXTURE in getattr(item, "fixturenames", ()):
        return
    for marker in item.iter_markers(MARK):
        checked = _checked(item.config, marker)
        if not checked.report().passed:
            pytest.fail(checked.explained(), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Below a failed assertion on a report: where parity fails."""
    result = yield
    marker = item.get_closest_marker(MARK)
    if marker is not None and result.when == "call" and result.failed and FIXTURE in getattr(item, "fixturenames", ()):
        checked = _checked(item.config, marker)
        if checked.outcome is not None and not checked.outcome.passed:
            result.sections.append(("pe-onnx parity", checked.explained()))
    return result


@dataclass
class _Checked:
    """A bundle's parity check: run at the first call, its outcome kept."""

    folder: Path
    options: dict[str, Any]
    """check_parity's."""
    root: Path
    named: str | None = None
    """The reference as a command line names it; None where the manifest does, or no word can."""
    outcome: ParityReport | None = None
    refusal: str = ""
    explanation: str = ""

    def report(self) -> ParityReport:
        """Fails the test that calls it with one line where the check cannot be made."""
        if self.outcome is None and not self.refusal:
            self._run()
        if self.outcome is None:
            pytest.fail(self.refusal, pytrace=False)
        return self.outcome

    def _run(self) -> None:
        from pe_onnx.errors import PeOnnxError
        from pe_onnx.named_reference import is_import, load_reference

        try:
            from pe_onnx.parity import check_parity

            reference = self.options["reference"]
            if isinstance(reference, str | Path):
                text = str(reference)
                text = text if is_import(text, self.root) else str(self.root / text)
                self.named = text
                self.options["reference"] = load_reference(text, (self.root,))
            self.outcome = check_parity(self.folder, **self.options)
        except PeOnnxError as error:
            self.refusal = f"pe-onnx: {error}"

    def explained(self) -> str:
        """Of a report that failed: where the two sides part, and the modes' figures."""
        if not self.explanation and self.outcome is not None:
            from pe_onnx.check_parts import drill_down

            bad = [mode.mode for mode in self.outcome.modes if not mode.passed]
            where, _ = drill_down(self.folder, **{**self.options, "modes": bad})
            self.explanation = _explained(self.outcome, where, self._bisect(bad[0]))
        return self.explanation

    def _bisect(self, mode: str) -> str:
        """The command that drills further into a mode."""
        from pe_onnx.commands import command

        options = {name: value for name, value in self.options.items() if name not in ("modes", "reference")}
        return command("bisect", self.folder, "--mode", mode, reference=self.named, **options)


def _explained(report: ParityReport, where: str, next_step: str) -> str:
    rows = [("mode", "positions", "of spread", "top-1", "first over")]
    for m in report.modes:
        figures = (str(m.positions), f"{m.relative_error:.1e}", f"{m.top1_agreement:.1%}")
        rows.append((m.mode, *figures, m.first_difference or ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"pe-onnx: {report.bundle} does not compute what its reference computes ({report.reference})",
        where,
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows),
        "",
        f"{report.dtype} allows an error of {report.tolerance.error:.0e} of the logits' spread ({report.spread:.3g})",
        f"next: {next_step}",
    ]
    return "\n".join(lines)


_CHECKED: pytest.StashKey[dict[Any, _Checked]] = pytest.StashKey()


def _checked(config: pytest.Config, marker: pytest.Mark) -> _Checked:
    """One for equal arguments."""
    try:
        options = pe_onnx_bundle(*marker.args, **marker.kwargs)
    except TypeError as error:
        pytest.fail(f"@pytest.mark.{MARK}: {str(error).replace('pe_onnx_bundle()', 'it')}", pytrace=False)
    root = config.rootpath
    folder = root / options.pop("folder")
    modes = options["modes"]
    options["modes"] = None if modes is None else [modes] if isinstance(modes, str) else list(modes)
    reference = options["reference"]
    same = str(reference) if isinstance(reference, str | Path) else id(reference)
    key = repr((folder, {**options, "reference": same}))
    return config.stash[_CHECKED].setdefault(key, _Checked(folder, options, root))
