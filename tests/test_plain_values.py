"""Values as JSON takes them, wherever in a report they stand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import check_documents
import numpy as np
import pytest

from pe_onnx.plain_values import plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.inf, None),
        (np.float32("nan"), None),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (True, True),
        ((1, (2.0, -math.inf)), [1, [2.0, None]]),
        ({3: {"a": math.nan}}, {"3": {"a": None}}),
        (np.array([[1.0, math.inf]]), [[1.0, None]]),
        (Path("a"), "a"),
        (None, None),
    ],
    ids=str,
)
def test_plain(value: Any, expected: Any) -> None:
    found = plain(value)
    assert json.loads(json.dumps(found, allow_nan=False)) == expected
    assert type(found) is type(expected)


def test_no_depth_of_a_parity_report_is_forgotten() -> None:
    """Its spread, and what stands within a mode."""
    report = check_documents.parity(check_documents.mode("steps", math.nan, False))
    report.spread = math.nan
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["spread"] is None
    assert written["modes"][0]["first_disagreement"]["gap"] is None
    assert written["modes"][0]["max_abs_error"] is None
