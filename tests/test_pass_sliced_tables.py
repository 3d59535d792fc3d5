"""SlicedTables: tables that hold each frequency twice, where it is needed once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import GraphMaker, apply, counts
from test_pass_fused_rotation import pairs

from pe_onnx.passes.sliced_tables import SlicedTables

HALF = 4


def wide(g: GraphMaker, layout: str, scale: float | None = None) -> list[ir.Value]:
    """cos and sin ``[B, T, 8]``, times a factor as in YaRN."""
    angle = g.input("angle", "B", "T", HALF)
    shape = ["B", "T", 2 * HALF]
    twice = pairs(g, angle) if layout == "pairs" else g.op("Concat", angle, angle, shape=shape, axis=-1)
    found = [g.op(kind, twice, shape=shape) for kind in ("Cos", "Sin")]
    return found if scale is None else [g.op("Mul", x, g.const(scale, np.float32), shape=shape) for x in found]


@pytest.mark.parametrize("scale", [None, 1.3])
@pytest.mark.parametrize(
    ("layout", "bounds"),
    [("halves", (0, 4, 1)), ("halves", (4, 2**63 - 1, 1)), ("pairs", (0, 2**63 - 1, 2)), ("pairs", (1, 8, 2))],
)
def test_fires(layout: str, bounds: tuple[int, int, int], scale: float | None) -> None:
    g = GraphMaker()
    model = g.model(*(g.op("Neg", g.slice(x, *bounds)) for x in wide(g, layout, scale)))
    assert apply(SlicedTables(), model)
    assert counts(model) == {"Cos": 1, "Sin": 1, "Neg": 2} | ({} if scale is None else {"Mul": 2})


@pytest.mark.parametrize(
    "case", ["read elsewhere", "output", "too few", "too many", "stepped", "halves of pairs", "a b", "factors"]
)
def test_does_not_fire(case: str) -> None:
    g = GraphMaker()
    cos, _ = wide(g, "pairs" if case == "halves of pairs" else "halves")
    if case == "a b":
        a, b = g.input("a", "B", "T", HALF), g.input("b", "B", "T", HALF)
        cos = g.op("Cos", g.op("Concat", a, b, shape=["B", "T", 8], axis=-1), shape=["B", "T", 8])
    if case == "factors":
        cos = g.op("Mul", cos, g.const(np.arange(8), np.float32), shape=["B", "T", 8])
    bounds = {"too few": (0, 3), "too many": (0, 5), "stepped": (0, 8, 2)}.get(case, (0, 4))
    taken = g.slice(cos, *bounds)
    outputs = [taken if case == "output" else g.op("Neg", taken)]
    if case == "read elsewhere":
        outputs.append(g.op("Abs", cos))
    assert not apply(SlicedTables(), g.model(*outputs))
