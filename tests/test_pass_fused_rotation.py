"""FusedRotation: rotations spelled out as transformers' modeling files spell them."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphs import GraphMaker, apply, counts

from pe_onnx.passes.fused_rotation import FusedRotation

H, R = 3, 8
SHAPE = ["B", H, "T", R]


def pairs(g: GraphMaker, narrow: ir.Value) -> ir.Value:
    """Each channel twice in a row, as the exporter writes repeat_interleave."""
    shape = list(narrow.shape or ())
    wide = g.op("Expand", g.unsqueeze(narrow, len(shape)), g.const([1] * len(shape) + [2]), shape=[*shape, 2])
    target = g.op("Concat", g.op("Shape", narrow, start=0, end=-1), g.const([-1]), axis=0)
    return g.op("Reshape", wide, target, shape=[*shape[:-1], 2 * shape[-1]])


def table(g: GraphMaker, kind: str, layout: str, batch: str = "B") -> ir.Value:
    """cos or sin, ``[B, 1, T, R]``."""
    angle = g.graph.inputs[1] if len(g.graph.inputs) > 1 else g.input("angle", batch, "T", R // 2)
    if layout == "pairs at once":
        return g.unsqueeze(g.op(kind, pairs(g, angle), shape=[batch, "T", R]), 1)
    wide = g.op(kind, g.op("Concat", angle, angle, shape=[batch, "T", R], axis=-1), shape=[batch, "T", R])
    if layout == "halves":
        return g.unsqueeze(wide, 1)
    return pairs(g, g.slice(g.unsqueeze(wide, 1), 0, R // 2))  # GLM, Ernie 4.5


def turned(
    g: GraphMaker, x: ir.Value, in_pairs: bool, backwards: bool = False, ends: tuple[int, int] = (4, 4)
) -> ir.Value:
    a, b = (g.slice(x, 0, R, 2), g.slice(x, 1, R, 2)) if in_pairs else (g.slice(x, 0, ends[0]), g.slice(x, ends[1], R))
    a, b = (
        (a, g.op("Neg", b, shape=list(b.shape or ())))
        if not backwards
        else (g.op("Neg", a, shape=list(a.shape or ())), b)
    )
    if not in_pairs:
        return g.op("Concat", b, a, shape=SHAPE, axis=-1)
    stacked = g.op("Concat", g.unsqueeze(b, -1), g.unsqueeze(a, -1), shape=["B", H, "T", R // 2, 2], axis=-1)
    return g.reshape(stacked, [2, H, -1, R], SHAPE)


def rotation(g: GraphMaker, x: ir.Value, y: ir.Value, cos: ir.Value, sin: ir.Value, swap: bool = False) -> ir.Value:
    straight = g.op("Mul", *((cos, x) if swap else (x, cos)), shape=SHAPE)
    across = g.op("Mul", *((sin, y) if swap else (y, sin)), shape=SHAPE)
    return g.op("Add", *((across, straight) if swap else (straight, across)), shape=SHAPE)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("layout", ["halves", "pairs", "pairs at once"])
def test_fires(layout: str, backwards: bool, swap: bool) -> None:
    g = GraphMaker()
    x = g.input("x", *SHAPE)
    cos, sin = table(g, "Cos", layout), table(g, "Sin", layout)
    rotated = rotation(g, x, turned(g, x, layout != "halves", backwards), cos, sin, swap)
    model = g.model(g.op("Abs", rotated))
    assert apply(FusedRotation(), model)
    count = counts(model)
    assert count["RotaryEmbedding"] == 1
    assert (count["Mul"], count["Add"], count["Neg"]) == (0, 0, int(backwards))
    (node,) = (n for n in model.graph if n.op_type == "RotaryEmbedding")
    assert node.attributes["interleaved"].as_int() == int(layout != "halves")


def test_queries_and_keys_share_the_narrow_tables() -> None:
    g = GraphMaker()
    x = g.input("x", *SHAPE)
    cos, sin = table(g, "Cos", "halves"), table(g, "Sin", "halves")
    key = g.op("Abs", x, shape=SHAPE)
    model = g.model(*(g.op("Neg", rotation(g, y, turned(g, y, False), cos, sin)) for y in (x, key)))
    assert apply(FusedRotation(), model)
    assert (counts(model)["RotaryEmbedding"], counts(model)["Slice"]) == (2, 2)


def test_the_function_is_added() -> None:
    g = GraphMaker()
    x = g.input("x", *SHAPE)
    rotated = rotation(g, x, turned(g, x, False), table(g, "Cos", "halves"), table(g, "Sin", "halves"))
    model = g.model(g.op("Abs", rotated))
    model.functions.clear()
    assert apply(FusedRotation(), model)
    assert [f.name for f in model.functions.values()] == ["RotaryEmbedding"]


@pytest.mark.parametrize(
    "case",
    [
        "layouts differ",
        "table of pairs",
        "tables not repeated",
        "other source",
        "uneven",
        "both negated",
        "not negated",
        "output",
        "one row of tables",
        "no sine",
    ],
)
def test_does_not_fire(case: str) -> None:
    g = GraphMaker()
    x = g.input("x", *SHAPE)
    batch = "one" if case == "one row of tables" else "B"
    cos, sin = table(g, "Cos", "halves", batch), table(g, "Sin", "halves", batch)
    y = turned(g, x, False)
    if case == "layouts differ":
        y = turned(g, x, True)
    elif case == "table of pairs":
        cos, sin = table(g, "Cos", "pairs"), table(g, "Sin", "pairs")
    elif case == "tables not repeated":
        sin = g.unsqueeze(g.input("sin", "B", "T", R), 1)
    elif case == "other source":
        y = turned(g, g.op("Abs", x, shape=SHAPE), False)
    elif case == "uneven":
        y = turned(g, x, False, ends=(3, 3))
    elif case == "both negated":
        halves = [g.op("Neg", g.slice(x, *ends), shape=["B", H, "T", 4]) for ends in ((4, 8), (0, 4))]
        y = g.op("Concat", *halves, shape=SHAPE, axis=-1)
    elif case == "not negated":
        y = g.op("Concat", g.slice(x, 4, 8), g.slice(x, 0, 4), shape=SHAPE, axis=-1)
    if case == "no sine":
        rotated = g.op("Add", g.op("Mul", x, cos, shape=SHAPE), y, shape=SHAPE)
    else:
        rotated = rotation(g, x, y, cos, sin)
    model = g.model(rotated if case == "output" else g.op("Abs", rotated))
    assert not apply(FusedRotation(), model, one=1)
