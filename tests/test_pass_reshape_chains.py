"""ReshapeChains: Reshape after Reshape."""

from __future__ import annotations

import pytest
from graphs import GraphMaker, apply, counts

from pe_onnx.passes.reshape_chains import ReshapeChains

PACKED, HEADS = ["B", "T", 12], ["B", "T", 3, 4]


def test_there_and_back_is_nothing() -> None:
    g = GraphMaker()
    heads = g.reshape(g.op("Abs", g.input("x", *PACKED), shape=PACKED), [0, 0, 3, 4], HEADS)
    model = g.model(g.op("Neg", g.reshape(heads, [0, 0, 12], PACKED)))
    assert apply(ReshapeChains(), model)
    assert counts(model) == {"Abs": 1, "Neg": 1}


def test_reads_past_another() -> None:
    g = GraphMaker()
    flat = g.reshape(g.input("x", *PACKED), [-1, 12], [None, 12])
    model = g.model(g.op("Neg", g.reshape(flat, [2, 5, 4, 3], [2, 5, 4, 3])))
    assert apply(ReshapeChains(), model)
    assert counts(model) == {"Reshape": 1, "Neg": 1}


def test_the_first_stays_where_it_is_read() -> None:
    g = GraphMaker()
    heads = g.reshape(g.input("x", *PACKED), [0, 0, 3, 4], HEADS)
    model = g.model(g.op("Neg", g.reshape(heads, [0, 0, 12], PACKED)), g.op("Abs", heads))
    assert apply(ReshapeChains(), model)
    assert counts(model) == {"Reshape": 1, "Neg": 1, "Abs": 1}


def test_an_output_of_the_graph_keeps_its_reshape() -> None:
    g = GraphMaker()
    heads = g.reshape(g.input("x", *PACKED), [0, 0, 3, 4], HEADS)
    model = g.model(g.reshape(heads, [-1, 5, 12], PACKED))
    assert apply(ReshapeChains(), model)
    assert counts(model) == {"Reshape": 1}


def test_computed_target() -> None:
    g = GraphMaker()
    x = g.input("x", *PACKED)
    heads = g.reshape(x, [0, 0, 3, 4], HEADS)
    target = g.op("Concat", g.op("Shape", x, start=0, end=2), g.const([12]), axis=0)
    model = g.model(g.op("Neg", g.op("Reshape", heads, target, shape=["B", "T", 12], allowzero=1)))
    assert apply(ReshapeChains(), model)
    assert counts(model)["Reshape"] == 0


@pytest.mark.parametrize("case", ["one", "other symbols", "unnamed", "copies", "computed copies"])
def test_does_not_fire(case: str) -> None:
    g = GraphMaker()
    if case == "one":
        model = g.model(g.op("Neg", g.reshape(g.input("x", *PACKED), [0, 0, 3, 4], HEADS)))
    elif case in ("other symbols", "unnamed"):  # 2 x 5 x 12 to 5 x 2 x 12
        symbols = ["B", "T"] if case == "other symbols" else [None, None]
        x = g.input("x", "B", "T", 12)
        model = g.model(g.op("Neg", g.reshape(x, [5, 2, 12], [symbols[1], symbols[0], 12])))
    elif case == "copies":  # the size that 0 copies is the first Reshape's
        flat = g.reshape(g.input("x", "B", "T", 12), [-1, 6], [None, 6])
        model = g.model(g.op("Neg", g.reshape(flat, [0, 3, 2], [None, 3, 2])))
    else:
        flat = g.reshape(g.input("x", "B", "T", 12), [-1, 6], [None, 6])
        target = g.op("Concat", g.const([0]), g.op("Shape", g.input("y", 3, 2)), axis=0)
        model = g.model(g.op("Neg", g.op("Reshape", flat, target, shape=[None, 3, 2])))
    assert not apply(ReshapeChains(), model)
