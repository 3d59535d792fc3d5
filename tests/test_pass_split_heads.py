"""SplitHeads: queries, keys and values taken apart behind the Transpose of all three (GPT-NeoX)."""

from __future__ import annotations

import pytest
from graphs import GraphMaker, apply

from pe_onnx.passes.split_heads import SplitHeads

H, D = 3, 4
PART = ["B", H, "T", D]


@pytest.mark.parametrize("sized", [False, True])
def test_fires(sized: bool) -> None:
    g = GraphMaker()
    turned = g.heads_first(g.input("x", "B", "T", H, 3 * D))
    sizes, attributes = ([g.const([D, D, D])], {}) if sized else ([], {"num_outputs": 3})
    parts = g.ops("Split", turned, *sizes, shapes=[PART] * 3, axis=3, **attributes)  # type: ignore[list-item]
    model = g.model(*(g.op("Neg", part) for part in parts))
    assert apply(SplitHeads(), model)
    assert [node.op_type for node in model.graph] == ["Split"] + ["Transpose"] * 3 + ["Neg"] * 3


@pytest.mark.parametrize("case", ["heads", "perm", "read elsewhere", "output", "transpose is output"])
def test_does_not_fire(case: str) -> None:
    g = GraphMaker()
    x = g.input("x", "B", "T", 3, 3 * D)
    perm = [0, 2, 3, 1] if case == "perm" else [0, 2, 1, 3]
    turned = g.op("Transpose", x, shape=["B", 3, "T", 3 * D] if case != "perm" else ["B", 3, 3 * D, "T"], perm=perm)
    axis = 1 if case == "heads" else 2 if case == "perm" else 3
    parts = g.ops("Split", turned, shapes=[["B", 3, "T", D]] * 3, axis=axis, num_outputs=3)  # type: ignore[list-item]
    outputs = list(parts) if case == "output" else [g.op("Neg", part) for part in parts]
    if case == "read elsewhere":
        outputs.append(g.op("Abs", turned))
    if case == "transpose is output":
        outputs.append(turned)
    assert not apply(SplitHeads(), g.model(*outputs))
