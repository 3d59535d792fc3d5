"""PackedRotation: Transposes around a rotation of heads."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphs import GraphMaker, apply, counts

from pe_onnx.passes.packed_rotation import PackedRotation

H, D = 3, 8


def tables(g: GraphMaker, R: int = D) -> list[ir.Value]:
    return [g.input(name, "B", "T", R // 2) for name in ("cos", "sin")]


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("R", [4, D])
def test_fires(R: int, interleaved: int, T: int) -> None:
    g = GraphMaker()
    x = g.input("x", "B", "T", H, D)
    rotated = g.rotate(g.heads_first(x), *tables(g, R), R, interleaved)
    model = g.model(g.op("Neg", g.op("Transpose", rotated, shape=["B", "T", H, D], perm=[0, 2, 1, 3])))
    assert apply(PackedRotation(), model, T=T)
    assert counts(model) == {"Reshape": 2, "RotaryEmbedding": 1, "Neg": 1}
    assert next(n for n in model.graph if n.op_type == "RotaryEmbedding").attributes["num_heads"].as_int() == H


def test_another_reader_of_the_first_transpose_keeps_it() -> None:
    g = GraphMaker()
    first = g.heads_first(g.input("x", "B", "T", H, D))
    rotated = g.rotate(first, *tables(g), D)
    back = g.op("Transpose", rotated, shape=["B", "T", H, D], perm=[0, 2, 1, 3])
    model = g.model(g.op("Neg", back), g.op("Abs", first))
    assert apply(PackedRotation(), model)
    assert counts(model)["Transpose"] == 1


def test_two_transposes_behind() -> None:
    g = GraphMaker()
    rotated = g.rotate(g.heads_first(g.input("x", "B", "T", H, D)), *tables(g), D)
    backs = [g.op("Transpose", rotated, shape=["B", "T", H, D], perm=[0, 2, 1, 3]) for _ in range(2)]
    model = g.model(*(g.op("Neg", back) for back in backs))
    assert apply(PackedRotation(), model)
    assert counts(model)["Transpose"] == 0


@pytest.mark.parametrize(
    "case", ["perm", "perm behind", "read elsewhere", "output", "output behind", "heads", "packed"]
)
def test_does_not_fire(case: str) -> None:
    g = GraphMaker()
    heads: int | str | None = {"heads": None}.get(case, H)
    x = g.input("x", "B", "T", heads, D)
    cos, sin = tables(g)
    if case == "perm":
        turned = g.op("Transpose", g.input("y", H, "B", "T", D), shape=["B", H, "T", D], perm=[1, 0, 2, 3])
    else:
        turned = g.heads_first(x)
    rotated = g.rotate(turned, cos, sin, D)
    if case == "packed":
        packed = g.reshape(g.input("z", "B", "T", H * D), [0, 0, H * D], ["B", "T", H * D])
        rotated = g.op("RotaryEmbedding", packed, cos, sin, shape=None, num_heads=H, interleaved=0, rotary_dim=D)
        model = g.model(g.op("Transpose", rotated, perm=[0, 2, 1]))
        assert not apply(PackedRotation(), model)
        return
    perm = [0, 2, 3, 1] if case == "perm behind" else [0, 2, 1, 3]
    back = g.op("Transpose", rotated, shape=["B", "T", H, D], perm=perm)
    outputs = [back if case == "output behind" else g.op("Neg", back)]
    if case == "read elsewhere":
        outputs.append(g.op("Abs", rotated))
    if case == "output":
        outputs.append(rotated)
    model = g.model(*outputs)
    if case != "perm":
        assert counts(model)["Transpose"] == 2
    assert not apply(PackedRotation(), model, unnamed=H)
