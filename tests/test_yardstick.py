"""The yardstick: its model file rebuilt, its sizes, and that it computes what it says."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from pe_onnx.yardstick import MODEL, PRODUCTS, Sizes, Yardstick


def rebuilt() -> onnx.ModelProto:
    """The file, from nothing: as it was made."""
    weights = [f"w{i}" for i in range(PRODUCTS)]
    values = ["x", *(f"x{i}" for i in range(1, PRODUCTS)), "y"]
    nodes = [helper.make_node("MatMul", [values[i], weights[i]], [values[i + 1]]) for i in range(PRODUCTS)]

    def tensor(name: str, *shape: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    inputs = [tensor("x", "tokens", "width"), *(tensor(name, "width", "width") for name in weights)]
    graph = helper.make_graph(nodes, "yardstick", inputs, [tensor("y", "tokens", "width")])
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="pe-onnx")


def test_the_file_is_what_it_is_made_of() -> None:
    assert onnx.load(MODEL) == rebuilt()
    onnx.checker.check_model(onnx.load(MODEL))


def test_its_weights_have_the_bytes_of_the_bundles() -> None:
    for weight_bytes in (65_000_000, 540_000_000, 1_000_000):
        width = Sizes(weight_bytes, 0, 1, 1).width
        assert width % 16 == 0
        assert 0.8 * weight_bytes < 4 * PRODUCTS * width**2 <= weight_bytes
    assert Sizes(10, 0, 1, 1).width == 16


def test_it_goes_through_all_weights_and_copies_all_bytes() -> None:
    """Each weight matrix takes a row of ones to ones; three that are doubled make it eight."""
    work = Yardstick(Sizes(4 * PRODUCTS * 32**2, 4000, 8, 5))
    assert work.sizes.width == 32
    assert len({w.data_ptr() for w in work.weights}) == PRODUCTS
    for w in work.weights[:3]:
        w.update_inplace(2 * w.numpy())
    work.target[:] = 0
    work.step()()
    assert work.target.sum() == 1000
    work.prompt()()
    assert [y.shape() for y in work.results] == [[1, 32], [5, 32]]
    for y in work.results:
        np.testing.assert_allclose(y.numpy(), 8, rtol=1e-5)
