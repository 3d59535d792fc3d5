"""The gate's benchmark: how it counts. What it measures is measured when it is run."""

from __future__ import annotations

import inspect
from typing import Any

import gate
import pytest

from pe_onnx import regression


def one(decode: float, alarm: bool, first: dict[str, float] | None = None) -> dict[str, Any]:
    return {"alarm": alarm, "changes": {"decode": decode, "prefill": 0.0}, "first_changes": first, "seconds": 5.0}


def test_it_measures_the_gate_as_check_runs_it() -> None:
    """Which leaves both budgets to what the functions themselves take."""
    options = {option.name: option.default for option in gate.main.params}
    for function, name in ((regression.measure, "baseline_budget"), (regression.compare, "budget")):
        assert options[name] == inspect.signature(function).parameters["budget_s"].default
    assert (options["baseline_budget"], options["budget"]) == (regression.BASELINE_S, regression.MEASUREMENT_S)


def test_counts_and_distribution() -> None:
    runs = [one(-0.02, False), one(0.0, False), one(0.04, False, {"decode": 0.12}), one(0.2, True, {"decode": 0.2})]
    summary = gate.summarise(runs)
    assert (summary["runs"], summary["alarms"], summary["second_measurements"]) == (4, 1, 2)
    decode = summary["change"]["decode"]
    assert list(decode) == ["least", "q25", "median", "q75", "greatest"]
    assert list(decode.values()) == pytest.approx([-0.02, -0.005, 0.02, 0.08, 0.2])


def test_of_one_run() -> None:
    summary = gate.summarise([one(0.05, False)])
    assert set(summary["change"]["decode"].values()) == {0.05}
    assert "| unchanged | 0 | 1 | +5.0% | +5.0%..+5.0% | +0.0% |" in gate.table({"unchanged": summary})
