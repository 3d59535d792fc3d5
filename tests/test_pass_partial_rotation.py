"""PartialRotation: the first channels rotated, the others passed on."""

from __future__ import annotations

import pytest
from graphs import GraphMaker, apply, counts

from pe_onnx.passes.partial_rotation import PartialRotation

H, D, R = 3, 10, 4
SHAPE = ["B", H, "T", D]


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("split", [False, True])
def test_fires(split: bool, interleaved: int) -> None:
    g = GraphMaker()
    x = g.input("x", *SHAPE)
    cos, sin = (g.input(name, "B", "T", R // 2) for name in ("cos", "sin"))
    if split:
        shapes = [["B", H, "T", size] for size in (R, D - R)]
        first, rest = g.ops("Split", x, g.const([R, D - R]), shapes=shapes, axis=-1)  # type: ignore[arg-type]
    else:
        first, rest = g.slice(x, 0, R), g.slice(x, R, 2**63 - 1)
    joined = g.op("Concat", g.rotate(first, cos, sin, R, interleaved), rest, shape=SHAPE, axis=-1)
    model = g.model(g.op("Abs", joined))
    assert apply(PartialRotation(), model)
    assert counts(model) == {"RotaryEmbedding": 1, "Abs": 1}


def test_the_rotated_part_read_elsewhere_stays() -> None:
    g = GraphMaker()
    x = g.input("x", *SHAPE)
    cos, sin = (g.input(name, "B", "T", R // 2) for name in ("cos", "sin"))
    rotated = g.rotate(g.slice(x, 0, R), cos, sin, R)
    joined = g.op("Concat", rotated, g.slice(x, R, D), shape=SHAPE, axis=-1)
    model = g.model(g.op("Abs", joined), g.op("Neg", rotated))
    assert apply(PartialRotation(), model)
    assert counts(model) == {"RotaryEmbedding": 2, "Slice": 1, "Abs": 1, "Neg": 1}


@pytest.mark.parametrize("case", ["gap", "another rest", "rest first", "axis", "not from 0", "stepped", "output"])
def test_does_not_fire(case: str) -> None:
    g = GraphMaker()
    x = g.input("x", *SHAPE)
    cos, sin = (g.input(name, "B", "T", R // 2) for name in ("cos", "sin"))
    start, step = {"not from 0": (2, 1), "stepped": (0, 2)}.get(case, (0, 1))
    first = g.slice(x, start, start + R * step, step)
    rest = g.slice(g.op("Neg", x, shape=SHAPE) if case == "another rest" else x, R + (case == "gap"), D)
    rotated = g.rotate(first, cos, sin, R)
    if case == "axis":
        rest = g.slice(x, 0, R)
    parts = (rest, rotated) if case == "rest first" else (rotated, rest)
    joined = g.op("Concat", *parts, shape=None if case == "axis" else SHAPE, axis=1 if case == "axis" else 3)
    model = g.model(joined if case == "output" else g.op("Abs", joined))
    assert not apply(PartialRotation(), model)
