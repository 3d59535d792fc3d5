"""ConstantShapes: targets of Reshape that are computed at every step."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphs import GraphMaker, apply, counts

from pe_onnx.passes.constant_shapes import ConstantShapes


def reshaped(g: GraphMaker, before: list[object], target: list[int | None], after: list[object]) -> ir.Model:
    """None in the target: the input's size of this place, read off at run time."""
    x = g.input("x", *before)  # type: ignore[arg-type]
    sizes = [g.const([n]) if n is not None else g.op("Shape", x, start=i, end=i + 1) for i, n in enumerate(target)]
    return g.model(g.op("Neg", g.op("Reshape", x, g.op("Concat", *sizes, axis=0), shape=after, allowzero=1)))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(
    ("before", "target", "after", "constant"),
    [
        (["B", "T", 12], [None, None, 3, 4], ["B", "T", 3, 4], [0, 0, 3, 4]),
        (["B", "T", 3, 4], [None, None, 12], ["B", "T", 12], [0, 0, 12]),
        (["B", "T", 12], [-1, 12], [None, 12], [-1, 12]),
        ([2, 5, 12], [10, 12], [10, 12], [10, 12]),
    ],
)
def test_fires(
    before: list[object], target: list[int | None], after: list[object], constant: list[int], T: int
) -> None:
    model = reshaped(GraphMaker(), before, target, after)
    assert apply(ConstantShapes(), model, T=T)
    assert counts(model) == {"Reshape": 1, "Neg": 1}
    (reshape,) = (node for node in model.graph if node.op_type == "Reshape")
    shape = ir.convenience.get_const_tensor(reshape.inputs[1])
    assert shape is not None
    assert shape.numpy().tolist() == constant


@pytest.mark.parametrize(
    ("before", "target", "after"),
    [
        (["B", "T", 12], [5, 2, 12], ["T", "B", 12]),  # two sizes that stand elsewhere
        (["B", "T", 12], [None, -1, 6], ["B", None, 6]),  # -1 beside a copied size
        ([None, "T", 12], [2, None, 4, 3], [None, "T", 4, 3]),  # an unnamed size is no size's equal
    ],
)
def test_does_not_fire(before: list[object], target: list[int | None], after: list[object]) -> None:
    assert not apply(ConstantShapes(), reshaped(GraphMaker(), before, target, after))


def test_a_constant_is_left_alone() -> None:
    g = GraphMaker()
    model = g.model(g.op("Neg", g.reshape(g.input("x", "B", "T", 12), [0, 0, 3, 4], ["B", "T", 3, 4])))
    assert not apply(ConstantShapes(), model)
