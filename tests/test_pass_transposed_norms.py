"""TransposedNorms: norms of heads between the Transposes around a rotation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import GraphMaker, apply, counts

from pe_onnx.passes.transposed_norms import TransposedNorms

H, D = 3, 8
FIRST, LAST = ["B", H, "T", D], ["B", "T", H, D]


def norm(g: GraphMaker, x: ir.Value, kind: str = "RMSNormalization", axis: int = -1, weight: object = None) -> ir.Value:
    weight = np.linspace(0.5, 2, D) if weight is None else weight
    weights = [g.const(weight, np.float32)]
    if kind == "LayerNormalization":
        weights.append(g.const(np.linspace(-1, 1, D), np.float32))
    return g.op(kind, x, *weights, shape=list(x.shape or ()), axis=axis, epsilon=1e-5)


def order(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("axis", [-1, 3])
@pytest.mark.parametrize("kind", ["RMSNormalization", "LayerNormalization"])
def test_fires_before_and_behind(kind: str, axis: int) -> None:
    g = GraphMaker()
    cos, sin = (g.input(name, "B", "T", D // 2) for name in ("cos", "sin"))
    rotated = g.rotate(norm(g, g.heads_first(g.input("x", *LAST)), kind, axis), cos, sin, D)
    back = g.op("Transpose", norm(g, rotated, kind, axis), shape=LAST, perm=[0, 2, 1, 3])
    model = g.model(g.op("Abs", back))
    assert apply(TransposedNorms(), model)
    assert order(model) == [kind, "Transpose", "RotaryEmbedding", "Transpose", kind, "Abs"]


@pytest.mark.parametrize(
    "case", ["axis", "weight of two axes", "norm read elsewhere", "transpose read elsewhere", "no rotation"]
)
def test_does_not_fire_before(case: str) -> None:
    g = GraphMaker()
    cos, sin = (g.input(name, "B", "T", D // 2) for name in ("cos", "sin"))
    turned = g.heads_first(g.input("x", "B", 5, H, D))
    weight = np.ones((5, D)) if case == "axis" else np.ones((1, D)) if case == "weight of two axes" else None
    normed = norm(g, turned, axis=2 if case == "axis" else -1, weight=weight)
    rotated = normed if case == "no rotation" else g.rotate(normed, cos, sin, D)
    outputs = [g.op("Abs", rotated)]
    if "elsewhere" in case:
        outputs.append(g.op("Neg", normed if case.startswith("norm") else turned))
    assert not apply(TransposedNorms(), g.model(*outputs))


@pytest.mark.parametrize("case", ["axis", "read elsewhere", "norm read elsewhere", "perm", "output", "no Transpose"])
def test_does_not_fire_behind(case: str) -> None:
    g = GraphMaker()
    cos, sin = (g.input(name, "B", "T", D // 2) for name in ("cos", "sin"))
    rotated = g.rotate(g.input("x", "B", H, 5, D), cos, sin, D)
    normed = norm(g, rotated, axis=2 if case == "axis" else -1, weight=np.ones((5, D)) if case == "axis" else None)
    back = g.op("Transpose", normed, perm=[0, 2, 3, 1] if case == "perm" else [0, 2, 1, 3])
    outputs = [back if case == "output" else g.op("Abs", normed if case == "no Transpose" else back)]
    if "elsewhere" in case:
        outputs.append(g.op("Neg", normed if case.startswith("norm") else rotated))
    model = g.model(*outputs)
    assert counts(model)["RotaryEmbedding"] == 1
    assert not apply(TransposedNorms(), model)
