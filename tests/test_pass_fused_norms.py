"""FusedNorms: root-mean-square norms without weights, spelled out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import GraphMaker, apply, counts, run

from pe_onnx.passes.fused_norms import FusedNorms

SHAPE = ["B", "T", 12]
ROW = ["B", "T", 1]


def norm(
    g: GraphMaker,
    x: ir.Value,
    epsilon: object = 1e-6,
    exponent: float = 2.0,
    axis: int = -1,
    keepdims: int = 1,
    swap: bool = False,
    squared: ir.Value | None = None,
) -> ir.Value:
    square = g.op("Pow", squared or x, g.const(exponent, np.float32), shape=SHAPE)
    mean = g.op("ReduceMean", square, g.const([axis]), shape=ROW, keepdims=keepdims)
    root = g.op("Sqrt", g.op("Add", mean, g.const(epsilon, np.float32), shape=ROW), shape=ROW)
    inverse = g.op("Reciprocal", root, shape=ROW)
    return g.op("Mul", *((inverse, x) if swap else (x, inverse)), shape=SHAPE)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("axis", [-1, 2])
@pytest.mark.parametrize("epsilon", [1e-8, 0.3])
def test_fires(epsilon: float, axis: int, swap: bool) -> None:
    g = GraphMaker()
    model = g.model(g.op("Abs", norm(g, g.input("x", *SHAPE), epsilon, axis=axis, swap=swap)))
    assert apply(FusedNorms(), model)
    assert counts(model) == {"RMSNormalization": 1, "Abs": 1}


def test_a_row_of_zeros_stays_a_row_of_zeros() -> None:
    g = GraphMaker()
    model = g.model(g.op("Abs", norm(g, g.input("x", *SHAPE), 1e-8)))
    assert FusedNorms()(model).modified
    (have,) = run(model, {"x": np.zeros((2, 3, 12), np.float32)})
    assert (have == 0).all()


def test_what_is_between_stays_where_it_is_read() -> None:
    g = GraphMaker()
    x = g.input("x", *SHAPE)
    normed = norm(g, x)
    mean = next(node.outputs[0] for node in g.graph if node.op_type == "ReduceMean")
    model = g.model(g.op("Abs", normed), g.op("Neg", mean))
    assert apply(FusedNorms(), model)
    assert counts(model) == {"Pow": 1, "ReduceMean": 1, "RMSNormalization": 1, "Abs": 1, "Neg": 1}


@pytest.mark.parametrize(
    "case", ["fourth power", "axis", "epsilon a vector", "other square", "width unknown", "output", "double"]
)
def test_does_not_fire(case: str) -> None:
    g = GraphMaker()
    x = g.input("x", *(["B", 12, 12] if case == "axis" else ["B", "T", "W"] if case == "width unknown" else SHAPE))
    options: dict[str, object] = {
        "fourth power": {"exponent": 4.0},
        "axis": {"axis": 1},
        "epsilon a vector": {"epsilon": np.full(12, 1e-6)},
        "other square": {"squared": g.op("Neg", x, shape=SHAPE)},
    }.get(case, {})
    if case == "double":
        x.type = ir.TensorType(ir.DataType.DOUBLE)
        normed = norm(g, x)
        assert not FusedNorms()(g.model(g.op("Abs", normed))).modified
        return
    normed = norm(g, x, **options)  # type: ignore[arg-type]
    model = g.model(normed if case == "output" else g.op("Abs", normed))
    assert not apply(FusedNorms(), model, W=12)


@pytest.mark.parametrize("weights", [np.float16, np.float32])
def test_half_precision_with_float32_weights(weights: type) -> None:
    g = GraphMaker()
    x = g.input("x", *SHAPE)
    half = g.op("Cast", x, shape=SHAPE, to=ir.DataType.FLOAT16)
    scale = np.linspace(0.5, 2, 12).astype(weights)
    half.type = ir.TensorType(ir.DataType.FLOAT16)
    normed = g.op("RMSNormalization", half, g.const(scale, weights), shape=SHAPE, axis=-1, epsilon=1e-5, stash_type=1)
    model = g.model(g.op("Cast", normed, shape=SHAPE, to=ir.DataType.FLOAT))
    assert FusedNorms()(model).modified == (weights is np.float32)
    assert not FusedNorms()(model).modified
    values = np.random.default_rng(0).standard_normal((2, 3, 12), np.float32)
    (have,) = run(model, {"x": values})
    rounded = values.astype(np.float16).astype(np.float64)
    want = rounded / np.sqrt((rounded**2).mean(-1, keepdims=True) + 1e-5) * scale
    assert np.abs(have - want).max() < (1e-6 if weights is np.float32 else 4e-3)
