"""The rule for what is allowed: derived, printed, never looser than it was, and with room above what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from checkout import ROOT
from conftest import Bundles

from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.errors import ConfigError
from pe_onnx.parity_report import Account, ModeResult
from pe_onnx.tolerance import given, tolerance_for, unit_roundoff

BEFORE = {"fp32": 5e-5, "fp16": 3e-2}
"""One constant for each dtype, whatever the depth, as it once was."""
MEASURED = json.loads((ROOT / "benchmarks" / "tolerance.json").read_text())["cases"]


@pytest.mark.parametrize("dtype", BEFORE)
def test_no_looser_than_it_was_up_to_32_layers(dtype: str) -> None:
    allowed = [tolerance_for(dtype, layers).error for layers in range(1, 33)]
    assert max(allowed) <= BEFORE[dtype]
    assert allowed == sorted(allowed)


@pytest.mark.parametrize("dtype", BEFORE)
def test_room_above_every_right_bundle_that_was_measured(dtype: str) -> None:
    cases = [case for case in MEASURED if case["dtype"] == dtype]
    assert {case["target"] for case in cases} == {"ort", "portable"}
    assert max(case["layers"] for case in cases) >= 30
    margins = [tolerance_for(dtype, case["layers"]).error / case["relative_error"] for case in cases]
    assert min(margins) > 2.5
    assert np.median(margins) > 4


@pytest.mark.parametrize(("dtype", "numpy"), [("fp32", np.float32), ("fp16", np.float16)])
def test_the_unit_roundoff_is_half_the_spacing_at_one(dtype: str, numpy: type) -> None:
    assert unit_roundoff(dtype) == float(np.finfo(numpy).eps) / 2


@pytest.mark.parametrize(("dtype", "layers"), [("fp32", 30), ("fp16", 7)])
def test_the_rule_is_a_line_that_can_be_checked_by_hand(dtype: str, layers: int) -> None:
    tolerance = tolerance_for(dtype, layers)
    name, formula, result = tolerance.rule.split(": ")
    assert name == dtype
    expression, _, u = formula.partition(", u = ")
    factor, inside = expression.split(" u sqrt(")
    base, exponent = u.split("^")
    total = sum(int(part.split()[0]) for part in inside.rstrip(")").split(" + "))
    error = float(factor) * float(base) ** float(exponent) * math.sqrt(total)
    assert error == pytest.approx(tolerance.error)
    assert result == f"{error:.1e} of the logits' spread"
    assert "\n" not in tolerance.rule
    assert given(0.25).rule == "given: 2.5e-01 of the logits' spread"
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"tolerance = .* must be a finite number, at least 0"):
            given(wrong)


def account(gap: float, error: float) -> ModeResult:
    """One position at which two tokens are ``gap`` of the spread apart and each moved by ``error`` to the other."""
    spread = 2.0
    result = Account("steps", spread, given(0.1))
    want = np.array([0.0, gap, -9.0]) * spread
    result.add("row 3, position 5", want, want + np.array([error, -error, 0.0]) * spread)
    return result.finish()


def test_a_flip_within_twice_the_error_is_a_near_tie() -> None:
    tied = account(gap=0.19, error=0.0975)
    assert (tied.near_ties, tied.disagreements, tied.top1_agreement, tied.passed) == (1, 0, 1.0, True)


def test_a_flip_beyond_it_is_a_disagreement() -> None:
    apart = account(gap=0.21, error=0.12)
    assert (apart.near_ties, apart.disagreements, apart.top1_agreement, apart.passed) == (0, 1, 0.0, False)
    assert apart.first_disagreement is not None
    assert (apart.first_disagreement.expected, apart.first_disagreement.chosen) == (1, 0)
    assert apart.first_disagreement.gap == pytest.approx(0.21)
    assert apart.first_disagreement.text == "row 3, position 5: token 0 for 1, 2.1e-01 of the spread apart"


def test_no_flip_is_neither() -> None:
    same = account(gap=0.21, error=0.01)
    assert (same.near_ties, same.disagreements, same.passed) == (0, 0, True)


def test_another_choice_alone_fails() -> None:
    """Of beams there is no error of a logit, only another hypothesis."""
    for gap, passed in ((0.19, True), (0.21, False)):
        result = Account("beams", 2.0, given(0.1))
        result.add_choice("source 0", True, 0.0)
        result.add_choice("source 1", False, gap * 2.0)
        finished = result.finish()
        assert finished.passed is passed
        assert finished.relative_error == 0
        assert (finished.near_ties, finished.disagreements) == ((1, 0) if passed else (0, 1))


def test_the_depth_is_that_of_the_manifest(bundles: Bundles) -> None:
    bundle = read_bundle(bundles("rope"))
    assert bundle.manifest["model"]["layers"] == bundle.depth == 2
    older = {**bundle.manifest, "model": {k: v for k, v in bundle.manifest["model"].items() if k != "layers"}}
    assert Bundle(Path("older"), older).depth == 2
    crossed = {**older, "model": {**older["model"], "encoder": {"width": 8, "caches": [[1, 8]] * 2}}}
    assert Bundle(Path("crossed"), crossed).depth == 4
