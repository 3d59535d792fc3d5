"""The yardstick: its model against the onnx package, its sizes, and that it computes what it says."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pe_onnx.yardstick import FACTORS, PRODUCTS, Sizes, Yardstick
from pe_onnx.yardstick_model import product_chain, weight_names


def chain(products: int, width: int) -> onnx.ModelProto:
    """The same model by the onnx package."""
    values = ["x", *(f"x{i}" for i in range(1, products)), "y"]
    names = weight_names(products)
    nodes = [helper.make_node("MatMul", [values[i], names[i]], [values[i + 1]]) for i in range(products)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width]) for name in ("x", "y")]
    weights = []
    for name in names:
        weight = TensorProto(name=name, dims=[width, width], data_type=TensorProto.FLOAT)
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="handed in")
        weights.append(weight)
    graph = helper.make_graph(nodes, "yardstick", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="pe-onnx")


@pytest.mark.parametrize(("products", "width"), [(1, 16), (PRODUCTS, 704), (3, 40000)])
def test_the_model_that_is_written_is_the_onnx_packages(products: int, width: int) -> None:
    assert onnx.load_model_from_string(product_chain(products, width)) == chain(products, width)


def test_its_weights_have_the_bytes_of_the_bundles() -> None:
    for weight_bytes in (65_000_000, 540_000_000, 1_000_000):
        width = Sizes(weight_bytes, 0, 1, 1).width
        assert width % 16 == 0
        assert 0.8 * weight_bytes < 4 * PRODUCTS * width**2 <= weight_bytes
    assert Sizes(10, 0, 1, 1).width == 16


def test_it_goes_through_all_weights_and_copies_all_bytes() -> None:
    """Each product takes a row of equal numbers to a multiple of its own: all of them must have been there."""
    work = Yardstick(Sizes(4 * PRODUCTS * 32**2, 4000, 8, 5))
    assert work.sizes.width == 32
    work.target[:] = 0
    work.step()()
    assert work.target.sum() == 1000
    work.prompt()()
    assert [y.shape() for y in work.results] == [[1, 32], [5, 32]]
    for y in work.results:
        np.testing.assert_allclose(y.numpy(), math.prod(FACTORS), rtol=1e-5)


def test_no_two_weights_are_equal() -> None:
    """onnxruntime holds equal ones once: the work would be done in the cache, and be bound by something else."""
    assert len(set(np.float32(FACTORS))) == PRODUCTS
