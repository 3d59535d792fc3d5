"""The committed table of families is what a sweep over the installed transformers' classes finds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sweep
from variants import VARIANTS

from pe_onnx.contract import TARGETS

COMMITTED: dict[str, Any] = json.loads(sweep.FILE.read_text("utf-8"))


def shown(families: dict[str, dict[str, Any]]) -> dict[str, Any]:
    keys = ("class", "status", "encoding", "route", "targets")
    return {name: {key: row.get(key) for key in keys} for name, row in families.items()}


def test_every_class_has_a_row() -> None:
    assert {name: row["class"] for name, row in COMMITTED["families"].items()} == dict(sweep.CLASSES)


def test_none_is_wrong_and_each_refusal_has_its_reason() -> None:
    rows = COMMITTED["families"].values()
    assert {row["status"] for row in rows} == {"right", "refused", "not built"}
    refused = [row["reason"] for row in rows if row["status"] == "refused"]
    internal = ("index out of range", "has no attribute", "Tensor", "NoneType", "Error", "dimension")
    assert [reason for reason in refused if any(part in reason for part in internal)] == []


EVERY = 8


def test_the_bridge_finds_the_committed_table() -> None:
    """In PyTorch alone, of one family in eight: the others, and what the exporter adds, are the slow test's."""
    names = sorted(sweep.CLASSES)[::EVERY]
    found = sweep.sweep(lambda name: (), names=names)
    assert shown(found) == {name: row for name, row in shown(COMMITTED["families"]).items() if name in found}
    assert {row["status"] for row in found.values()} >= {"right", "refused"}


@pytest.mark.slow
def test_every_family_through_onnxruntime() -> None:
    """Proven in PyTorch on both targets and exported on one, in turn; those of test_families.py and test_t5.py are
    exported there. ``make families`` exports each on both."""
    there = {model_type for model_type, _ in VARIANTS.values()} | set(sweep.CROSSED)
    turns = {name: () if name in there else (list(TARGETS)[i % 2],) for i, name in enumerate(sorted(sweep.CLASSES))}
    assert shown(sweep.sweep(turns.__getitem__, jobs=2)) == shown(COMMITTED["families"])
