"""FusedProjections: products of one input, joined."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import GraphMaker, apply, counts

from pe_onnx.passes.fused_projections import JOIN, FusedProjections, is_joined, parts_of

K = 24


def weight(g: GraphMaker, width: int, rows: int = K, dtype: type = np.float32) -> ir.Value:
    return g.const(g.rng.standard_normal((rows, width)), dtype)


def product(g: GraphMaker, x: ir.Value, w: ir.Value) -> ir.Value:
    assert w.shape is not None
    return g.op("MatMul", x, w, shape=["B", "T", w.shape[1]])


def test_joins_products_of_one_input() -> None:
    g = GraphMaker()
    x = g.input("x", "B", "T", K)
    weights = [weight(g, width) for width in (24, 8, 9)]
    made = [product(g, x, w) for w in weights]
    names, weight_names = [value.name for value in made], [w.name for w in weights]
    model = g.model(*(g.op("Abs", value) for value in made))
    assert apply(FusedProjections(), model)
    assert counts(model) == {"MatMul": 1, "Split": 1, "Abs": 3}
    split = next(node for node in model.graph if node.op_type == "Split")
    assert is_joined(split)
    assert [value.name for value in split.outputs] == names
    (joined,) = (name for name in model.graph.initializers if JOIN in name and "widths" not in name)
    assert parts_of(joined) == weight_names
    assert model.graph.initializers[joined].const_value.shape == (K, 41)  # type: ignore[union-attr]
    assert not set(weight_names) & model.graph.initializers.keys()


def test_each_input_has_its_own() -> None:
    g = GraphMaker()
    x, y = g.input("x", "B", "T", K), g.input("y", "B", "T", K)
    made = [product(g, value, weight(g, width)) for value, width in ((x, 8), (y, 8), (x, 9), (y, 7))]
    model = g.model(*(g.op("Abs", value) for value in made))
    assert apply(FusedProjections(), model)
    assert counts(model) == {"MatMul": 2, "Split": 2, "Abs": 4}


@pytest.mark.parametrize("case", ["alone", "weight read twice", "weight is an input", "an output", "three axes"])
def test_does_not_join(case: str) -> None:
    g = GraphMaker()
    x = g.input("x", "B", "T", K)
    first = weight(g, 8)
    second = {
        "weight read twice": first,
        "weight is an input": g.input("w", K, 8),
        "three axes": g.const(g.rng.standard_normal((1, K, 8)), np.float32),
    }.get(case)
    if case == "an output":
        second = weight(g, 8)
    made = [product(g, x, first)]
    if second is not None:
        made.append(g.op("MatMul", x, second, shape=["B", "T", 8]))
    outputs = made if case == "an output" else [g.op("Abs", value) for value in made]
    assert not apply(FusedProjections(), g.model(*outputs))
