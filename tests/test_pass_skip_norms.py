"""SkipNorms: a sum and the norm behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import GraphMaker, apply, counts

from pe_onnx.passes.skip_norms import SkipNorms

C = 24
SHAPE = ["B", "T", C]


def norm(g: GraphMaker, x: ir.Value, kind: str, weight: object = None, **attributes: object) -> ir.Value:
    weights = [g.const(np.linspace(0.5, 2, C) if weight is None else weight, np.float32)]
    if kind == "LayerNormalization":
        weights.append(g.const(np.linspace(-1, 1, C), np.float32))
    return g.op(kind, x, *weights, shape=SHAPE, **{"axis": -1, "epsilon": 1e-5, **attributes})


def layer(g: GraphMaker, name: str, shape: list[Any] = SHAPE) -> ir.Value:
    """What a layer adds: a product."""
    x, w = g.input(name, *shape), g.const(g.rng.standard_normal((C, C)) / 5, np.float32)
    return g.op("MatMul", x, w, shape=shape)


@pytest.mark.parametrize("axis", [-1, 2])
@pytest.mark.parametrize("kind", ["RMSNormalization", "LayerNormalization"])
def test_fires(kind: str, axis: int) -> None:
    """Also where the sum is read behind the norm, as the next residual sum does."""
    g = GraphMaker()
    total = g.op("Add", g.input("a", *SHAPE), layer(g, "b"), shape=SHAPE)
    normed = norm(g, total, kind, axis=axis)
    names = total.name, normed.name
    model = g.model(g.op("Add", total, g.op("Abs", normed, shape=SHAPE), shape=SHAPE))
    assert apply(SkipNorms(), model)
    fused = "SkipSimplifiedLayerNormalization" if kind == "RMSNormalization" else "SkipLayerNormalization"
    assert counts(model) == {"MatMul": 1, fused: 1, "Abs": 1, "Add": 1}
    node = model.graph[1]
    assert (node.outputs[3].name, node.outputs[0].name) == names


def test_a_norm_that_is_an_output() -> None:
    g = GraphMaker()
    total = g.op("Add", g.input("a", *SHAPE), layer(g, "b"), shape=SHAPE)
    assert apply(SkipNorms(), g.model(norm(g, total, "RMSNormalization")))


CASES = ["axis", "broadcast", "sum is an output", "half weights", "no sum", "rank", "stash", "no layer"]


@pytest.mark.parametrize("case", CASES)
def test_does_not_fire(case: str) -> None:
    g = GraphMaker()
    shape: list[Any] = ["B", C] if case == "rank" else ["B", C, C]
    a = g.input("a", *([*shape[:-1], 1] if case == "broadcast" else shape))
    b = g.input("b", *shape) if case == "no layer" else layer(g, "b", shape)
    total = b if case == "no sum" else g.op("Add", a, b, shape=shape)
    weights = g.const(np.ones(C), np.float16 if case == "half weights" else np.float32)
    attributes: dict[str, Any] = {"axis": -1, "epsilon": 1e-5, "stash_type": 10 if case == "stash" else 1}
    if case == "axis":
        weights, attributes["axis"] = g.const(np.ones((C, C)), np.float32), 1
    normed = g.op("RMSNormalization", total, weights, shape=shape, **attributes)
    if case in ("half weights", "stash"):  # onnxruntime need not know it
        assert not SkipNorms()(g.model(g.op("Abs", normed))).modified
        return
    outputs = [g.op("Abs", normed)]
    if case == "sum is an output":
        outputs.append(total)
    assert not apply(SkipNorms(), g.model(*outputs))
