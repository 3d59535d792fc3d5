"""Reports as the parts of a check write them, made of the parts' own classes: no field can be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pe_onnx.angles import AngleError
from pe_onnx.bench_report import BenchReport, Decode, Figures
from pe_onnx.divergence import Difference, Divergence, InputStatistics
from pe_onnx.machine import describe_machine, versions
from pe_onnx.parity_report import Disagreement, ModeResult, ParityReport
from pe_onnx.quality import QualityReport, WeightError
from pe_onnx.regression import Regression
from pe_onnx.relative import Relative
from pe_onnx.session_matrix import Fallback, SessionMatrix
from pe_onnx.tolerance import Tolerance
from pe_onnx.yardstick import Sizes

ALLOWED = Tolerance(5e-5, "fp32, 2 layers: 5e-5")
SIZES = Sizes(65_000_000, 2_600_000, 256, 64)


def mode(name: str, error: float, passed: bool) -> ModeResult:
    wrong = None if passed else Disagreement("row 0, position 17 | <b>", 3, 4, float("inf"))
    return ModeResult(
        mode=name,
        positions=160,
        max_abs_error=error,
        relative_error=error,
        kl=1e-12,
        top1_agreement=1.0 if passed else 0.5,
        disagreements=0 if passed else 80,
        first_disagreement=wrong,
        first_difference=None if passed else "row 0, position 17 | <b>",
        passed=passed,
        seconds=0.1,
    )


def parity(*modes: ModeResult) -> ParityReport:
    angles = [AngleError(32767, 0.5, float("nan"), 3, "cos", [0, 1], None)]
    return ParityReport("b", "PyTorch", "fp32", ALLOWED, 3.1, list(modes), angles)


def quality() -> QualityReport:
    """Of a bundle that is rounded as it should be, on a text; its divergence is not finite."""
    weights = [WeightError("layers.0.q_proj.weight", 0.081, 0.086)]
    return QualityReport("b", "PyTorch", "the built-in text", "byte", 159, 600, float("nan"), weights=weights)


def divergence(text: str, **changed: Any) -> dict[str, Any]:
    """Divergence.to_dict() with another text."""
    apart = Difference(0.21, float("inf"))
    tensor = InputStatistics("x", "float32", [1, 2], -1.0, 1.0, 0.5, float("inf"), apart, ["Cast"], "")
    fields: dict[str, Any] = {
        **{"bundle": "b", "mode": "steps", "row": 0, "position": 3},
        **{"step": 3, "step_tokens": 1, "step_position": 3},
        **{"layer": "decoder.blocks.0.attention", "operator": "rotary", "node": "n", "reader": "rotary", "value": "v"},
        **{"difference": apart, "before": Difference(1e-7, 1e-7), "inputs": [tensor], **changed},
    }
    return {**Divergence(**fields).to_dict(), "text": text}


def bench(own: Mapping[str, Any]) -> dict[str, Any]:
    """BenchReport.to_dict() of a bundle with these figures; ``decode`` may lack what a test does not look at."""
    fields = dict(own)
    filled = {"p50_ms": 1.0, "p90_ms": 1.0, "p99_ms": 1.0, "steps": 30, "precision": 0.02, "ended_by": "precision"}
    decode = [Decode(**{**filled, **each}) for each in fields.pop("decode")]
    figures = Figures(decode=decode, cache_bytes={128: 1000}, **fields)
    return BenchReport(
        bundle="b",
        provider="CPUExecutionProvider",
        threads=0,
        depths=[128, 1024],
        clipped=False,
        prompt_tokens=128,
        encoder_decoder=False,
        budget_s=20.0,
        precision=0.03,
        contestants=[figures],
        machine=describe_machine(),
        tools=versions(),
    ).to_dict()


def matrix(names: Sequence[str], differences: list[list[float]], fallbacks: Sequence[Mapping[str, str]]) -> Any:
    """A SessionMatrix; a fall-back may lack what a test does not look at."""
    fallen = [Fallback(**{"body": None, "graph": "model.onnx", **fallback}) for fallback in fallbacks]
    return SessionMatrix("b", list(names), differences, 3.0, ALLOWED, 20, fallen)


def regression(change: float, max_regression: float) -> Regression:
    ratios = {"decode": [1.0, 1.1], "prefill": [1.0, 1.0]}
    measured = Relative("cpu", 1, "processor", SIZES, ratios, versions(), describe_machine())
    changes = {"decode": change, "prefill": 0.0}
    return Regression(
        bundle="b",
        passed=change <= max_regression,
        change=change,
        interval=(change, change),
        measure="decode",
        changes=changes,
        max_regression=max_regression,
        first_changes=changes if change > max_regression else None,
        text=f"{change:+.1%} against the baseline, {max_regression:.0%} allowed",
        measured=measured,
    )
